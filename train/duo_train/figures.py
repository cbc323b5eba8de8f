"""The figures of `duo plot`, drawn with matplotlib: arrays in, `Figure` out. Knows no model, no files and no pyplot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.ticker import MaxNLocator

# A map of more cells than this shows the largest weight of each block: thin stripes would vanish in a mean.
MAP_CELLS = 512
# Sinks, recent window, and what a streaming head does not see; told apart by all kinds of colour vision.
SINKS, WINDOW, REST = "#08519c", "#4292c6", "#d55e00"
TEXT, TAIL, INK = "#e4e4e4", "#b8b8b8", "#222222"


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg, the folder too; the text of the SVG stays text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    figure.savefig(png, dpi=200)
    # The same figure gives the same file: no date, and ids that do not change.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "duo"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def gates_figure(gates: Float[np.ndarray, "L K"], retrieval: Bool[np.ndarray, "L K"] | None, title: str) -> Figure:
    """Gates of every KV head as colour, 0 to 1; where `retrieval` is given, a dot marks each retrieval head."""
    layers, heads = gates.shape
    cell = float(np.clip(8.0 / layers, 0.1, 0.3))
    # Cells are up to twice as high as wide where there are few heads, so that the map is no ribbon.
    high = cell * float(np.clip(1.6 / (heads * cell), 1, 2))
    size = max(layers * cell + 1.45, 4.8), max(heads * high + 1.1, 2.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates.clip(0, 1).T, aspect=high / cell, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    if retrieval is not None:
        x, y = np.nonzero(retrieval)
        # Areas are in square points: a dot takes 45 % of its cell's width.
        axes.scatter(x, y, s=(0.45 * 72 * cell) ** 2, color=REST, edgecolors="white", linewidths=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 5, 8, 10], min_n_ticks=1))
    axes.set(xlabel="layer", ylabel="KV head", xlim=(-0.5, layers - 0.5), ylim=(heads - 0.5, -0.5))
    figure.suptitle(title, fontsize=10, parse_math=False)
    # As high as the map, and a seventh of an inch wide, whatever the map's shape.
    bar = axes.inset_axes((1 + 0.12 / (layers * cell), 0, 0.14 / (layers * cell), 1))
    figure.colorbar(image, cax=bar, label="gate", ticks=[0, 0.5, 1])
    return figure


def curves_figure(metrics: Mapping[str, Float[np.ndarray, "S"]], title: str) -> Figure:
    """Training curves over `metrics["step"]`: losses, gates, learning rate, and what else is numeric; NaN is no point.

    Above 100 steps, losses are drawn thin, and thick as a running mean over 2 % of the steps.
    """
    panels = _panels([name for name in metrics if name not in ("step", "seconds", "tokens")])
    figure = Figure(figsize=(7.5, 0.7 + 1.9 * len(panels)), layout="constrained")
    steps = metrics["step"]
    every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(every, panels.items(), strict=True):
        # Where every gate is 1 the distance to the teacher is rounding alone: on a logarithmic axis it would be all.
        if label == "loss":
            metrics = {**metrics, **{name: _above_rounding(metrics[name]) for name in names}}
        lowest = min((np.nanmin(metrics[name]) for name in names if np.isfinite(metrics[name]).any()), default=0.0)
        logarithmic = label == "loss" and lowest >= 0 and any((metrics[name] > 0).any() for name in names)
        for index, name in enumerate(names):
            drawn = np.isfinite(metrics[name]) & ((metrics[name] > 0) | (not logarithmic))
            style: dict[str, Any] = {
                "color": f"C{index}",
                "label": "above 0.5" if name == "above_half" else name.replace("_", " "),
            }
            _curve(axes, steps[drawn], metrics[name][drawn], style, average=label == "loss")
        if logarithmic:
            axes.set_yscale("log")
        elif label == "gates":
            axes.set_ylim(-0.03, 1.03)
        elif label == "learning rate":
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=9)
    every[-1].set_xlabel("step")
    every[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    every[0].set_title(title, fontsize=10, parse_math=False)
    figure.align_ylabels(every)
    return figure


def _above_rounding(values: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """NaN for values that are nothing beside the largest."""
    largest = np.nanmax(np.abs(values), initial=0.0)
    return np.where(np.abs(values) < 1e-6 * largest, np.nan, values)


def attention_figure(
    weights: Float[np.ndarray, "M T T"], names: Sequence[str], title: str, *, sink_size: int, recent_size: int
) -> Figure:
    """Attention of M heads as maps [queries, keys]; beside each, the mass of its sinks, its window, and the rest.

    The percentages are means over the queries from which a streaming head hides something (paper figure 1).
    """
    count, length, _ = weights.shape
    figure = Figure(figsize=(1.2 + 5.6 * count, 5.2), layout="constrained")
    grid = figure.subplots(1, 2 * count, sharey=True, width_ratios=[4.4, 1] * count, squeeze=False)[0]
    kinds = {"sinks": SINKS, "window": WINDOW, "the rest": REST}
    image: Any = None
    for index, name in enumerate(names):
        axes, beside = grid[2 * index], grid[2 * index + 1]
        pooled = _pooled(weights[index])
        # Pooled rows and columns may reach beyond the text: the picture is as large as they are.
        edge = len(pooled) * -(-length // MAP_CELLS) - 0.5
        image = axes.imshow(
            pooled,
            norm=LogNorm(1e-4, 1, clip=True),
            cmap="magma_r",
            extent=(-0.5, edge, edge, -0.5),
            aspect="auto",
            interpolation="nearest",
        )
        _borders(axes, length, sink_size, recent_size)
        axes.set(xlabel="key position", xlim=(-0.5, length - 0.5), ylim=(length - 0.5, -0.5))
        axes.set_ylabel("query position" if index == 0 else "")
        axes.set_title(name, fontsize=10, parse_math=False)
        shares = attention_shares(weights[index], sink_size=sink_size, recent_size=recent_size)
        means = shares[sink_size + recent_size :].mean(0)
        for row, ((kind, colour), mean) in enumerate(zip(kinds.items(), means, strict=True)):
            place = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 10, "weight": "bold"}
            axes.text(0.98, 0.97 - 0.065 * row, f"{kind} {mean:.1%}", color=colour, **place)
        _flow(beside, shares, list(kinds.values()))
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=list(grid), label="attention weight", pad=0.02, aspect=30)
    return figure


def attention_shares(
    weights: Float[np.ndarray, "T T"], *, sink_size: int, recent_size: int
) -> Float[np.ndarray, "T 3"]:
    """Mass of each query's attention on sinks, on the recent window without them, and on the rest."""
    q, k = np.arange(len(weights))[:, None], np.arange(len(weights))[None, :]
    sink, recent = k < sink_size, k > q - recent_size
    kinds = (sink, ~sink & recent, ~sink & ~recent)
    return np.stack([(weights * kind).sum(1) for kind in kinds], axis=1)


@dataclass(frozen=True)
class Passkey:
    """One passkey of a sample: where it is hidden and where it is answered (begin and end in tokens), and the words."""

    hidden: tuple[int, int]
    answered: tuple[int, int]
    needle: str
    answer: str


def sample_figure(labels: Bool[np.ndarray, "T"], tail: int, passkeys: Sequence[Passkey], title: str) -> Figure:
    """A training sample: where passkeys lie, the questions and answers from token `tail` on, and the words."""
    rows = len(passkeys)
    heights = [1.1, 1.1, 0.26 * (rows + 1)]
    figure = Figure(figsize=(11, sum(heights) + 1.5), layout="constrained")
    whole, zoom, words = figure.subplots(3, height_ratios=heights)
    colours = _colours(rows)
    total = len(labels)
    _strip(whole, [((0, tail), TEXT), ((tail, total), TAIL)], (0, total))
    middles = [sum(passkey.hidden) / 2 for passkey in passkeys]
    for index, at in enumerate(_spread(middles, 0.022 * total, 0.005 * total, 0.995 * total)):
        begin, end = passkeys[index].hidden
        # The edge keeps a needle of 40 tokens visible among 32,000.
        whole.add_patch(Rectangle((begin, 0), end - begin, 1, color=colours[index], linewidth=1.2))
        whole.plot([middles[index], at], [1.06, 1.25], color=colours[index], linewidth=0.8)
        whole.text(at, 1.28, str(index + 1), color=colours[index], ha="center", va="bottom", weight="bold")
    # Above the strip, so that no label lies on the lines to the tail below.
    whole.xaxis.tick_top()
    whole.spines["top"].set_visible(True)
    whole.set(ylim=(0, 1.75))
    whole.set_ylabel("sample", rotation=0, ha="right", va="center", y=0.29)
    figure.suptitle(title, fontsize=10, parse_math=False)
    _strip(zoom, [((tail, total), TAIL)], (tail, total))
    for colour, number, passkey in zip(colours, range(1, rows + 1), passkeys, strict=True):
        begin, end = passkey.answered
        zoom.add_patch(Rectangle((begin, 0), end - begin, 1, color=colour, linewidth=0))
        zoom.text((begin + end) / 2, 0.46, str(number), color="white", ha="center", va="center", weight="bold")
    for begin, end in _runs(labels):
        zoom.add_patch(Rectangle((max(begin, tail), -0.35), end - max(begin, tail), 0.2, color=INK, linewidth=0))
    zoom.set(ylim=(-0.4, 1.3), xlabel="token")
    zoom.set_ylabel("its tail", rotation=0, ha="right", va="center", y=0.53)
    for corner in (tail, total):
        ends = {"coordsA": "data", "coordsB": "data", "axesA": whole, "axesB": zoom}
        figure.add_artist(ConnectionPatch((corner, 0), (corner, 1), color=TAIL, linewidth=0.8, **ends))
    kinds = {
        TEXT: "text",
        colours[0]: "passkey, hidden in the text and asked for in the tail",
        TAIL: "questions",
        INK: f"labels: {labels.sum():,} of {total:,} tokens",
    }
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in kinds]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.4), "ncols": 4, "frameon": False, "fontsize": 9}
    zoom.legend(handles, list(kinds.values()), **place)
    _words(words, passkeys, colours)
    return figure


def shortened(text: str, limit: int) -> str:
    """One line of at most `limit` characters; of a longer text its begin and its end in whole words, with … between."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    first = text[: 3 * limit // 4].rpartition(" ")[0] or text[: 3 * limit // 4]
    last = text[len(first) - limit + 3 :]
    return f"{first} … {last.partition(' ')[2] or last}"


def _panels(names: list[str]) -> dict[str, list[str]]:
    """Which curves share a panel; panels without curves are left out."""
    kinds = {
        "loss": ("loss", "distillation", "next_token", "regularization"),
        "gates": ("mean_gate", "above_half", "sparsity", "target_sparsity"),
        "learning rate": tuple(name for name in names if "learning_rate" in name),
    }
    known = {name for kind in kinds.values() for name in kind}
    panels = {label: [name for name in kind if name in names] for label, kind in kinds.items()}
    panels["other"] = [name for name in names if name not in known]
    return {label: found for label, found in panels.items() if found}


def _curve(
    axes: Axes, steps: Float[np.ndarray, "S"], values: Float[np.ndarray, "S"], style: dict[str, Any], *, average: bool
) -> None:
    width = len(values) // 50
    if average and width >= 2:
        axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.3)
        steps, values = (np.convolve(line, np.full(width, 1 / width), "valid") for line in (steps, values))
    axes.plot(steps, values, linewidth=1.5, marker="o" if len(values) < 30 else None, markersize=3, **style)


def _pooled(weights: Float[np.ndarray, "T T"]) -> Float[np.ndarray, "P P"]:
    """At most `MAP_CELLS` rows and columns, each cell the largest weight of its block; NaN above the diagonal."""
    length = len(weights)
    block = -(-length // MAP_CELLS)
    padding = -length % block
    blocks = np.pad(weights, (0, padding)).reshape((length + padding) // block, block, -1, block)
    pooled = blocks.max((1, 3))
    pooled[np.triu_indices(len(pooled), 1)] = np.nan
    return pooled


def _borders(axes: Axes, length: int, sink_size: int, recent_size: int) -> None:
    """The edge of the sinks and of the window, where they hide keys."""
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
    corner = sink_size + recent_size - 0.5
    axes.plot([sink_size - 0.5] * 2, [corner, length - 0.5], **line)
    axes.plot([sink_size - 0.5, length - recent_size - 0.5], [corner, length - 0.5], **line)


def _flow(axes: Axes, shares: Float[np.ndarray, "T 3"], colours: Sequence[str]) -> None:
    """Each query's mass in percent, stacked from the left; the mean of neighbouring queries, at most 64 rows."""
    rows = np.array_split(np.arange(len(shares)), min(64, len(shares)))
    edges = np.array([row[0] for row in rows] + [len(shares)]) - 0.5
    means = np.stack([shares[row].mean(0) for row in rows]) * 100
    left = np.zeros(len(rows))
    for kind, colour in enumerate(colours):
        axes.barh(edges[:-1], means[:, kind], np.diff(edges), left=left, align="edge", color=colour, linewidth=0)
        left += means[:, kind]
    axes.set(xlim=(0, 100), xticks=[0, 50, 100], xlabel="mass in %")
    axes.tick_params(left=False)


def _colours(count: int) -> list[Any]:
    """Colours dark enough for white text on them and for text on white, in the order of the rainbow."""
    shades = colormaps["turbo"](np.linspace(0.03, 0.97, max(count, 2)))[:, :3]
    brightness = shades @ np.array([0.299, 0.587, 0.114])
    return [tuple(shade) for shade in shades * np.minimum(1, 0.5 / brightness)[:, None]][:count]


def _strip(axes: Axes, stretches: Sequence[tuple[tuple[int, int], str]], limits: tuple[int, int]) -> None:
    for (begin, end), colour in stretches:
        axes.add_patch(Rectangle((begin, 0), end - begin, 1, color=colour, linewidth=0))
    axes.set(xlim=limits, ylim=(0, 1), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, prune=None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "left", "right", "bottom"]].set_visible(False)


def _spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places moved as little as needed to lie at least `gap` apart between `low` and `high`."""
    places = list(places)
    for index, place in enumerate(places):
        places[index] = max(place, places[index - 1] + gap if index else low)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], places[index + 1] - gap if index + 1 < len(places) else high)
    return places


def _runs(labels: Bool[np.ndarray, "T"]) -> list[tuple[int, int]]:
    """Begin and end of every run of True."""
    changes = np.flatnonzero(np.diff(np.pad(labels, 1).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in changes.reshape(-1, 2)]


def _words(axes: Axes, passkeys: Sequence[Passkey], colours: Sequence[Any]) -> None:
    """A row for each passkey: number, where it is hidden and the sentence, where it is answered and the words."""
    axes.set(xlim=(0, 1), ylim=(len(passkeys) + 0.5, -0.5))
    axes.set_axis_off()
    columns = (0.0, 0.08, 0.095, 0.675, 0.69)
    sides = ("left", "right", "left", "right", "left")
    for x, side, head in zip(columns, sides, ("", "token", "hidden", "token", "asked for"), strict=True):
        axes.text(x, 0, head, ha=side, va="center", weight="bold", fontsize=9)
    for row, (passkey, colour) in enumerate(zip(passkeys, colours, strict=True), 1):
        needle, answer = shortened(passkey.needle, 72), shortened(passkey.answer, 42)
        cells = (str(row), f"{passkey.hidden[0]:,}", needle, f"{passkey.answered[0]:,}", answer)
        for x, side, cell in zip(columns, sides, cells, strict=True):
            shown = axes.text(x, row, cell, ha=side, va="center", color=colour, fontsize=9, parse_math=False)
            shown.set_fontweight("normal" if x else "bold")
            if cell is needle:
                # Characters of an unusual width are cut off where the next column begins.
                shown.set_clip_path(Rectangle((x, row - 0.5), 0.535, 1, transform=axes.transData))
