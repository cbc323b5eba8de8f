"""Tables of `duo bench` and `duo eval efficiency`, and how their points are named."""

import json
from pathlib import Path
from typing import Any

from duo_eval.speed.engines import Subject
from duo_eval.speed.roofline import saving_realized

# Where the costs promise less than this, the saving realized would be noise.
LEAST_SAVING = 0.02


def bench_table(path: Path) -> str:
    """Prefill and decode of every point, and how much of the promised saving was realized."""
    record = json.loads(path.read_text(encoding="utf-8"))
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


def efficiency_table(path: Path) -> str:
    """Every point beside its floor, and how much of the promised saving was realized; what did not run, and why."""
    record = json.loads(path.read_text(encoding="utf-8"))
    done = [result for result in record["results"] if "cannot" not in result]
    base = {place(result): result for result in done if engine(result) == "full"}
    phases = " | ".join(f"{phase} | times floor | saving realized" for phase in ("prefill, s", "decode, ms"))
    lines = [
        f"| model | batch | tokens | chunk | engine | {phases} | KV, GB | memory, GB |",
        "| --- | --: | --: | --: | --- " + "| --: " * 8 + "|",
    ]
    for result in done:
        cells = [*(str(part or "") for part in place(result)), engine(result)]
        full = base.get(place(result), result)
        for field, floor, cost, spec in (
            ("prefill_seconds", "prefill_floor_seconds", "prefill_flops", ".2f"),
            ("decode_ms", "decode_floor_ms", "decode_bytes", ".1f"),
        ):
            is_less = result[cost] < (1 - LEAST_SAVING) * full[cost]
            saved = saving_realized(full[field], result[field], full[cost], result[cost]) if is_less else None
            ratio = result[field] / result[floor] if floor in result else None
            cells += [f"{result[field]:{spec}}", _optional(ratio, ".1f"), _optional(saved, ".2f")]
        cells += [f"{result['kv_bytes'] / 1e9:.2f}", f"{result['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if done:
        lines += ["", *_about(record)]
    for result in record["results"]:
        if "cannot" in result:
            model, batch, tokens, chunk = place(result)
            where = f"{model}, batch {batch}, {tokens} tokens" + (f", chunks of {chunk}" if chunk else "")
            lines += ["", f"Not measured: {where}, {engine(result)}: {result['cannot']}."]
    return "\n".join(lines)


def place(result: dict[str, Any]) -> tuple[str, int, int, int | None]:
    """What engines are compared at: model (and how much of it), batch size, context, chunk size."""
    point = result["point"]
    model = Subject(point["model"], point.get("layers")).name
    return model, point["batch_size"], point["context"], point.get("chunk_size")


def engine(result: dict[str, Any]) -> str:
    """Which engine, and how many heads stream."""
    point = result["point"]
    if point["engine"] != "duo":
        return point["engine"]
    return "full" if point["sparsity"] is None else f"{point['sparsity']:.0%} streaming"


def _optional(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _about(record: dict[str, Any]) -> list[str]:
    machine = record["machine"]
    results = [result for result in record["results"] if "cannot" not in result]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    compiled = [result["compile_seconds"] for result in results if result["compile_seconds"]]
    prefill, decode = (max((times[phase] for times in compiled), default=0.0) for phase in ("prefill", "decode"))
    dtypes = ", ".join(sorted({result["point"].get("dtype", "float32") for result in results}))
    device = f"{record['device']}, " if record.get("device", "cpu") != "cpu" else ""
    peak = {
        engine: max(r["peak_memory_bytes"] for r in results if r["point"]["engine"] == engine) / 1e9
        for engine in sorted({r["point"]["engine"] for r in results})
    }
    memory = ", ".join(f"{engine} {size:.1f} GB" for engine, size in peak.items())
    return [
        f"{device}{machine['processor']}, {machine['cores']} cores, {dtypes}, Python {machine['python']}, {versions}, "
        f"commit {machine['commit']}. Medians; `{record['command']}`.",
        f"Compilation took at most {prefill:.1f} s (prefill) and {decode:.1f} s (decode). "
        f"Largest process memory: {memory}.",
    ]
