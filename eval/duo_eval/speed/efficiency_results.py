"""Results of `duo bench` and `duo eval efficiency`: tables and curves, each point next to its floor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import read
from duo_eval.show.curves import Chart, Line, Panel
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.roofline import saving_realized

# Where the costs promise a smaller saving than this, the saving realized would be noise.
LEAST_SAVING = 0.02
# Each phase: its time, its floor, its cost, and how its time is written.
PHASES = (
    ("prefill_seconds", "prefill_floor_seconds", "prefill_flops", ".2f"),
    ("decode_ms", "decode_floor_ms", "decode_bytes", ".1f"),
)
Result = dict[str, Any]


def bench_table(path: Path) -> str:
    """Prefill and decode of every point, and the fraction of the promised saving that was realized."""
    head, results = read(path)
    points: dict[tuple[int, int], dict[str, Result]] = {}
    for result in results:
        point = result["point"]
        points.setdefault((point["batch_size"], point["context"]), {})[engine_name(result)] = result
    names = {"transformers": "transformers", "full": "full", "50% streaming": "50 % streaming"}
    engines = [name for name in names if any(name in by_engine for by_engine in points.values())]
    rows = []
    for point, by_engine in sorted(points.items()):
        full, half = by_engine["full"], by_engine["50% streaming"]
        row = [*map(str, point)]
        for time, _, cost, spec in PHASES:
            row += [f"{by_engine[engine][time]:{spec}}" for engine in engines]
            row.append(f"{saving_realized(full[time], half[time], full[cost], half[cost]):.2f}")
        rows.append([*row, *(f"{result['kv_bytes'] / 1e6:.0f}" for result in (full, half))])
    headers = ["batch", "tokens"]
    for phase in ("prefill s", "decode ms"):
        headers += [*(f"{phase}, {names[engine]}" for engine in engines), "saving realized"]
    table = rows_to_table(rows, [*headers, "KV MB", "KV MB, 50 %"], "r")
    return f"{table}\n\n{_footer(head, results)}"


def efficiency_table(path: Path) -> str:
    """Every point next to its floor and the fraction of the promised saving realized; then what did not run and why."""
    head, every = read(path)
    done = [result for result in every if "cannot" not in result]
    full = {place(result): result for result in done if engine_name(result) == "full"}
    rows = []
    for result in done:
        row = [*(str(part or "") for part in place(result)), engine_name(result)]
        base = full.get(place(result), result)
        for time, floor, cost, spec in PHASES:
            saved = None
            if result[cost] < (1 - LEAST_SAVING) * base[cost]:
                saved = saving_realized(base[time], result[time], base[cost], result[cost])
            ratio = result[time] / result[floor] if floor in result else None
            row += [f"{result[time]:{spec}}", _optional(ratio, ".1f"), _optional(saved, ".2f")]
        rows.append([*row, f"{result['kv_bytes'] / 1e9:.2f}", f"{result['peak_memory_bytes'] / 1e9:.2f}"])
    headers = ["model", "batch", "tokens", "chunk", "engine"]
    for phase in ("prefill, s", "decode, ms"):
        headers += [phase, "times floor", "saving realized"]
    parts = [rows_to_table(rows, [*headers, "KV, GB", "memory, GB"], "lrrrlr")]
    parts += [_footer(head, done)] if done else []
    for result in every:
        if "cannot" in result:
            model, batch, tokens, chunk = place(result)
            point = f"{model}, batch {batch}, {tokens} tokens" + (f", chunks of {chunk}" if chunk else "")
            parts.append(f"Not measured: {point}, {engine_name(result)}: {result['cannot']}.")
    return "\n\n".join(parts)


def efficiency_curves(path: Path) -> Iterator[Chart]:
    """Prefill, decode and memory against context length, this library's floors dashed."""
    done = [result for result in read(path)[1] if "cannot" not in result]
    for model, batch in dict.fromkeys(place(result)[:2] for result in done):
        results = [result for result in done if place(result)[:2] == (model, batch)]
        for name, field, floor, unit, scale in (
            ("prefill", "prefill_seconds", "prefill_floor_seconds", "seconds", 1.0),
            ("decode", "decode_ms", "decode_floor_ms", "ms a token", 1.0),
            ("memory", "peak_memory_bytes", None, "GB", 1e-9),
        ):
            lines = _against_context(results, field, floor, scale)
            panel = Panel("", f"{name.capitalize()}: {model}, batch {batch}", lines)
            yield Chart(f"{name}-{model}-{batch}", "", [panel], "context, tokens", unit, x_is_tokens=True)


def _against_context(results: list[Result], field: str, floor: str | None, scale: float) -> list[Line]:
    """A line for each engine and chunk size; all chunk sizes share a floor, which is drawn once."""
    groups: dict[tuple[str, int | None], list[Result]] = {}
    for result in results:
        groups.setdefault((engine_name(result), place(result)[3]), []).append(result)
    lines, with_floor = [], set()
    for (engine, chunk), group in groups.items():
        x = [float(result["point"]["context"]) for result in group]
        name = engine if chunk is None else f"{engine}, chunks of {chunk}"
        streams = group[0]["point"]["sparsity"] is not None
        y = [float(scale * result[field]) for result in group]
        lines.append(Line(name, x, y, method="duo" if streams else engine))
        is_duo = all(result["point"]["engine"] == "duo" and floor in result for result in group)
        if floor is not None and is_duo and engine not in with_floor:
            with_floor.add(engine)
            lines.append(Line(f"{engine}: floor", x, [float(result[floor]) for result in group], is_floor=True))
    return lines


def place(result: Result) -> tuple[str, int, int, int | None]:
    """The point at which engines are compared: model (and its layers), batch size, context, chunk size."""
    point = result["point"]
    model = BenchModel(point["model"], point.get("layers")).name
    return model, point["batch_size"], point["context"], point.get("chunk_size")


def engine_name(result: Result) -> str:
    """The engine; for this library, the fraction of heads that stream."""
    point = result["point"]
    if point["engine"] != "duo":
        return point["engine"]
    return "full" if point["sparsity"] is None else f"{point['sparsity']:.0%} streaming"


def _optional(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _footer(head: dict[str, Any], results: list[Result]) -> str:
    compiled = [result["compile_seconds"] for result in results if result["compile_seconds"]]
    prefill, decode = (max((times[phase] for times in compiled), default=0.0) for phase in ("prefill", "decode"))
    peak: dict[str, int] = {}
    for result in sorted(results, key=lambda result: result["point"]["engine"]):
        engine = result["point"]["engine"]
        peak[engine] = max(result["peak_memory_bytes"], peak.get(engine, 0))
    memory = ", ".join(f"{engine} {size / 1e9:.1f} GB" for engine, size in peak.items())
    dtypes = sorted({result["point"].get("dtype", "float32") for result in results})
    runs = [run | {"dtype": ", ".join(dtypes)} for run in head["runs"]]
    return (
        f"Medians. {origin(runs, runs[-1]['command'])}\nCompilation took at most {prefill:.1f} s (prefill) and "
        f"{decode:.1f} s (decode). Largest process memory: {memory}."
    )


RESULT = ResultType(
    "Time and memory",
    lambda first: with_fields("point", "prefill_seconds")(first) or with_fields("point", "cannot")(first),
    {"Every point": efficiency_table},
    (efficiency_curves,),
)
