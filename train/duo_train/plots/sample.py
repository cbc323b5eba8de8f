"""A training sample: where its passkeys are hidden and where they are asked for (paper figure 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.ticker import MaxNLocator

TEXT, TAIL, INK = "#e4e4e4", "#b8b8b8", "#222222"


@dataclass(frozen=True)
class Passkey:
    """One passkey of a sample: begin and end, in tokens, of its hidden sentence and of its answer, and their text."""

    hidden: tuple[int, int]
    answered: tuple[int, int]
    needle: str
    answer: str


def sample_figure(labels: Bool[np.ndarray, "T"], tail: int, passkeys: Sequence[Passkey], title: str) -> Figure:
    """A training sample: positions of its passkeys, questions and answers (from token `tail`), and the words."""
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
        # The line width keeps a needle of 40 tokens visible among 32,000.
        whole.add_patch(Rectangle((begin, 0), end - begin, 1, color=colours[index], linewidth=1.2))
        whole.plot([middles[index], at], [1.06, 1.25], color=colours[index], linewidth=0.8)
        whole.text(at, 1.28, str(index + 1), color=colours[index], ha="center", va="bottom", weight="bold")
    # Ticks above the strip, clear of the lines to the tail below.
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
    """The text as one line; beyond `limit` characters, the first and last whole words with … between."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    first = text[: 3 * limit // 4].rpartition(" ")[0] or text[: 3 * limit // 4]
    last = text[len(first) - limit + 3 :]
    return f"{first} … {last.partition(' ')[2] or last}"


def _colours(count: int) -> list[Any]:
    """Rainbow colours that are dark enough for white text on them and for coloured text on white."""
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
    """Ascending positions, moved to be at least `gap` apart and between `low` and `high`."""
    places = list(places)
    for index, place in enumerate(places):
        places[index] = max(place, places[index - 1] + gap if index else low)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], places[index + 1] - gap if index + 1 < len(places) else high)
    return places


def _runs(labels: Bool[np.ndarray, "T"]) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    changes = np.flatnonzero(np.diff(np.pad(labels, 1).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in changes.reshape(-1, 2)]


def _words(axes: Axes, passkeys: Sequence[Passkey], colours: Sequence[Any]) -> None:
    """A row per passkey: number, position and text of the hidden sentence, position and words of the answer."""
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
                # Clip wide characters at the start of the next column.
                shown.set_clip_path(Rectangle((x, row - 0.5), 0.535, 1, transform=axes.transData))
