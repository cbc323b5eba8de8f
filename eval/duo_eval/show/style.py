"""How a method looks in a figure: one colour and one marker, the same in every figure. Knows no matplotlib."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Line patterns of matplotlib for lines of one method; dashes are for floors, dots for the level of full attention.
PATTERNS = ("-", "-.", (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Style:
    """A colour, a marker, and the pattern of a line, all as matplotlib names them."""

    colour: str
    marker: str
    pattern: str | tuple[int, tuple[int, ...]] = PATTERNS[0]


# Distinguishable with any kind of colour vision, on white and on black; the colours of methods that appear together are
# furthest apart. Retrieval heads and full attention are blue, streaming heads and DuoAttention are orange.
STYLES: Mapping[str, Style] = {
    "full": Style("#0072b2", "o"),
    "duo": Style("#d55e00", "s"),
    "random-heads": Style("#7f7f7f", "X"),
    "streamingllm": Style("#009e73", "D"),
    "h2o": Style("#b8860b", "v"),
    "tova": Style("#7570b3", "P"),
    "snapkv": Style("#cc79a7", "^"),
    "fastgen": Style("#56b4e9", "p"),
    "duo+quest": Style("#ef3b2c", "H"),
    "expected-attention": Style("#4d9221", "8"),
    "kvzip-tokens": Style("#d01c8b", "d"),
    "attention-profile": Style("#332288", "<"),
    "kvzip": Style("#aa4499", ">"),
    "prulong": Style("#8f8f2f", "h"),
    "distill": Style("#117733", "p"),
    "transformers": Style("#882255", "*"),
}
# Other names of the same methods: the shipped pattern, the baselines of `duo eval recall`.
SAME = {
    "full attention": "full",
    "all streaming": "streamingllm",
    "random": "random-heads",
}
# For methods that are not in the table.
OTHER_COLOURS = ("#a0522d", "#4477aa", "#661100", "#888800")
OTHER_MARKERS = ("d", "8", "H")
# How `duo eval mmlu` and `humaneval` of version 0.1 named a pattern: sparsity, sinks, window.
_OLD = re.compile(r"([\d.]+) (\d+)/(\d+)")
# For settings of one method, from the smallest to the largest: colours of viridis, which no method has.
SCALE = ("#440154", "#3b528b", "#21918c", "#5ec962", "#c8b400")
SCALE_MARKERS = "o^sph"


def label(method: str) -> str:
    """A method in few words.

    `duo:sparsity=0.5,sink_size=32,recent_size=128` is "duo 50% stream, 32/128"; a pattern in a folder has its name.
    """
    name, _, settings = _today(method).partition(":")
    kind, _, source = name.partition("=")
    if source:
        name = _last(source) if kind == "duo" else f"{kind}={_last(source)}"
    settings = re.sub(r"sparsity=([\d.]+)", lambda found: f"{float(found[1]):.0%} stream", settings)
    settings = re.sub(r"sink_size=(\d+),recent_size=(\d+)", r"\1/\2", settings)
    return f"{name} {settings.replace('=', ' ').replace(',', ', ')}".strip()


def style_of(method: str) -> Style:
    """The style of a method, however its name continues: `random-heads=1` and `snapkv:window=64` are known methods.

    A pattern in a folder, `duo=results/kvzip`, has the style of the folder's name. A name that is not in `STYLES` has a
    style that depends on nothing but the name.
    """
    name, _, source = _today(method).partition(":")[0].partition("=")
    if name == "duo" and source:
        name = _last(source)
    name = SAME.get(method if method in SAME else name, name)
    if name in STYLES:
        return STYLES[name]
    number = zlib.crc32(name.encode())
    colours = len(OTHER_COLOURS)
    return Style(OTHER_COLOURS[number % colours], OTHER_MARKERS[number // colours % len(OTHER_MARKERS)])


def _today(method: str) -> str:
    """The name of a method as files have it since version 0.1."""
    old = _OLD.fullmatch(method)
    return "duo:sparsity={},sink_size={},recent_size={}".format(*old.groups()) if old else method


def _last(source: str) -> str:
    """The last part of a path."""
    return source.rstrip("/").rpartition("/")[2]


def styles_of(methods: Sequence[str]) -> list[Style]:
    """The styles of lines in one figure; lines that would look the same differ in their pattern."""
    styles: list[Style] = []
    for style in map(style_of, methods):
        same = sum((other.colour, other.marker) == (style.colour, style.marker) for other in styles)
        styles.append(replace(style, pattern=PATTERNS[same % len(PATTERNS)]))
    return styles


def styles_of_settings(number: int) -> list[Style]:
    """The styles of `number` settings of one method, from the smallest to the largest."""
    step = (len(SCALE) - 1) / max(1, number - 1)
    return [Style(SCALE[round(index * step)], SCALE_MARKERS[index % len(SCALE_MARKERS)]) for index in range(number)]
