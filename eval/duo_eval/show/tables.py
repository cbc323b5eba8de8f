"""Tables of README and docs, made from committed results and plans: `python -m duo_eval.show.tables` rewrites them."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from duo_eval.aot.context import mesh_table, plan_table
from duo_eval.aot.gpu_memory import longest_contexts, memory_by_context
from duo_eval.aot.kernels import kernels_table
from duo_eval.aot.memory import memory_table
from duo_eval.aot.paper import paper_memory_table
from duo_eval.show.families import families_table, refused_table, short_list
from duo_eval.show.paper import paper_accuracy, paper_cpu, paper_latency, paper_short
from duo_eval.show.score_table import score_summary, score_table
from duo_eval.speed.adapter import adapter_table
from duo_eval.speed.efficiency_results import bench_table, efficiency_table
from duo_eval.speed.serving.bench import servers_table
from duo_eval.speed.startup import startup_table
from duo_eval.speed.training import training_table
from duo_eval.tasks.item_by_item import short_table
from duo_eval.tasks.keys import keys_table
from duo_eval.tasks.needle.heads_show import head_table, needle_table
from duo_eval.tasks.precision import precision_table
from duo_eval.tasks.recall_results import prose_table, recall_details, recall_table
from duo_jax.files import write_text
from duo_jax.reading import read_text

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

# A table by the name in its markers, `<!-- NAME -->` and `<!-- /NAME -->`: the file in RESULTS, and the function.
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "bench": ("cpu/bench.json", bench_table),
    "gemma": ("cpu/gemma.json", efficiency_table),
    "recall": ("cpu/recall.jsonl", recall_table),
    "recall details": ("cpu/recall.jsonl", recall_details),
    "windows": ("cpu/windows.jsonl", recall_table),
    "windows details": ("cpu/windows.jsonl", recall_details),
    "prose": ("cpu/recall.jsonl", prose_table),
    "needle": ("cpu/needle.jsonl", score_summary),
    "needle, half": ("cpu/needle.jsonl", partial(score_summary, budget=0.5)),
    "needle 4096": ("cpu/needle-4096.jsonl", score_summary),
    "heads": ("cpu/heads-4096.jsonl", head_table),
    "heads needles": ("cpu/heads-4096.jsonl", needle_table),
    "needle later": ("cpu/needle-later.jsonl", score_summary),
    "needle window": ("cpu/needle-window.jsonl", score_summary),
    "needle cells": ("cpu/needle.jsonl", score_table),
    "ruler": ("cpu/ruler.jsonl", score_summary),
    "ruler question": ("cpu/ruler-question.jsonl", score_summary),
    "ruler later": ("cpu/ruler-later.jsonl", score_summary),
    "ruler window": ("cpu/ruler-window.jsonl", score_summary),
    "ruler cells": ("cpu/ruler.jsonl", score_table),
    "mmlu": ("cpu/mmlu.jsonl", short_table),
    "humaneval": ("cpu/humaneval.jsonl", short_table),
    "adapter": ("cpu/harness.json", adapter_table),
    "adapter, one by one": ("cpu/harness-1.json", adapter_table),
    "training": ("cpu/training.json", training_table),
    "startup": ("cpu/startup.json", startup_table),
    "families": ("cpu/families.json", families_table),
    "precision": ("cpu/precision.jsonl", precision_table),
    "keys": ("cpu/keys.json", keys_table),
    "memory": ("aot/memory.json", memory_table),
    "sharded training": ("aot/training-70b.json", memory_table),
    "shared training": ("aot/training-mesh.json", memory_table),
    "serving": ("aot/serving.json", memory_table),
    "plan": ("aot/plan.json", plan_table),
    "mesh": ("aot/mesh.json", mesh_table),
    "families memory": ("aot/families.json", mesh_table),
    "kernels": ("aot/kernels.json", kernels_table),
    "paper memory": ("aot/paper.json", paper_memory_table),
    # Of several files.
    "paper, short": ("", paper_short),
    "paper accuracy": ("", paper_accuracy),
    "paper latency": ("", paper_latency),
    "paper cpu": ("", paper_cpu),
    "servers": ("", servers_table),
}

# Tables that are computed when they are written.
COMPUTED: dict[str, Callable[[], str]] = {
    "gpu memory": memory_by_context,
    "gpu contexts": longest_contexts,
    "families, short": short_list,
    "refused": refused_table,
}


def render(text: str) -> str:
    """The text with a new table between each pair of markers.

    Raises:
        ValueError: a marker without its end, or with a name that is not in `TABLES`.
    """
    unknown = sorted(set(re.findall(r"^<!-- /(.+) -->$", text, re.MULTILINE)) - {*TABLES, *COMPUTED})
    if unknown:
        raise ValueError(f"no table has the name {', '.join(unknown)}: add a row to TABLES, or correct the marker")
    tables: dict[str, Callable[[], str]] = {**COMPUTED}
    for name, (path, made_from) in TABLES.items():
        tables[name] = partial(made_from, RESULTS / path)
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            if end not in rest:
                raise ValueError(f"{begin.strip()} has no {end} after it: nothing was written")
            after = rest.partition(end)[2]
            text = f"{before}{begin}{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or PAGES:
        write_text(page, render(read_text(page)))
