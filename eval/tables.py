"""Tables of the pages, made from committed results: `python -m eval.tables` rewrites them between their markers."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.compiled import GPUS
from eval.costs import saving_realized
from eval.intervals import Estimate, ratio
from eval.ledger import read
from eval.recall import FULL, RANDOM, STREAMING

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results" / "cpu"
COMPILED = ROOT / "eval" / "results" / "aot"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "guides" / "identify.md",
    ROOT / "docs" / "guides" / "kernels.md",
)


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


def recall_table(path: Path) -> str:
    """Token accuracy of held-out passkeys, and that as a percentage of full attention's: recipe by sparsity."""
    head, cells = _recall(path)
    lines = []
    for length in sorted({key[0] for key in cells}):
        here = {key: cell for key, cell in cells.items() if key[0] == length}
        sparsities = sorted({key[2] for key in here if key[1] not in (FULL, STREAMING)})
        full = cells[length, FULL, 0.0]
        lines += [
            f"| {length} tokens | " + " | ".join(f"{sparsity:.0%} stream" for sparsity in sparsities) + " |",
            "| --- " + "| --: " * len(sparsities) + "|",
        ]
        for method in _methods(here):
            row = []
            for sparsity in sparsities:
                cell = cells.get((length, method, sparsity))
                accuracy = cell and cell.accuracy
                row.append(_of(accuracy, full.accuracy) if accuracy else "")
            lines.append(f"| {method} | " + " | ".join(row) + " |")
        streaming = cells.get((length, STREAMING, 1.0))
        lines += ["", f"Full attention {100 * full.accuracy.mean:.1f}"]
        lines[-1] += f", every head streaming {100 * streaming.accuracy.mean:.1f}.\n" if streaming else ".\n"
    return "\n".join([*lines, *_about_recall(head, cells)])


def recall_details(path: Path) -> str:
    """Every cell with its intervals, and the paired differences to full attention."""
    _, cells = _recall(path)
    lines = [
        "| tokens | method | stream | passkeys | accuracy, % | minus full attention | NLL, nats a token | minus full |",
        "| --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for (length, method, sparsity), cell in sorted(
        cells.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])
    ):
        points = [_scaled(estimate).format(".1f") for estimate in (cell.accuracy, cell.accuracy_difference)]
        nats = [estimate.format(".3f") for estimate in (cell.nll, cell.nll_difference)]
        values = [points[0], points[1], nats[0], nats[1]]
        if method == FULL:
            values[1] = values[3] = ""
        lines.append(f"| {length} | {method} | {sparsity:.0%} | {cell.passkeys} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def prose_table(path: Path) -> str:
    """Next-token loss on the text itself."""
    _, cells = _recall(path, prose=True)
    lines = ["| method | stream | loss, nats a token | difference to full attention |", "| --- | --: | --: | --: |"]
    for (_, method, sparsity), cell in sorted(cells.items(), key=lambda item: (item[0][2], item[0][1])):
        difference = "" if method == FULL else cell.nll_difference.format(".3f")
        lines.append(f"| {method} | {sparsity:.0%} | {cell.nll.format('.3f')} | {difference} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Cell:
    """One method at one sparsity and length."""

    passkeys: int
    accuracy: Estimate
    accuracy_difference: Estimate
    nll: Estimate
    nll_difference: Estimate


def _recall(path: Path, *, prose: bool = False) -> tuple[dict[str, Any], dict[tuple[int, str, float], _Cell]]:
    """The first line of a result, and its cells by (length, method, sparsity); random patterns are one method."""
    head, records = read(path)
    samples: dict[tuple[int, str, float], dict[int, dict[str, Any]]] = {}
    for record in records:
        job = record["job"]
        if job["prose"] == prose:
            method = RANDOM if job["method"].startswith(RANDOM) else job["method"]
            samples.setdefault((job["length"], method, job["sparsity"]), {})[job["sample"]] = record
    cells = {}
    for key, found in samples.items():
        full = samples[key[0], FULL, 0.0]
        numbers = sorted(set(found) & set(full))
        tokens, hits, nll = (_column(found, numbers, name) for name in ("tokens", "hits", "nll"))
        cells[key] = _Cell(
            sum(len(found[number]["tokens"]) for number in numbers),
            ratio(hits, tokens),
            ratio(hits, tokens, _column(full, numbers, "hits")),
            ratio(nll, tokens),
            ratio(nll, tokens, _column(full, numbers, "nll")),
        )
    return head, cells


def _column(samples: dict[int, dict[str, Any]], numbers: list[int], name: str) -> np.ndarray:
    return np.array([sum(samples[number][name]) for number in numbers], np.float64)


def _methods(cells: dict[tuple[int, str, float], _Cell]) -> list[str]:
    """In the order in which they were measured, random patterns last."""
    names = dict.fromkeys(key[1] for key in cells if key[1] not in (FULL, STREAMING, RANDOM))
    return [*names, RANDOM] if any(key[1] == RANDOM for key in cells) else [*names]


def _of(accuracy: Estimate, full: Estimate) -> str:
    """In percent, and as a fraction of full attention's."""
    fraction = f" ({accuracy.mean / full.mean:.0%})" if full.mean else ""
    return f"{100 * accuracy.mean:.1f}{fraction}"


def _scaled(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.mean, 100 * estimate.low, 100 * estimate.high)


def _about_recall(head: dict[str, Any], cells: dict[tuple[int, str, float], _Cell]) -> list[str]:
    machine, about = head["runs"][-1]["machine"], head["about"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    commits = ", ".join(dict.fromkeys(run["machine"]["commit"] for run in head["runs"]))
    passkeys = sorted({cell.passkeys for cell in cells.values()})
    count = f"{passkeys[0]}" if len(passkeys) == 1 else f"{passkeys[0]} to {passkeys[-1]}"
    return [
        f"{count} passkeys a cell, sink {about['sink_size']}, recent {about['recent_size']}. {machine['processor']}, "
        f"{machine['cores']} cores, float32, Python {machine['python']}, {versions}. "
        f"Measured by `duo eval recall`, piece by piece, at {commits}.",
    ]


def training_table(path: Path) -> str:
    """Seconds, matmul rate and memory of a training step."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| tokens | layers computed again | seconds a step | of the matmul rate | temporary memory, GB |",
        "| --: | --- | --: | --: | --: |",
    ]
    for result in record["results"]:
        lines.append(
            f"| {result['tokens']} | {'yes' if result['rematerialize'] else 'no'} | {result['seconds']:.1f} | "
            f"{result['fraction_of_matmul_rate']:.0%} | {result['temporary_bytes'] / 1e9:.2f} |"
        )
    machine = record["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    rates = [result["matmul_flops_per_second"] / 1e9 for result in record["results"]]
    about = (
        f"{machine['processor']}, {machine['cores']} cores, float32, Python {machine['python']}, {versions}, commit "
        f"{machine['commit']}; matmul rate {min(rates):.0f} to {max(rates):.0f} GFLOP/s; `{record['command']}`."
    )
    return "\n".join([*lines, "", about])


def memory_table(path: Path) -> str:
    """What programs take of a GPU's memory."""
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = record["settings"]
    lines = ["| program | tokens | arguments, GB | temporary, GB | in all, GB |", "| --- | --: | --: | --: | --: |"]
    for result in record["results"]:
        sizes = " | ".join(f"{result[name] / 1e9:.1f}" for name in ("arguments", "temporaries", "total"))
        lines.append(f"| {result['program']} | {result['tokens']} | {sizes} |")
    about = f"{settings['model']}, {settings['dtype']}, one row, compiled for {GPUS[settings['gpu']].name}; not run."
    return "\n".join([*lines, "", f"{about} {_compiled_with(record)}"])


def kernels_table(path: Path) -> str:
    """Registers, spills and shared memory of every kernel."""
    record = json.loads(path.read_text(encoding="utf-8"))
    gpus = record["settings"]["gpus"]
    rows: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for result in record["results"]:
        for kernel in result["kernels"]:
            # A second launch of the same kernel has a number at its end.
            name = kernel["name"].partition("__")[0].removesuffix("_mosaic_gpu_kernel")
            key = result["backend"], result["operation"], name, result["dtype"], str(result["head_dim"])
            rows.setdefault(key, {}).setdefault(result["gpu"], []).append(kernel)
    lines = [
        "| backend | operation | kernel | type | head dim | "
        + " | ".join(f"registers, {gpu} | spilled bytes | shared KiB" for gpu in gpus)
        + " |",
        "| --- | --- | --- | --- " + "| --: " * (1 + 3 * len(gpus)) + "|",
    ]
    for key, found in rows.items():
        cells = []
        for gpu in gpus:
            if gpu not in found:
                cells += ["", "", ""]
                continue
            most = {
                name: max(use[name] for use in found[gpu]) for name in ("registers", "spill_bytes", "shared_memory")
            }
            cells += [str(most["registers"]), str(most["spill_bytes"]), f"{most['shared_memory'] / 1024:.0f}"]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join([*lines, "", f"The largest of an operation's launches. {_compiled_with(record)}"])


def _compiled_with(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return f"Jax {machine['versions']['jax']}, commit {machine['commit']}; `{record['command']}`."


TABLES: dict[str, tuple[Path, Callable[[Path], str]]] = {
    "bench": (RESULTS / "bench.json", bench_table),
    "recall": (RESULTS / "recall.jsonl", recall_table),
    "recall details": (RESULTS / "recall.jsonl", recall_details),
    "prose": (RESULTS / "recall.jsonl", prose_table),
    "training": (RESULTS / "training.json", training_table),
    "memory": (COMPILED / "memory.json", memory_table),
    "serving": (COMPILED / "serving.json", memory_table),
    "kernels": (COMPILED / "kernels.json", kernels_table),
}


def render(text: str) -> str:
    """The text with every table between its markers made anew."""
    for name, (path, table) in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            if end not in rest:
                raise ValueError(f"{begin.strip()} has no {end} after it: nothing was written")
            after = rest.partition(end)[2]
            text = f"{before}{begin}{table(path)}\n{end}{after}"
    return text


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
