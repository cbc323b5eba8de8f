"""Results as curves: accuracy against KV budget and sizes, time and memory against context. Reads; `figures` draws.

A figure comes with what it shows in words, for those who do not see it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from duo_train.figures import curves_figure, gates_figure
from duo_train.plot import read_metrics
from duo_train.recipes.base import METRICS_FILE

from duo_eval.runner.ledger import read
from duo_eval.show.efficiency_tables import engine, place
from duo_eval.show.figures import Line, lines_figure
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.recall_cells import FULL as FULL_ATTENTION
from duo_eval.stats.recall_cells import Cell, Key, full, recall_cells
from duo_eval.stats.scores import FULL, Record, by_method, mean, question_of, scored, shared
from duo_jax import HeadPattern

# Lengths of text, each with a figure of its own; more are shown by one figure.
FEW = 4


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, its name (letters, digits and dashes), and what it shows."""

    name: str
    figure: Any
    alt: str


def file_name(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"\W+", "-", text).strip("-")


def recall_curves(path: Path) -> Iterator[Drawn]:
    """Accuracy against KV budget; where sizes were compared, against those too (paper's ablations, section 3.5)."""
    _, cells = recall_cells(path)
    for length in sorted({key.length for key in cells}):
        here = {key: cell for key, cell in cells.items() if key.length == length and key.method != FULL_ATTENTION}
        about: dict[str, Any] = {
            "y": "token accuracy, %",
            "level": _level(FULL_ATTENTION, cells[full(length)].accuracy),
        }
        if len({key[3:] for key in here}) > 1:
            yield from _against_sizes(length, here, about)
        elif here:
            lines = _lines(here, lambda key: key.method, lambda key: 100 * key.kv_fraction)
            x = "KV tokens kept, % of full attention's"
            yield _drawn(f"budget-{length}", lines, title=f"Recall at {length:,} tokens", x=x, **about)


def _against_sizes(length: int, cells: dict[Key, Cell], about: dict[str, Any]) -> Iterator[Drawn]:
    """For each method and sparsity: accuracy against the window, a curve for each number of sinks."""
    for method, sparsity in sorted({key[1:3] for key in cells}):
        here = {key: cell for key, cell in cells.items() if key[1:3] == (method, sparsity)}
        lines = _lines(here, lambda key: f"{key.sink_size} sinks", lambda key: float(key.recent_size))
        lines.sort(key=lambda line: int(line.name.split()[0]))
        title = f"Recall at {length:,} tokens: {method}, {sparsity:.0%} stream"
        name = f"sizes-{length}-{method}-{round(100 * sparsity)}"
        yield _drawn(name, lines, title=title, x="recent tokens", x_is_tokens=True, **about)


def score_curves(path: Path) -> Iterator[Drawn]:
    """Scores against the KV bytes really held, all methods in one figure; of a few lengths, one each.

    Over the questions that all of a figure's methods have a score for.
    """
    having = [record for record in scored(read(path)[1]) if "held_bytes" in record]
    lengths = sorted({record["job"].get("length", 0) for record in having})
    each = len(lengths) <= FEW
    for length in lengths if each else [0]:
        here = shared(record for record in having if not each or record["job"].get("length", 0) == length)
        if here:
            suffix, title = (f"-{length}", f" at {length:,} tokens") if each and length else ("", "")
            yield _scores(f"score{suffix}", f"Score{title}", here)


def _scores(name: str, title: str, records: Sequence[Record]) -> Drawn:
    """A curve for each method; where full attention was not asked, the budget stands for what was held."""
    whole = {question_of(record): record["held_bytes"] for record in records if record["job"]["method"] == FULL}
    groups = by_method(records)

    def kept(record: Record) -> float:
        asked = question_of(record)
        return 100 * (record["held_bytes"] / whole[asked] if asked in whole else record["job"]["budget"])

    lines = []
    for method in dict.fromkeys(key[0] for key in groups):
        mine = [found for key, found in groups.items() if key[0] == method]
        x = [float(np.mean([kept(record) for record in found])) for found in mine]
        lines.append(_line(method, x, [mean(found) for found in mine]))
    return _drawn(name, lines, title=title, x="KV held, % of full attention's", y="score, %")


def efficiency_curves(path: Path) -> Iterator[Drawn]:
    """Prefill, decode and memory against context length, this library's floors dashed."""
    record = json.loads(path.read_text(encoding="utf-8"))
    done = [result for result in record["results"] if "cannot" not in result]
    for model, batch in dict.fromkeys(place(result)[:2] for result in done):
        here = [result for result in done if place(result)[:2] == (model, batch)]
        for name, field, floor, unit, scale in (
            ("prefill", "prefill_seconds", "prefill_floor_seconds", "seconds", 1.0),
            ("decode", "decode_ms", "decode_floor_ms", "ms a token", 1.0),
            ("memory", "peak_memory_bytes", None, "GB", 1e-9),
        ):
            lines = _against_context(here, field, floor, scale)
            title = f"{name.capitalize()}: {model}, batch {batch}"
            yield _drawn(f"{name}-{model}-{batch}", lines, title=title, x="tokens of context", y=unit, x_is_tokens=True)


def _against_context(results: list[dict[str, Any]], field: str, floor: str | None, scale: float) -> list[Line]:
    """A curve for each engine and chunk size; floors are the same for all chunk sizes, and drawn once."""
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((engine(result), place(result)[3]), []).append(result)
    lines, with_floor = [], set()
    for (label, chunk), found in groups.items():
        x = [float(result["point"]["context"]) for result in found]
        shown = label if chunk is None else f"{label}, chunks of {chunk}"
        lines.append(Line(shown, x, [float(scale * result[field]) for result in found]))
        is_ours = all(result["point"]["engine"] == "duo" and floor in result for result in found)
        if floor is not None and is_ours and label not in with_floor:
            with_floor.add(label)
            lines.append(Line(f"{label}: floor", x, [float(result[floor]) for result in found], is_floor=True))
    return lines


def pattern_figures(folder: Path) -> Iterator[Drawn]:
    """Gates of a pattern, and how training went where it says so."""
    pattern = HeadPattern.load(folder)
    gates = pattern.gates.clip(0, 1)
    about = f"{pattern.num_layers} layers × {pattern.num_kv_heads} KV heads"
    title = f"{about}\n{(gates > 0.5).sum()} of {gates.size} gates above 0.5, mean {gates.mean():.2f}"
    alt = f"Gates of {folder.name}: {title}".replace("\n", ", ")
    yield Drawn("gates", gates_figure(pattern.gates, None, title), f"{alt}.")
    if (folder / METRICS_FILE).exists():
        metrics = read_metrics(folder / METRICS_FILE)
        ends = "; ".join(f"{name} {values[0]:.3g} to {values[-1]:.3g}" for name, values in metrics.items())
        title = f"{folder.name}, up to step {metrics['step'].max():,.0f}"
        yield Drawn("training", curves_figure(metrics, title), f"Training of {title}: {ends}.")


def _lines(cells: dict[Key, Cell], name: Callable[[Key], str], x: Callable[[Key], float]) -> list[Line]:
    """A curve for each name."""
    groups: dict[str, list[Key]] = {}
    for key in cells:
        groups.setdefault(name(key), []).append(key)
    return [
        _line(label, [x(key) for key in keys], [cells[key].accuracy for key in keys]) for label, keys in groups.items()
    ]


def _line(name: str, x: list[float], found: list[Estimate]) -> Line:
    """In percent; an interval of one sample alone has no ends."""
    found = [estimate.scaled(100) for estimate in found]
    ends = [np.array([getattr(estimate, end) for estimate in found]) for end in ("mean", "low", "high")]
    return Line(name, x, *(np.where(np.isfinite(values), values, ends[0]).tolist() for values in ends))


def _level(name: str, found: Estimate) -> Line:
    return _line(name, [0.0], [found])


def _drawn(
    name: str, lines: list[Line], *, title: str, x: str, y: str, level: Line | None = None, x_is_tokens: bool = False
) -> Drawn:
    """The figure, and its first and last points in words."""
    said = [f"{level.name} {level.y[0]:.3g}"] if level else []
    for line in lines:
        order = np.argsort(line.x)
        ends = [f"{line.y[index]:.3g} at {line.x[index]:.4g}" for index in dict.fromkeys((order[0], order[-1]))]
        said.append(f"{line.name} {' to '.join(ends)}")
    alt = f"{title}: {y}, against {x}. {'; '.join(said)}."
    return Drawn(file_name(name), lines_figure(lines, title=title, x=x, y=y, level=level, x_is_tokens=x_is_tokens), alt)
