"""README tables, made from committed results: `python -m eval.tables` rewrites what stands between their markers."""

import json
import sys
from pathlib import Path
from typing import Any

from eval.costs import saving_realized

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "eval" / "results" / "cpu" / "bench.json"


def bench_table(record: dict[str, Any]) -> str:
    """Prefill and decode of every point, and how much of the promised saving was realized."""
    points: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for result in record["results"]:
        point = result["point"]
        kind = point["engine"] if point["sparsity"] is None else f"{point['sparsity']:.0%}"
        points.setdefault((point["batch_size"], point["context"]), {})[kind] = result
    kinds = [kind for kind in ("transformers", "duo", "50%") if any(kind in row for row in points.values())]
    names = {"transformers": "transformers", "duo": "full", "50%": "50 % streaming"}
    lines = [
        "| batch | tokens | "
        + " | ".join(f"prefill s, {names[kind]}" for kind in kinds)
        + " | saving realized | "
        + " | ".join(f"decode ms, {names[kind]}" for kind in kinds)
        + " | saving realized | KV MB | KV MB, 50 % |",
        "| --: " * (2 + 2 * len(kinds) + 4) + "|",
    ]
    for (batch, context), row in sorted(points.items()):
        full, half = row["duo"], row["50%"]
        cells = [str(batch), str(context)]
        for field, cost, spec in (("prefill_seconds", "prefill_flops", ".2f"), ("decode_ms", "decode_bytes", ".1f")):
            cells += [f"{row[kind][field]:{spec}}" for kind in kinds]
            cells.append(f"{saving_realized(full[field], half[field], full[cost], half[cost]):.2f}")
        cells += [f"{result['kv_bytes'] / 1e6:.0f}" for result in (full, half)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_about(record)])


def _about(record: dict[str, Any]) -> list[str]:
    machine, results = record["machine"], record["results"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    compiled = [result["compile_seconds"] for result in results if result["compile_seconds"]]
    prefill, decode = (max(times[phase] for times in compiled) for phase in ("prefill", "decode"))
    peak = {
        engine: max(r["peak_memory_bytes"] for r in results if r["point"]["engine"] == engine) / 1e9
        for engine in sorted({r["point"]["engine"] for r in results})
    }
    memory = ", ".join(f"{engine} {size:.1f} GB" for engine, size in peak.items())
    return [
        f"{machine['processor']}, {machine['cores']} cores, float32, Python {machine['python']}, {versions}, "
        f"commit {machine['commit']}. Medians; `{record['command']}`.",
        f"Compilation took at most {prefill:.1f} s (prefill) and {decode:.1f} s (decode). "
        f"Largest process memory: {memory}.",
    ]


TABLES = {"bench": (BENCH, bench_table)}


def render(text: str) -> str:
    """The text with every table between its markers made anew."""
    for name, (path, table) in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            if end not in rest:
                raise ValueError(f"{begin.strip()} has no {end} after it: nothing was written")
            after = rest.partition(end)[2]
            text = f"{before}{begin}{table(json.loads(path.read_text(encoding='utf-8')))}\n{end}{after}"
    return text


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or [ROOT / "README.md"]:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
