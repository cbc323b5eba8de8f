"""`duo eval context`: the longest contexts of the paper's models on one GPU, planned and held against the compiler."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duo_eval.aot.compile import compiled_with
from duo_eval.aot.verify import verify
from duo_eval.runner.record import provenance, write
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_jax import PRESETS
from duo_jax.gpus import GPUS, find_gpu
from duo_jax.plan import Plan, any_pattern

# The paper's operating points (section 3.1): the fraction of KV heads that stream, and the saving in decode memory
# that it reports, with the context where it does.
MODELS: dict[str, tuple[float, int, float]] = {
    "llama-3-8b": (0.5, 500_000, 1.67),
    "llama-2-7b": (0.75, 100_000, 2.55),
}

# Data types of weights and of the cache.
DTYPES: dict[str, tuple[str | None, str | None]] = {
    "bf16": (None, None),
    "KV4": (None, "int4"),
    "W8 KV8": ("int8", "int8"),
    "W8 KV4": ("int8", "int4"),
    "W4 KV4": ("int4", "int4"),
}


@dataclass(frozen=True)
class ContextTask:
    """Plan the longest context of the paper's models on a GPU, for each data type, full and duo, and compile them."""

    gpus: tuple[str, ...] = ("a100-80g",)
    """a100-80g, h100-80g, h200, b200 or rtx-4090."""
    models: tuple[str, ...] = tuple(MODELS)
    """llama-3-8b, llama-2-7b."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """bf16, KV4, W8 KV8, W8 KV4, W4 KV4."""
    chunk: int = 4096
    """Tokens of a chunk of the prompt."""
    compile: bool = True
    """Compile prefill and decode at the longest context; a cell takes minutes."""
    out: Path | None = None
    """File to write; compiled cells that are there are kept where the plan is the same."""

    def run(self) -> None:
        """Plan every cell, compile it, print a line for each."""
        for name, chosen, known in (("models", self.models, MODELS), ("dtypes", self.dtypes, DTYPES)):
            if not set(chosen) <= set(known):
                raise ValueError(f"unknown {name} in {chosen}; there are {', '.join(known)}")
        before = self._known()
        record: dict[str, Any] = provenance(asdict(self)) | {"savings": [_saving(model) for model in self.models]}
        record["results"] = results = []
        for gpu in self.gpus:
            for model in self.models:
                for dtypes in self.dtypes:
                    for heads in ("full", "duo"):
                        cell = {"gpu": gpu, "model": model, "dtypes": dtypes, "heads": heads, "chunk": self.chunk}
                        results.append(self._cell(cell, before))
                        print(_line(results[-1]), flush=True)
                        if self.out is not None:
                            write(self.out, record)

    def _known(self) -> list[dict[str, Any]]:
        if self.out is None or not self.out.exists():
            return []
        return json.loads(self.out.read_text(encoding="utf-8"))["results"]

    def _cell(self, cell: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
        plan = planned(cell["model"], cell["dtypes"], cell["heads"] == "duo", self.chunk)
        context = plan.max_context(find_gpu(cell["gpu"]).usable_bytes)
        sizes = {"weights": plan.weights, "kv": plan.kv(context), "activations": plan.activations}
        cell |= {"context": context, "kv_per_token": plan.kv_per_token, **sizes, "verified": None}
        for other in known:
            if other["verified"] and all(other[name] == cell[name] for name in cell if name != "verified"):
                return other
        if self.compile:
            begin = time.perf_counter()
            try:
                found = verify(plan, context, cell["gpu"])
            except NotImplementedError as error:
                return cell | {"why_not": str(error)}
            machine = provenance()["machine"]
            about = {"seconds": time.perf_counter() - begin, "commit": machine["commit"]}
            cell["verified"] = found | about
        return cell


def planned(model: str, dtypes: str, duo: bool, chunk: int) -> Plan:
    """One cell of the table."""
    weight_dtype, kv_dtype = DTYPES[dtypes]
    config = replace(PRESETS[model], dtype="bfloat16", weight_dtype=weight_dtype)
    # The paper's sizes where it measures efficiency.
    pattern = any_pattern(config, MODELS[model][0], sink_size=128, recent_size=256) if duo else None
    return Plan(config, pattern, chunk_size=chunk, kv_dtype=kv_dtype)


def _saving(model: str) -> dict[str, Any]:
    """Full attention's bytes of weights and cache over duo's, in bfloat16, where the paper measured them."""
    full, duo = (planned(model, "bf16", is_duo, 1) for is_duo in (False, True))
    _, context, goal = MODELS[model]

    def saving(length: int) -> float:
        return (full.weights + full.kv(length)) / (duo.weights + duo.kv(length))

    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(middle) >= goal else (middle + 1, high)
    return {"model": model, "context": context, "saving": saving(context), "goal": goal, "goal_passed_at": low}


def _line(cell: dict[str, Any]) -> str:
    text = f"{cell['gpu']}, {cell['model']}, {cell['dtypes']}, {cell['heads']}: {cell['context'] / 1e6:.2f}M tokens"
    found = cell["verified"]
    if found is None:
        return f"{text}, not compiled" + (f": {cell['why_not']}" if "why_not" in cell else "")
    return f"{text}, planned {found['planned'] / 1e9:.2f} GB, compiled {found['total'] / 1e9:.2f} GB"


def plan_table(path: Path) -> str:
    """The longest contexts by plan, and the deviation of the plan from the compiler's figure."""
    record = json.loads(path.read_text(encoding="utf-8"))
    cells: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for cell in record["results"]:
        cells.setdefault((cell["gpu"], cell["model"], cell["dtypes"]), {})[cell["heads"]] = cell
    rows = []
    for key, by_heads in cells.items():
        row = [*key]
        for heads in ("full", "duo"):
            cell = by_heads.get(heads)
            verified = cell and cell["verified"]
            row += [
                f"{cell['context']:,}" if cell else "",
                f"{verified['deviation']:+.2%}" if verified else "not compiled",
            ]
        rows.append(row)
    headers = ["GPU", "model", "weights, cache", "full attention, tokens", "plan", "duo, tokens", "plan"]
    gpus = {cell["gpu"]: GPUS[cell["gpu"]] for cell in record["results"]}
    usable = ", ".join(f"{gpu.name} {gpu.usable_bytes / 1e9:.2f} GB" for gpu in gpus.values())
    savings = [
        f"{saving['model']} at {saving['context']:,} tokens needs {saving['saving']:.2f} times less than with full "
        f"attention (the paper: {saving['goal']}), and passes the paper's figure at {saving['goal_passed_at']:,}"
        for saving in record["savings"]
    ]
    chunk = record["settings"]["chunk"]
    return (
        f"{rows_to_table(rows, headers, 'lllr')}\n\n"
        f"Chunks of {chunk} tokens; usable: {usable}. *plan*: its total compared with the compiler's; not run.\n\n"
        f"Decode memory in bfloat16, weights and cache: {'; '.join(savings)}.\n\n{compiled_with(record)}"
    )


RESULT = ResultType(
    "Longest contexts, planned and compiled", with_fields("dtypes", "context"), {"On one GPU": plan_table}
)
