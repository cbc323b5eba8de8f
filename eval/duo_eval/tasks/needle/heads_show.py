"""Tables and figures of `duo eval heads`: distance against head, and the answer token by token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Result, read
from duo_eval.show.curves import Chart, Line, Panel
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import Drawn
from duo_eval.stats.intervals import Estimate, ratio

# Heads in a table and in a figure: those with the largest mean effect.
SHOWN = 12
CITED = "duo eval heads"


def found(scores: dict[str, list[Any]]) -> bool:
    """Whether greedy decoding gives the answer."""
    return all(scores["hits"])


def head_table(path: Path) -> str:
    """The heads with the largest effect, and the needles that each brings back alone."""
    head, results = read(path)
    effects = effects_of(results)
    lost = [result for result in results if result["turned"]]
    rows = []
    for layer, number in largest(effects):
        alone = [turn for result in lost for turn in result["turned"] if turn["heads"] == [[layer, number]]]
        back = f"{sum(map(found, alone))} of {len(alone)}" if alone else ""
        effect = mean(effects[:, layer, number]).format("+.2f")
        rows.append([f"layer {layer}, head {number}", effect, back])
    full, kept = (sum(found(result[name]) for result in results) for name in ("full", "pattern"))
    together = sum(found(result["turned"][-1]) for result in lost)
    note = (
        f"{len(results)} needles: full attention finds {full}, the pattern {kept}. Of the {len(lost)} that only full "
        f"attention finds, turning back the {head['about']['turn_back']} heads with the largest effect on each finds "
        f"{together}. Effect: by how many nats the answer gets likelier per unit of the head's gate, at the pattern; "
        "in brackets 95 % intervals over needles."
    )
    table = rows_to_table(rows, ["streaming head", "effect, nats", "lost needles that it brings back alone"], "lrr")
    return f"{table}\n\n{note}\n{origin(head['runs'], CITED)}\n"


def needle_table(path: Path) -> str:
    """Every needle, from the nearest on: who finds it, and what brings it back."""
    head, results = read(path)
    rows = []
    for result in sorted(results, key=lambda result: result["distance"]):
        alone = [turn["heads"][0] for turn in result["turned"][:-1] if found(turn)]
        names = ", ".join(f"{layer}.{number}" for layer, number in alone)
        marks = ["yes" if found(result[name]) else "no" for name in ("full", "pattern")]
        totals = [f"{sum(result[name]['nll']):.2f}" for name in ("full", "pattern")]
        rows.append([result["job"]["length"], result["distance"], *marks, *totals, names])
    headers = ["tokens", "distance", "full", "pattern", "NLL, full", "NLL, pattern", "found with head (layer.head)"]
    return f"{rows_to_table(rows, headers, 'rrllrrl')}\n\n{origin(head['runs'], CITED)}\n"


def mean(values: Float[np.ndarray, "S"]) -> Estimate:
    """Mean over needles, with Student's interval."""
    return ratio(values, np.ones_like(values))


def effects_of(results: Sequence[Result]) -> Float[np.ndarray, "S L K"]:
    """The effect of every head on every needle."""
    return np.array([result["effect"] for result in results], float)


def largest(effects: Float[np.ndarray, "S L K"]) -> list[tuple[int, int]]:
    """Layer and number of the heads with the largest mean effect."""
    order = np.argsort(-effects.mean(0), axis=None, kind="stable")[:SHOWN]
    return [(int(head) // effects.shape[2], int(head) % effects.shape[2]) for head in order]


def restored_figure(path: Path) -> Iterator[Drawn]:
    """Distance against head: each head's effect on each needle, and which needles are found."""
    from duo_eval.tasks.needle.heads_figure import distance_figure

    _, results = read(path)
    if not results:
        return
    ordered = sorted(results, key=lambda result: result["distance"])
    effects, heads = effects_of(ordered), largest(effects_of(ordered))
    figure = distance_figure(ordered, np.stack([effects[:, layer, number] for layer, number in heads], 1), heads)
    names = ", ".join(f"layer {layer} head {number}" for layer, number in heads[:3])
    yield Drawn("heads", figure, f"Effect of single streaming heads on needles by distance; the largest are {names}.")


def token_figure(path: Path) -> Iterator[Chart]:
    """The answer token by token: teacher forcing sees a loss in the first tokens only."""
    _, results = read(path)
    results = [result for result in results if found(result["full"])]
    if len(results) < 2:
        return
    count = min(len(result["full"]["nll"]) for result in results)
    lines = []
    for name, key in (("full", "full"), ("duo", "pattern")):
        estimates = [mean(np.array([result[key]["nll"][place] for result in results])) for place in range(count)]
        means, low, high = ([getattr(estimate, end) for estimate in estimates] for end in ("mean", "low", "high"))
        lines.append(Line(name, np.arange(1.0, count + 1).tolist(), means, low, high))
    title = f"Answer by token; {len(results)} needles that full attention finds"
    yield Chart("tokens", "", [Panel("", title, lines)], "token of the answer", "negative log-likelihood, nats")
