"""The paper's numbers (arXiv 2410.10819v1) next to ours, made from all committed results; what is missing is named.

Knows the names of the result files. The paper's memory and times at single points are in `duo_eval.aot.paper`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duo_eval.aot.context import MODELS, planned
from duo_eval.aot.paper import GPU, Point, totals
from duo_eval.runner.provenance import host
from duo_eval.runner.record import read
from duo_eval.show.markdown import rows_to_table
from duo_eval.speed.efficiency_results import PHASES, engine_name
from duo_eval.speed.roofline import decode_bytes, prefill_flops
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.recall_cells import full as full_cell
from duo_eval.stats.recall_cells import recall_cells
from duo_eval.stats.scores import FULL, Record, grouped, mean, scored, shared
from duo_jax.pattern.pattern import HeadPattern
from pallas_kernels.gpus import GPUS

NO_GPU = "not measured: no GPU"
# Dense bfloat16 of an A100, from its data sheet.
FLOPS = 312e12
BUDGETS = (0.25, 0.5)
# Files of `eval/results`: by task, and what each is called.
NEEDLE, RULER, RECALL = "cpu/needle.jsonl", "cpu/ruler.jsonl", "cpu/recall.jsonl"
MMLU, HUMANEVAL, BENCH = "cpu/mmlu.jsonl", "cpu/humaneval.jsonl", "cpu/bench.json"
CONTEXTS, POINTS = "aot/plan.json", "aot/paper.json"
# The pattern of each task, as its results name it.
SHIPPED, SHORT = "duo", "0.5 32/128"


def paper_latency(results: Path) -> str:
    """The paper's times next to the least time that the bytes or operations of each program take on the same GPU."""
    rows = []
    for point in totals(results / POINTS):
        unit, scale = ("ms", 1000) if point.phase == "decode" else ("s", 1)
        theirs = [scale * seconds for seconds in point.seconds]
        bound = [scale * seconds for seconds in least(point)]
        what = point.phase if point.chunk == 1 else f"{point.phase}, chunks of {point.chunk:,}"
        row = [what, point.model, f"{point.context:,}", f"{theirs[0]:.0f} → {theirs[1]:.0f} {unit}", _times(theirs)]
        rows.append([*row, f"{bound[0]:.0f} → {bound[1]:.0f} {unit}", _times(bound), NO_GPU])
    headers = ["program", "model", "tokens", "paper, measured", "faster", "least, modelled", "could be", "duo-jax"]
    gpu = GPUS[GPU]
    note = (
        f"Full attention → DuoAttention on {gpu.name}. *Least*: bytes of a decode step at {gpu.bandwidth / 1e12:.2f} "
        f"TB/s, operations of a prefill at {FLOPS / 1e12:.0f} TFLOP/s (data sheet); no program can be faster."
    )
    return f"{rows_to_table(rows, headers, 'llr')}\n\n{note}"


def paper_cpu(results: Path) -> str:
    """How much faster half of the heads made a small model on a CPU: measured, another model than the paper's."""
    head, points = read(results / BENCH)
    rows = []
    for (batch, context), pair in _pairs(points).items():
        row = [f"{batch}", f"{context:,}"]
        for time, _, _, spec in PHASES:
            row += [f"{pair[0][time]:{spec}} → {pair[1][time]:{spec}}", _times([each[time] for each in pair])]
        rows.append(row)
    headers = ["batch", "tokens", "prefill, s", "faster", "decode step, ms", "faster"]
    run = head["runs"][-1]
    note = f"Full attention → half of the KV heads stream, medians; SmolLM2-135M in float32, {host(run['machine'])}"
    return f"{rows_to_table(rows, headers, 'r')}\n\n{note}, commit {run['machine']['commit']}; `{run['command']}`."


def paper_accuracy(results: Path) -> str:
    """The paper's accuracy next to ours: another model, 60 to 500 times smaller, so compare the loss, not the score."""
    none = "not in the paper"
    rows = [
        ("needle, up to 1,048,000 tokens", "Llama-3-8B-1048K", "no loss in its figure", "", "not measured", "", ""),
        *_scores(results / NEEDLE, "needles found", SHIPPED, none),
        *_scores(results / RULER, f"RULER, {_tasks(results / RULER)} tasks", SHIPPED, none),
        *_recall(results / RECALL, none),
        ("LongBench, 21 tasks", "Llama-3-8B-1048K", "40.08 → 40.21", "", "not measured", "", ""),
        ("MMLU", "Llama-3-70B", "79.38 → 79.35", *_short(results / MMLU)),
        ("MBPP", "Llama-3-70B", "47.85 → 47.09", "", "not measured", "", ""),
        ("HumanEval", none, "", *_short(results / HUMANEVAL)),
        ("MT-Bench", "Llama-3-70B", "8.93 → 9.14", "", "not measured", "", ""),
    ]
    headers = ["task", "paper: model", "full → 50 %", "duo-jax: n", "full attention", "25 % of the bytes", "50 %"]
    files = (NEEDLE, RULER, RECALL, MMLU, HUMANEVAL)
    commits = "; ".join(f"`{Path(name).name}` {', '.join(_commits(results / name))}" for name in files)
    note = (
        "Ours: SmolLM2-135M-Instruct in float32 on a CPU, its shipped pattern (MMLU and HumanEval: that of version "
        "0.1); scores in percent with 95 % intervals. "
        "Needles and RULER by the bytes held; recall, MMLU and HumanEval by the fraction of heads that stream (75 and "
        f"50 %), which leaves more bytes in short texts. Commits: {commits}."
    )
    return f"{rows_to_table(rows, headers, 'lllrrrr')}\n\n{note}"


def paper_short(results: Path) -> str:
    """The most important rows, for a front page."""
    memory, pairs = totals(results / POINTS), _pairs(read(results / BENCH)[1])
    single = {context: pair for (batch, context), pair in pairs.items() if batch == 1}
    on_cpu = f"SmolLM2-135M on a CPU, {min(single):,} to {max(single):,} tokens: {{}}".format
    cpu = {time: _range([pair[0][time] / pair[1][time] for pair in single.values()]) for time, *_ in PHASES}
    needles = "; ".join(
        f"{length:,} tokens: {_count(groups[FULL, 1.0])} → {_count(groups[SHIPPED, 0.5])} of {len(groups[FULL, 1.0])}"
        for length, groups in _by_length(scored(read(results / NEEDLE)[1])).items()
        if (SHIPPED, 0.5) in groups
    )
    count, full, _, half = _short(results / MMLU)
    mmlu = f"{full.split()[0]} → {half.split()[0]}, SmolLM2-135M, n = {count}"
    rows = [
        _memory_row(memory, "llama-3-8b", "Llama-3-8B, half of the heads stream"),
        _memory_row(memory, "llama-2-7b", "Llama-2-7B, three quarters stream"),
        _context_row(results, "full attention", "0.52M", ("llama-3-8b", "bf16", "full")),
        _context_row(results, "half stream, 8-bit weights, 4-bit cache", "3.30M", ("llama-3-8b", "W8 KV4", "duo")),
        [
            "decode time, Llama-3-8B / Llama-2-7B",
            "1.50x / 2.18x faster",
            f"{NO_GPU}; {on_cpu(cpu['decode_ms'])}",
        ],
        [
            "prefill time, Llama-3-8B / Llama-2-7B",
            "1.63x / 1.73x faster",
            f"{NO_GPU}; {on_cpu(cpu['prefill_seconds'])}",
        ],
        ["needles found with half of the bytes", "Llama-3-8B: no loss up to 1,048K tokens", f"SmolLM2-135M, {needles}"],
        ["LongBench, half of the heads stream", "40.08 → 40.21, Llama-3-8B", "not measured"],
        ["MMLU, half of the heads stream", "79.38 → 79.35, Llama-3-70B", mmlu],
    ]
    return rows_to_table(rows, ["full attention → DuoAttention", "paper", "duo-jax"], "l")


def least(point: Point) -> list[float]:
    """Seconds that reading the bytes, or computing the operations, takes at the least: full attention, then duo."""
    seconds = []
    for is_duo in (False, True):
        plan = planned(point.model, "bf16", is_duo, point.chunk)
        pattern = plan.pattern or HeadPattern.full(plan.config)
        if point.phase == "decode":
            count = decode_bytes(plan.config, pattern, batch_size=1, length=point.context, itemsize=2)
            seconds.append(count / GPUS[GPU].bandwidth)
        else:
            seconds.append(prefill_flops(plan.config, pattern, batch_size=1, length=point.context) / FLOPS)
    return seconds


def _memory_row(memory: dict[Point, tuple[int, int]], model: str, words: str) -> list[str]:
    """The saving in decode memory at the paper's longest context."""
    point = max(
        (point for point in memory if point.model == model and point.phase == "decode"), key=lambda p: p.context
    )
    _, context, goal = MODELS[model]
    assert point.context == context
    return [f"decode memory, {words}, {context:,} tokens", f"{goal:.2f}x smaller", f"{_times(memory[point])}, compiled"]


def _context_row(results: Path, words: str, paper: str, key: tuple[str, str, str]) -> list[str]:
    """The longest context of one setting."""
    for cell in read(results / CONTEXTS)[1]:
        if key == (cell["model"], cell["dtypes"], cell["heads"]):
            how = "compiled" if cell["verified"] else "planned"
            what = f"longest context, Llama-3-8B on 80 GB, {words}"
            return [what, f"{paper} tokens", f"{cell['context'] / 1e6:.2f}M, {how}"]
    raise ValueError(f"{results / CONTEXTS} has no {key}")


def _times(pair: Sequence[float | int]) -> str:
    return f"{pair[0] / pair[1]:.2f}x"


def _range(factors: Sequence[float]) -> str:
    return f"{min(factors):.2f}x to {max(factors):.2f}x"


def _pairs(points: Sequence[dict[str, Any]]) -> dict[tuple[int, int], tuple[Any, Any]]:
    """Results of full attention and of half of the heads, by batch and context."""
    by_engine: dict[tuple[int, int], dict[str, Any]] = {}
    for result in points:
        place = result["point"]["batch_size"], result["point"]["context"]
        by_engine.setdefault(place, {})[engine_name(result)] = result
    return {place: (each["full"], each["50% streaming"]) for place, each in sorted(by_engine.items())}


def _by_length(records: Sequence[Record]) -> dict[int, dict[tuple[Any, ...], list[Record]]]:
    """Records of each length by method and budget, over the questions that full attention and duo were both asked."""
    compared = [r for r in records if r["job"]["method"] in (FULL, SHIPPED) and r["job"]["budget"] in (1.0, *BUDGETS)]
    lengths = sorted({record["job"]["length"] for record in compared})
    return {
        length: grouped(shared(r for r in compared if r["job"]["length"] == length), "method", "budget")
        for length in lengths
    }


def _scores(path: Path, name: str, method: str, paper: str) -> list[tuple[str, ...]]:
    """A row for each length."""
    rows = []
    for length, groups in _by_length(scored(read(path)[1])).items():
        full = groups[FULL, 1.0]
        cells = [
            _percent(mean(groups[method, budget])) if (method, budget) in groups else "not measured"
            for budget in BUDGETS
        ]
        rows.append((f"{name}, {length:,} tokens", paper, "", str(len(full)), _percent(mean(full)), *cells))
    return rows


def _tasks(path: Path) -> int:
    """How many tasks a file has scores of."""
    return len({record["job"]["task"] for record in scored(read(path)[1])})


def _recall(path: Path, paper: str) -> list[tuple[str, ...]]:
    """A row for each length: token accuracy of passkeys, which are scored under teacher forcing."""
    _, cells = recall_cells(path)
    rows = []
    for length in sorted({key.length for key in cells}):
        own = {key.sparsity: cell for key, cell in cells.items() if key.length == length and key.method == SHIPPED}
        full = cells[full_cell(length)]
        values = [_percent(own[1 - budget].accuracy) if 1 - budget in own else "not measured" for budget in BUDGETS]
        count = f"{full.passkeys} passkeys"
        rows.append((f"recall, {length:,} tokens", paper, "", count, _percent(full.accuracy), *values))
    return rows


def _short(path: Path) -> tuple[str, str, str, str]:
    """Number of items, full attention's score, nothing, and the score with half of the heads streaming."""
    right: dict[str, dict[str, bool]] = {}
    for result in read(path)[1]:
        if "correct" in result:
            right.setdefault(result["job"]["method"], {})[result["job"]["item"]] = result["correct"]
    items = right[FULL].keys() & right[SHORT].keys()
    full, half = (
        _percent(mean([{"job": {}, "score": float(right[method][item])} for item in sorted(items)]))
        for method in (FULL, SHORT)
    )
    return str(len(items)), full, "not measured", half


def _percent(estimate: Estimate) -> str:
    return estimate.scaled(100).format(".1f")


def _count(records: Sequence[Record]) -> int:
    return round(sum(record["score"] for record in records))


def _commits(path: Path) -> list[str]:
    return list(dict.fromkeys(run["machine"]["commit"] for run in read(path)[0]["runs"]))
