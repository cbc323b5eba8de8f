"""Tables of the pages, made from committed results: `python -m duo_eval.show.tables` rewrites them."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from duo_eval.aot.compile import gpus_of
from duo_eval.runner.record import origin
from duo_eval.show.efficiency_tables import bench_table
from duo_eval.show.score_table import score_summary, score_table
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.recall_cells import FULL, RANDOM, STREAMING, Cell, Key, full, recall_cells
from duo_eval.stats.scores import NOTHING
from duo_eval.tasks.precision import precision_table
from duo_eval.tasks.short.compare import short_table
from duo_jax.gpus import GPUS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results" / "cpu"
COMPILED = ROOT / "eval" / "results" / "aot"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def recall_table(path: Path) -> str:
    """Token accuracy of held-out passkeys, and that as a percentage of full attention's: recipe by sparsity."""
    head, cells = recall_cells(path)
    if not cells:
        return NOTHING
    lines = []
    for length in sorted({key.length for key in cells}):
        base = cells[full(length)]
        here = {key: cell for key, cell in cells.items() if key.length == length and key.method != FULL}
        sizes = {key[3:] for key in here}
        about = f"Full attention {100 * base.accuracy.mean:.1f}"
        if len(sizes) > 1:
            for method, sparsity in sorted({key[1:3] for key in here}):
                lines += [f"{length} tokens, {method}, {sparsity:.0%} stream:", ""]
                lines += [*_size_rows({key: here[key] for key in here if key[1:3] == (method, sparsity)}, base), ""]
        elif sizes:
            lines += [*_recall_rows(length, here, base), ""]
            streaming = next((cell for key, cell in here.items() if key.method == STREAMING), None)
            about += f", every head streaming {100 * streaming.accuracy.mean:.1f}" if streaming else ""
            about += "; sink {}, recent {}".format(*sizes.pop())
        lines += [f"{about}.\n"]
    return "\n".join([*lines, *_about_recall(head, cells)])


def _recall_rows(length: int, cells: dict[Key, Cell], base: Cell) -> list[str]:
    """One table: methods by sparsities."""
    found = {(key.method, key.sparsity): cell.accuracy for key, cell in cells.items()}
    sparsities = sorted({key.sparsity for key in cells if key.method != STREAMING})
    lines = [
        f"| {length} tokens | " + " | ".join(f"{sparsity:.0%} stream" for sparsity in sparsities) + " |",
        "| --- " + "| --: " * len(sparsities) + "|",
    ]
    # In the order in which they were measured, random patterns last.
    names = dict.fromkeys(key.method for key in cells if key.method not in (STREAMING, RANDOM))
    for method in [*names, *([RANDOM] if any(key.method == RANDOM for key in cells) else [])]:
        row = [
            _of(found[method, sparsity], base.accuracy) if (method, sparsity) in found else ""
            for sparsity in sparsities
        ]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return lines


def _size_rows(cells: dict[Key, Cell], base: Cell) -> list[str]:
    """One table: sinks by windows."""
    found = {key[3:]: cell.accuracy for key, cell in cells.items()}
    windows = sorted({recent for _, recent in found})
    lines = [
        "| sinks | " + " | ".join(f"{recent} recent" for recent in windows) + " |",
        "| --: " * (1 + len(windows)) + "|",
    ]
    for sinks in sorted({sink for sink, _ in found}):
        row = [_of(found[sinks, recent], base.accuracy) if (sinks, recent) in found else "" for recent in windows]
        lines.append(f"| {sinks} | " + " | ".join(row) + " |")
    return lines


def recall_details(path: Path) -> str:
    """Every cell with its intervals, and the paired differences to full attention."""
    _, cells = recall_cells(path)
    lines = [
        "| tokens | method | stream | sink, recent | passkeys | accuracy, % | minus full attention "
        "| NLL, nats a token | minus full |",
        "| --: | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for key, cell in _ordered(cells):
        points = [estimate.scaled(100).format(".1f") for estimate in (cell.accuracy, cell.accuracy_difference)]
        nats = [estimate.format(".3f") for estimate in (cell.nll, cell.nll_difference)]
        values = [points[0], points[1], nats[0], nats[1]]
        sizes = f"{key.sink_size}, {key.recent_size}"
        if key.method == FULL:
            values[1] = values[3] = sizes = ""
        about = f"| {key.length} | {key.method} | {key.sparsity:.0%} | {sizes} | {cell.passkeys} | "
        lines.append(about + " | ".join(values) + " |")
    return "\n".join(lines)


def prose_table(path: Path) -> str:
    """Next-token loss on the text itself."""
    _, cells = recall_cells(path, prose=True)
    if not cells:
        return ""
    lines = ["| method | stream | loss, nats a token | difference to full attention |", "| --- | --: | --: | --: |"]
    for key, cell in _ordered(cells):
        difference = "" if key.method == FULL else cell.nll_difference.format(".3f")
        lines.append(f"| {key.method} | {key.sparsity:.0%} | {cell.nll.format('.3f')} | {difference} |")
    return "\n".join(lines)


def _ordered(cells: dict[Key, Cell]) -> list[tuple[Key, Cell]]:
    """By length and sparsity, then by name."""
    return sorted(cells.items(), key=lambda item: (item[0].length, item[0].sparsity, item[0].method, item[0][3:]))


def _of(accuracy: Estimate, full: Estimate) -> str:
    """In percent, and as a fraction of full attention's."""
    fraction = f" ({accuracy.mean / full.mean:.0%})" if full.mean else ""
    return f"{100 * accuracy.mean:.1f}{fraction}"


def _about_recall(head: dict[str, Any], cells: dict[Key, Cell]) -> list[str]:
    passkeys = sorted({cell.passkeys for cell in cells.values()})
    count = f"{passkeys[0]}" if len(passkeys) == 1 else f"{passkeys[0]} to {passkeys[-1]}"
    return [f"{count} passkeys a cell. {origin(head['runs'], 'duo eval recall')}"]


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
    where = gpus_of(settings["gpu"], settings.get("mesh"))
    about = f"{settings['model']}, {settings['dtype']}, backend {settings['backend']}, {where}; not run."
    return "\n".join([*lines, "", f"{about} {_compiled_with(record)}"])


def plan_table(path: Path) -> str:
    """The longest contexts by plan, and how far the compiler's figure is from the plan's."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| GPU | model | weights, cache | full attention, tokens | plan | duo, tokens | plan |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for cell in record["results"]:
        rows.setdefault((cell["gpu"], cell["model"], cell["dtypes"]), {})[cell["heads"]] = cell
    for key, found in rows.items():
        cells = []
        for heads in ("full", "duo"):
            cell = found.get(heads)
            verified = cell and cell["verified"]
            cells.append(f"{cell['context']:,}" if cell else "")
            cells.append(f"{verified['deviation']:+.2%}" if verified else "not compiled")
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    gpus = {cell["gpu"]: GPUS[cell["gpu"]] for cell in record["results"]}
    usable = ", ".join(f"{gpu.name} {gpu.usable_bytes / 1e9:.2f} GB" for gpu in gpus.values())
    savings = [
        f"{saving['model']} at {saving['context']:,} tokens takes {saving['saving']:.2f} times less than with full "
        f"attention (the paper: {saving['goal']}), and passes the paper's figure at {saving['goal_passed_at']:,}"
        for saving in record["savings"]
    ]
    chunk = record["settings"]["chunk"]
    about = f"Chunks of {chunk} tokens; usable: {usable}. *plan*: the plan's total beside the compiler's; not run."
    decode = f"Decode memory in bfloat16, weights and cache: {'; '.join(savings)}."
    return "\n".join([*lines, "", about, "", decode, "", _compiled_with(record)])


def mesh_table(path: Path) -> str:
    """Large models on several GPUs: bytes of each from the compiler, and what they send each other in a layer."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| GPUs | model | mesh | cache | streaming | tokens | of each, GB | plan | fullest pool, above the mean "
        "| decode, KB a layer | prefill, MB a layer |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for cell in record["results"]:
        found, devices = cell["verified"], math.prod(cell["settings"]["mesh"].values())
        sent = {name: of["collectives"]["bytes_in_a_layer"] for name, of in found["programs"].items()}
        cells = [
            f"{devices} x {cell['gpu']}",
            cell["model"],
            cell["mesh"],
            cell["settings"]["kv_dtype"],
            f"{cell['sparsity'] or 0:.0%}",
            f"{found['context']:,}",
            f"{found['total'] / 1e9:.2f}",
            f"{found['deviation']:+.2%}",
            f"{cell['devices']['imbalance']:.1%}",
            f"{sent['decode'] / 1e3:.1f}",
            f"{sent['prefill'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"Weights and activations in bfloat16, one row, chunks of {record['settings']['chunk']} tokens. *Of each*: "
        "bytes from the compiler; *plan*: the plan beside them; *a layer*: what its collectives give each GPU. Not run."
    )
    return "\n".join([*lines, "", about, "", _compiled_with(record)])


def kernels_table(path: Path) -> str:
    """Registers, spills and shared memory of every kernel."""
    record = json.loads(path.read_text(encoding="utf-8"))
    gpus = record["settings"]["gpus"]
    rows: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for result in record["results"]:
        for kernel in result["kernels"]:
            # A second launch of the same kernel has a number at its end.
            name = kernel["name"].partition("__")[0].removesuffix("_mosaic_gpu_kernel")
            cache = result.get("cache", "same").replace("same", "")
            key = result["backend"], result["operation"], name, result["dtype"], cache, str(result["head_dim"])
            rows.setdefault(key, {}).setdefault(result["gpu"], []).append(kernel)
    lines = [
        "| backend | operation | kernel | type | cache | head dim | "
        + " | ".join(f"registers, {gpu} | spilled bytes | shared KiB" for gpu in gpus)
        + " |",
        "| --- | --- | --- | --- | --- " + "| --: " * (1 + 3 * len(gpus)) + "|",
    ]
    for key, by_gpu in rows.items():
        cells = []
        for gpu in gpus:
            if gpu not in by_gpu:
                cells += ["", "", ""]
                continue
            most = {
                name: max(use[name] for use in by_gpu[gpu]) for name in ("registers", "spill_bytes", "shared_memory")
            }
            cells += [str(most["registers"]), str(most["spill_bytes"]), f"{most['shared_memory'] / 1024:.0f}"]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    note = "The largest of an operation's launches; a cache that is not named has the type of the queries."
    return "\n".join([*lines, "", f"{note} {_compiled_with(record)}"])


def adapter_table(path: Path) -> str:
    """Likelihoods and seconds of lm-eval's requests, beside transformers' own adapter."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| requests | of them | largest difference | to float64, duo | to float64, transformers | seconds, duo "
        "| seconds, transformers | times as fast |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for found in record["results"]:
        seconds, errors = found["seconds"], found.get("errors", {})
        off = " | ".join(f"{errors[name]:.1e}" if name in errors else "" for name in ("duo", "transformers"))
        lines.append(
            f"| {found['kind']} | {found['requests']} | {found['max_difference']:.1e} | {off} | {seconds['duo']:.1f} | "
            f"{seconds['transformers']:.1f} | {found['speedup']:.1f} |"
        )
    about = (
        "In nats, of a whole continuation, the largest over the requests. The first calls, which compile, are left out."
    )
    return "\n".join([*lines, "", f"{about} {origin([record], record['command'])}"])


def suite_table(path: Path) -> str:
    """What `make gpu-suite` measured in one section, case by case."""
    from duo_eval.gpu_suite.worker import SECTIONS

    record = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| measured |", "| --- |"]
    for result in record["results"]:
        section = SECTIONS[path.stem]
        said = result.get("failed") or result.get("cannot") or section.line(result["case"], result)
        lines.append(f"| {said} |")
    return "\n".join([*lines, "", f"{record['device']}, commit {record['machine']['commit']}; `{record['command']}`."])


def harness_table(path: Path) -> str:
    """What lm-eval found, task by task: each metric with its standard error."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| task | shots | n | metric | value | standard error |", "| --- | --: | --: | --- | --: | --: |"]
    for task, metrics in record["results"].items():
        shots, number = record["n-shot"].get(task, ""), record["n-samples"].get(task, {}).get("effective", "")
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                label = metric if filtered in ("", "none") else f"{metric}, {filtered}"
                lines.append(f"| {task} | {shots} | {number} | {label} | {value:.4f} | {shown} |")
    return "\n".join(lines)


def _compiled_with(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return f"Jax {machine['versions']['jax']}, commit {machine['commit']}; `{record['command']}`."


TABLES: dict[str, tuple[Path, Callable[[Path], str]]] = {
    "bench": (RESULTS / "bench.json", bench_table),
    "recall": (RESULTS / "recall.jsonl", recall_table),
    "recall details": (RESULTS / "recall.jsonl", recall_details),
    "windows": (RESULTS / "windows.jsonl", recall_table),
    "windows details": (RESULTS / "windows.jsonl", recall_details),
    "prose": (RESULTS / "recall.jsonl", prose_table),
    "needle": (RESULTS / "needle.jsonl", score_summary),
    "needle, half": (RESULTS / "needle.jsonl", partial(score_summary, budget=0.5)),
    "needle window": (RESULTS / "needle-window.jsonl", score_summary),
    "needle cells": (RESULTS / "needle.jsonl", score_table),
    "ruler": (RESULTS / "ruler.jsonl", score_summary),
    "ruler window": (RESULTS / "ruler-window.jsonl", score_summary),
    "ruler cells": (RESULTS / "ruler.jsonl", score_table),
    "mmlu": (RESULTS / "mmlu.jsonl", short_table),
    "humaneval": (RESULTS / "humaneval.jsonl", short_table),
    "adapter": (RESULTS / "harness.json", adapter_table),
    "training": (RESULTS / "training.json", training_table),
    "memory": (COMPILED / "memory.json", memory_table),
    "shared training": (COMPILED / "training-mesh.json", memory_table),
    "serving": (COMPILED / "serving.json", memory_table),
    "plan": (COMPILED / "plan.json", plan_table),
    "precision": (RESULTS / "precision.jsonl", precision_table),
    "mesh": (COMPILED / "mesh.json", mesh_table),
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
