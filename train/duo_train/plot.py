"""`duo plot`: gates, training curves, attention maps and training samples. Reads data; `duo_train.plots` draws."""

import functools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int32
from transformers import PreTrainedTokenizerBase

from duo_jax.certified import training
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.options import ModelOptions
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model
from duo_jax.pattern.pattern import HeadPattern
from duo_train.data.haystack import DEFAULT, load_haystack
from duo_train.data.needles import NeedleData, Needles, Sample
from duo_train.metrics import METRICS_FILE, read_metrics
from pallas_kernels import full_attention
from pallas_kernels.merge import softmax_with_sinks
from pallas_kernels.types import Request
from pallas_kernels.window import consecutive

# At this length the weights of one query head take 67 MB.
LONGEST_MAP = 4096


@dataclass(frozen=True)
class GatesPlot:
    """Heat map of a pattern's gates, layers by KV heads; of several patterns on one scale."""

    dirs: tyro.conf.Positional[tuple[str, ...]]
    """Head patterns to compare: folders or published names. One of them draws that one."""
    sparsity: float | None = None
    """Mark the retrieval heads when this fraction of KV heads streams, 0 to 1."""
    out: Path | None = None
    """Name of the figure, .png, .svg or neither; by default gates, in the folder of a single pattern, or here."""
    force: bool = False
    """Replace files that this command did not write."""

    def run(self) -> None:
        """Load the patterns and draw them."""
        if not self.dirs:
            raise ValueError("name a head pattern: a folder, or one of those that duo patterns lists")
        plots, folder = _plots(), Path(self.dirs[0])
        usual = folder / "gates" if len(self.dirs) == 1 and folder.is_dir() else Path("gates")
        stem = _stem(self.out, usual, self.force)
        patterns = [HeadPattern.load(name, sparsity=self.sparsity) for name in self.dirs]
        maps = [
            plots.GateMap(
                pattern.shown_gates,
                None if self.sparsity is None else pattern.is_retrieval,
                self._title(name, pattern, patterns[0]),
            )
            for name, pattern in zip(self.dirs, patterns, strict=True)
        ]
        _write(plots.gate_maps_figure(maps), stem, self.force)

    def _title(self, source: str, pattern: HeadPattern, first: HeadPattern) -> str:
        """The pattern's name; how many heads it keeps, and with others, how many of the first one's."""
        name = str(pattern.metadata.get("model_name") or "").rsplit("/", 1)[-1]
        own = Path(source).resolve().name
        name = own if not name or len(self.dirs) > 1 else name
        total, gates = pattern.num_choosable, pattern.shown_gates
        apart = f", {count} with a window of their own" if (count := len(pattern.window_layers)) else ""
        title = f"{name}, layers × KV heads: {pattern.num_layers} × {pattern.num_kv_heads}{apart}\n"
        if self.sparsity is None:
            return f"{title}{(gates > 0.5).sum()} of {total} gates above 0.5, mean {np.nanmean(gates):.2f}"
        title += f"{pattern.num_retrieval} of {total} are retrieval heads (dots), sparsity {pattern.sparsity:.2f}"
        if pattern is first or pattern.gates.shape != first.gates.shape:
            return title
        shared = int((pattern.is_retrieval & first.is_retrieval).sum())
        return f"{title}, {shared} of them in the first too"


@dataclass(frozen=True)
class CurvesPlot:
    """Training curves: losses, gates, learning rate."""

    dir: tyro.conf.Positional[Path]
    """Folder of a training run, with metrics.jsonl."""
    out: Path | None = None
    """Name of the figure, .png, .svg or neither; curves in the folder by default."""
    force: bool = False
    """Replace files that this command did not write."""

    def run(self) -> None:
        """Read the metrics and draw them."""
        plots, stem = _plots(), _stem(self.out, self.dir / "curves", self.force)
        metrics = read_metrics(self.dir / METRICS_FILE)
        title = f"{self.dir.resolve().name}, up to step {metrics['step'].max():,.0f}"
        _write(plots.curves_figure(metrics, title), stem, self.force)


@dataclass(frozen=True)
class AttentionPlot:
    """Attention maps of heads, and their mass on sinks, recent window and the rest (paper figure 1)."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    layer: tuple[int, ...]
    """Layers, counted from 0; several draw several heads side by side."""
    head: tuple[int, ...]
    """KV heads, counted from 0, one for each layer; the map is the mean over a KV head's query heads."""
    text: str = DEFAULT
    """Text to read: pydoc (Python's own reference pages), a text file, or a folder of them."""
    length: int = 512
    """First tokens of the text to show, at most 4096."""
    sink_size: int = 16
    """First tokens that a streaming head keeps."""
    recent_size: int = 64
    """Most recent tokens that a streaming head keeps, the query's own included."""
    out: Path | None = None
    """Name of the figure, .png, .svg or neither; attention in this folder by default."""
    force: bool = False
    """Replace files that this command did not write."""

    def requests(self) -> list[Request]:
        """Full attention over the text, for certification."""
        config = open_config(self.model.model).with_dtypes(dtype=self.model.dtype)
        return [each for each in training(config) if each.window is None]

    def run(self) -> None:
        """Check the flags, compute the layers up to the last one given, and draw."""
        plots, stem = _plots(), _stem(self.out, Path("attention"), self.force)
        heads = self._heads()
        if self.length > LONGEST_MAP:
            raise ValueError(f"--length must be at most {LONGEST_MAP}, got {self.length}")
        if self.sink_size < 0 or self.recent_size < 1:
            raise ValueError(
                f"need --sink-size >= 0 and --recent-size >= 1, got {self.sink_size} and {self.recent_size}"
            )
        if self.length <= self.sink_size + self.recent_size:
            raise ValueError(
                f"a streaming head sees all of {self.length} tokens with {self.sink_size} sinks and a window of "
                f"{self.recent_size}: raise --length, or lower --sink-size or --recent-size"
            )
        tokens = self.model.tokenizer().encode(load_haystack(self.text), truncation=True, max_length=self.length)
        if len(tokens) < self.length:
            raise ValueError(f"{self.text!r} has {len(tokens)} tokens, need {self.length}: lower --length")
        model = self.model.load()
        check_heads(model.config, heads)
        weights = np.asarray(attention_weights(model, jnp.asarray([tokens], jnp.int32), heads=heads))
        title = (
            f"{Path(self.model.model).name}, {self.length} tokens\n"
            f"between the dashed lines: not seen with {self.sink_size} sinks and a window of {self.recent_size}"
        )
        figure = plots.attention_figure(
            weights,
            [f"layer {layer}, KV head {head}" for layer, head in heads],
            title,
            sink_size=self.sink_size,
            recent_size=self.recent_size,
        )
        _write(figure, stem, self.force)

    def _heads(self) -> tuple[tuple[int, int], ...]:
        if not self.layer or len(self.layer) != len(self.head):
            raise ValueError(f"--layer and --head go in pairs, got {self.layer} and {self.head}")
        return tuple(zip(self.layer, self.head, strict=True))


@dataclass(frozen=True)
class SamplePlot:
    """One training sample: where passkeys are hidden and asked for (paper figure 3). Reads no weights."""

    model: str
    """Model whose tokenizer to use: Hugging Face folder, .gguf file, packaged model or hub id."""
    index: int = 0
    """Number of the sample."""
    needles: tyro.conf.OmitArgPrefixes[Needles] = Needles()
    out: Path | None = None
    """Name of the figure, .png, .svg or neither; sample in this folder by default."""
    force: bool = False
    """Replace files that this command did not write."""

    def run(self) -> None:
        """Make the sample and draw it."""
        plots, stem = _plots(), _stem(self.out, Path("sample"), self.force)
        if self.index < 0:
            raise ValueError(f"--index must be at least 0, got {self.index}")
        tokenizer = ModelOptions(self.model).tokenizer()
        sample = NeedleData(self.needles, tokenizer)[self.index]
        title = (
            f"sample {self.index} for {Path(self.model).name}: {len(sample.passkeys)} passkeys of "
            f"{self.needles.passkey_words} words in {len(sample.tokens):,} tokens"
        )
        figure = plots.sample_figure(sample.labels, sample.tail, passkeys(sample, tokenizer), title)
        _write(figure, stem, self.force)


@dataclass(frozen=True)
class Plot:
    """Draw gates, training curves, attention maps or a training sample; every figure as PNG and SVG."""

    packages = ("matplotlib",)
    figure: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[GatesPlot, tyro.conf.subcommand("gates")]
            | Annotated[CurvesPlot, tyro.conf.subcommand("curves")]
            | Annotated[AttentionPlot, tyro.conf.subcommand("attention")]
            | Annotated[SamplePlot, tyro.conf.subcommand("sample")]
        ]
    ]

    def run(self) -> None:
        """Draw the figure and print the paths of its files."""
        self.figure.run()


def passkeys(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The passkeys of a sample for `plots.sample_figure`: the position of each, and its words."""
    plots = _plots()
    return [
        plots.Passkey(
            hidden, answered, *(str(tokenizer.decode(sample.tokens[slice(*span)])) for span in (hidden, answered))
        )
        for hidden, answered in zip(sample.needles, sample.answers, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="heads")
def attention_weights(
    model: Model, tokens: Int32[Array, "1 T"], *, heads: tuple[tuple[int, int], ...]
) -> Float[Array, "M T T"]:
    """Attention weights [queries, keys] under full attention, float32, for each (layer, KV head).

    A KV head's weights are the mean over the query heads that share it: the unit of a pattern (paper section 2.1).
    Every row sums to 1, or to less where the model has learned sinks.
    """
    decoder = model.decoder

    def attend(maps: dict, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, dict]:
        group, sinks = q.shape[2] // k.shape[2], decoder.sink_logits(layer)
        for head in (head for of_layer, head in heads if of_layer == layer):
            own = slice(head * group, (head + 1) * group)
            sinks_of_group = None if sinks is None else sinks[own]
            maps = maps | {(layer, head): _weights(q[0, :, own], k[0, :, head], sinks_of_group)}
        return full_attention(q, k, v, window=model.config.window(layer), sink_logits=sinks), maps

    positions = consecutive(jnp.zeros(1, jnp.int32), tokens.shape[1])
    # Only the maps are used, so the compiler removes every layer after the last one they need.
    maps: dict[tuple[int, int], Array] = {}
    maps = decoder.hidden(tokens, positions, attend, maps, context=tokens.shape[1])[1]
    return jnp.stack([maps[head] for head in heads])


def check_heads(config: ModelConfig, heads: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError if the model has no such (layer, KV head)."""
    for layer, head in heads:
        if not 0 <= layer < config.num_layers:
            raise ValueError(f"--layer must be in [0, {config.num_layers - 1}], got {layer}")
        if (window := config.window(layer)) is not None:
            raise ValueError(
                f"--layer {layer} has a window of {window.size} tokens and no head to choose: give one of the layers "
                f"with full attention, {[*config.full_layers]!s:.60}"
            )
        if not 0 <= head < config.num_kv_heads:
            raise ValueError(f"--head is a KV head and must be in [0, {config.num_kv_heads - 1}], got {head}")


def _weights(
    q: Float[Array, "T G H"], k: Float[Array, "T H"], sink_logits: Float[Array, "G"] | None
) -> Float[Array, "T T"]:
    scores = jnp.einsum("tgh,sh->gts", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
    sinks = None if sink_logits is None else sink_logits[:, None]
    return softmax_with_sinks(jnp.where(causal[None], scores, -jnp.inf), sinks).mean(axis=0)


def _plots() -> ModuleType:
    """The drawing functions, imported late: matplotlib is an extra and takes a second to import."""
    from duo_train import plots

    return plots


def _stem(out: Path | None, default: Path, force: bool) -> Path:
    """The name of a figure without its suffix, checked before the work."""
    from matplotlib.backend_bases import FigureCanvasBase

    stem = default if out is None else out
    if stem.suffix.lower() in (".png", ".svg"):
        stem = stem.with_suffix("")
    elif stem.suffix.lower().lstrip(".") in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"figures are written as .png and .svg, got --out {out}; leave the suffix out")
    _plots().check(stem, force=force)
    return stem


def _write(figure: Any, stem: Path, force: bool) -> None:
    for path in _plots().save(figure, stem, force=force):
        print(path)
