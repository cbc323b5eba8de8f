"""`duo plot`: the numbers drawn are right, the files are figures, and their labels can be read."""

import json
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from duo_train import plots
from duo_train.metrics import read_metrics
from duo_train.plot import attention_weights
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from duo_jax import Model
from pallas_kernels.window import Window
from tests.text_models import Result, assert_refused

Duo = Callable[..., Result]
SMALL = ("--num-passkeys", 3, "--passkey-words", 2, "--min-length", 400, "--max-length", 600)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a bright cold day in April. " * 40)
    return path


def step(number: int, **more: object) -> dict:
    losses = {"loss": 1.0 / number, "distillation": 0.9 / number, "regularization": 0.1 / number}
    return {"step": number, **losses, "mean_gate": 0.8, "above_half": 0.7, "learning_rate": 0.02, "tokens": 9, **more}


def write(folder: Path, *lines: object) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def labels_of(result: Result, stem: Path) -> str:
    """All text of the SVG, once both files are known to be pictures and to be what was printed."""
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    assert result == Result(0, f"{png}\n{svg}\n", "")
    assert imread(png).std() > 0.01
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join(t for element in root.iter("{http://www.w3.org/2000/svg}text") for t in element.itertext())


def assert_readable(figure: Figure) -> None:
    """No text is small, leaves the figure or lies on another one."""
    figure.draw_without_rendering()
    every = [axes for outer in figure.axes for axes in (outer, *outer.child_axes)]
    axes_of = [axis for axes in every for axis in (axes.xaxis, axes.yaxis)]
    ticks = [(axis, tick) for axis in axes_of for tick in axis.get_major_ticks() + axis.get_minor_ticks()]
    within = [tick for axis, tick in ticks if axis.axes.axison and _between(tick.get_loc(), axis.get_view_interval())]
    of_ticks = {id(label) for _, tick in ticks for label in (tick.label1, tick.label2)}
    shown = [label for tick in within for label in (tick.label1, tick.label2)]
    shown += [label for label in figure.findobj(Text) if id(label) not in of_ticks]
    shown = [label for label in shown if label.get_visible() and label.get_text().strip()]
    boxes = [(label.get_text(), label.get_window_extent()) for label in shown]
    assert len(boxes) > 3 and min(label.get_fontsize() for label in shown) >= 9
    for name, box in boxes:
        assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1), name
        assert figure.bbox.padded(1).containsy(box.y0) and figure.bbox.padded(1).containsy(box.y1), name
    touching = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.padded(-0.5).overlaps(other)]
    assert not touching


def _between(place: float, interval: np.ndarray) -> bool:
    return min(interval) <= place <= max(interval)


# Gates.


def test_gates_of_a_published_pattern(duo: Duo, tmp_path: Path) -> None:
    stem = tmp_path / "new" / "heads"
    args = ("plot", "gates", "smollm2-135m-instruct", "--sparsity", 0.5)
    found = labels_of(duo(*args, "--out", f"{stem}.svg"), stem)
    for words in ("smollm2-135m-instruct", "30 × 3", "45 of 90 are retrieval heads", "layer", "KV head", "gate"):
        assert words in found
    before = stem.with_suffix(".svg").read_bytes()
    assert duo(*args, "--out", stem).code == 0
    assert stem.with_suffix(".svg").read_bytes() == before, "the same figure is the same file"


def test_gates_of_a_folder_lie_in_it(duo: Duo, text_model: Path) -> None:
    folder = text_model / "pattern"
    found = labels_of(duo("plot", "gates", folder), folder / "gates")
    assert "gates above 0.5" in found and "retrieval" not in found


@pytest.mark.parametrize("shape", [(32, 32), (80, 8), (30, 3), (2, 2)], ids=str)
def test_gates_are_readable_and_in_place(shape: tuple[int, int]) -> None:
    gates = np.random.default_rng(0).uniform(-0.01, 1, shape)
    figure = plots.gates_figure(gates, gates > 0.5, "a model\n17 of 99 are retrieval heads (dots)")
    assert_readable(figure)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), gates.clip(0, 1).T)
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.argwhere(gates > 0.5))


def test_gates_of_several_patterns_are_on_one_scale(duo: Duo, tmp_path: Path) -> None:
    names = ("smollm2-135m-instruct", "llama-2-7b-32k-instruct")
    found = labels_of(duo("plot", "gates", *names[:1] * 2, "--sparsity", 0.5, "--out", tmp_path / "a"), tmp_path / "a")
    assert found.count("45 of 90 are retrieval heads") == 2 and "45 of them in the first too" in found
    refused = duo("plot", "gates", *names, "--out", tmp_path / "b")
    assert_refused(refused, "same layers x KV heads to be compared, got 30 x 3, 32 x 32")
    assert_refused(duo("plot", "gates"), "name a head pattern")


@pytest.mark.parametrize("shape", [(32, 32), (30, 3)], ids=str)
def test_gate_maps_are_readable(shape: tuple[int, int]) -> None:
    gates = np.random.default_rng(0).uniform(0, 1, shape)
    title = "smollm2-135m-instruct, 30 × 3\n45 of 90 are retrieval heads (dots), 32 of them in the first too"
    figure = plots.gate_maps_figure([plots.GateMap(gates, gates > 0.5, title), plots.GateMap(gates / 2, None, title)])
    assert_readable(figure)
    first, second = (axes.images[0] for axes in figure.axes[:2])
    assert first.get_clim() == second.get_clim() == (0, 1)
    np.testing.assert_array_equal(second.get_array(), gates.T / 2)


# Curves.


def test_curves(duo: Duo, tmp_path: Path) -> None:
    folder = write(tmp_path, *(step(n, sparsity=0.1, target_sparsity=0.2, slope=n, note="x") for n in range(1, 150)))
    found = labels_of(duo("plot", "curves", folder), folder / "curves")
    for words in ("distillation", "regularization", "above 0.5", "target sparsity", "learning rate", "slope", "149"):
        assert words in found
    assert "note" not in found and "tokens" not in found


def test_one_step_is_a_figure(duo: Duo, tmp_path: Path) -> None:
    assert "up to step 1" in labels_of(duo("plot", "curves", write(tmp_path, step(1))), tmp_path / "curves")


def test_losses_are_logarithmic_unless_one_is_negative() -> None:
    metrics = {"step": np.arange(1.0, 301), "loss": np.linspace(0, 1, 300), "regularization": np.full(300, 0.1)}
    figure = plots.curves_figure(metrics, "a run")
    assert_readable(figure)
    assert figure.axes[0].get_yscale() == "log"
    # The step with a loss of 0 has no logarithm and is left out.
    assert figure.axes[0].lines[0].get_xdata()[0] == 2
    figure = plots.curves_figure(metrics | {"regularization": np.full(300, -0.1)}, "a run")
    assert figure.axes[0].get_yscale() == "linear"


def test_metrics_may_lack_a_field_in_some_lines(tmp_path: Path) -> None:
    found = read_metrics(write(tmp_path, step(1), "", step(2, extra=3)) / "metrics.jsonl")
    np.testing.assert_array_equal(found["step"], [1, 2])
    np.testing.assert_array_equal(found["extra"], [np.nan, 3])
    assert_readable(plots.curves_figure(found | {"loss": np.full(2, np.nan)}, "a run"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), ["metrics.jsonl is empty", "line 1"]),
        ((step(1), '{"step": 2, "lo'), ["metrics.jsonl:2 is not JSON"]),
        ((step(1), step(2), "[3]"), ["metrics.jsonl:3 must contain a JSON object"]),
        (({"loss": 1.0},), ["metrics.jsonl:1 has no number 'step'"]),
    ],
    ids=["empty", "cut", "list", "no step"],
)
def test_a_file_without_metrics_is_refused(lines: tuple, words: list[str], duo: Duo, tmp_path: Path) -> None:
    result = duo("plot", "curves", write(tmp_path, *lines))
    assert_refused(result, *words)
    assert len(result.err.splitlines()) == 1


# Attention.


def test_attention_weights_are_those_of_a_dense_softmax(tiny: Model) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 12)), jnp.int32)
    causal = np.tril(np.ones((12, 12), bool))

    def attend(state: list, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, list]:
        q, k, v = (np.asarray(a[0], np.float64) for a in (q, k.repeat(2, axis=2), v.repeat(2, axis=2)))
        scores = np.where(causal, np.einsum("tnh,snh->nts", q, k) / np.sqrt(16), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("nts,snh->tnh", weights, v)
        return jnp.asarray(out[None], jnp.float32), [*state, weights]

    layers = tiny.decoder.hidden(tokens, jnp.arange(12, dtype=jnp.int32)[None], attend, [])[1]
    heads = ((1, 1), (0, 0), (1, 0))
    found = np.asarray(attention_weights(tiny, tokens, heads=heads))
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    for weights, (layer, head) in zip(found, heads, strict=True):
        np.testing.assert_allclose(weights, layers[layer][2 * head : 2 * head + 2].mean(0), atol=1e-6)


def test_shares_are_those_of_the_streaming_mask() -> None:
    weights = np.tril(np.random.default_rng(0).uniform(size=(40, 40)))
    weights /= weights.sum(1, keepdims=True)
    shares = plots.attention_shares(weights, sink_size=4, recent_size=9)
    np.testing.assert_allclose(shares.sum(1), 1)
    at = jnp.arange(40)
    seen = np.asarray(Window(4, 9).visible(at[:, None], at[None, :]))
    np.testing.assert_allclose(shares[:, :2].sum(1), (weights * seen).sum(1))
    np.testing.assert_allclose(shares[:, 0], weights[:, :4].sum(1))


@pytest.mark.parametrize("length", [30, 1300])
def test_attention_figures_are_readable(length: int) -> None:
    weights = np.tril(np.ones((2, length, length))) / np.arange(1, length + 1)[:, None]
    names = ["layer 79, KV head 31", "layer 3, KV head 7"]
    for count in (1, 2):
        figure = plots.attention_figure(weights[:count], names[:count], "a model", sink_size=4, recent_size=8)
        assert_readable(figure)
        shown = figure.axes[0].images[0].get_array()
        assert len(shown) <= plots.MAP_CELLS
        # Of a block, the largest weight: the first query of the last rows has it.
        block = -(-length // len(shown))
        np.testing.assert_allclose(shown[-1, 0], 1 / (1 + (len(shown) - 1) * block))
        assert np.ma.getmaskarray(shown)[0, 1]


def test_attention(duo: Duo, text_model: Path, text: Path, tmp_path: Path) -> None:
    args = ("--text", text, "--length", 120, "--sink-size", 4, "--recent-size", 16, "--out", tmp_path / "two")
    result = duo("plot", "attention", "--model", text_model, "--layer", 0, 1, "--head", 3, 1, *args)
    found = labels_of(result, tmp_path / "two")
    for words in ("layer 0, KV head 3", "layer 1, KV head 1", "sinks", "the rest", "mass in %", "120 tokens"):
        assert words in found


ATTENTION: dict[str, tuple[dict[str, object], list[str]]] = {
    "layer": ({"--layer": 2}, ["--layer must be in [0, 1], got 2"]),
    "negative layer": ({"--layer": -1}, ["--layer must be in [0, 1], got -1"]),
    "head": ({"--head": 4}, ["--head is a KV head and must be in [0, 3], got 4"]),
    "short text": ({"--length": 4000}, ["has 1400 tokens, need 4000", "--length"]),
    "no text": ({"--text": "no-such.txt"}, ["no-such.txt"]),
    "nothing hidden": ({"--length": 80}, ["sees all of 80 tokens", "raise --length"]),
    "too long": ({"--length": 5000}, ["--length must be at most 4096", "5000"]),
    "no window": ({"--recent-size": 0}, ["--recent-size >= 1"]),
    "pdf": ({"--out": "a.pdf"}, [".png and .svg", "a.pdf"]),
}


@pytest.mark.parametrize(("changed", "words"), ATTENTION.values(), ids=ATTENTION)
def test_attention_refuses_in_a_line(
    changed: dict, words: list[str], duo: Duo, text_model: Path, text: Path, tmp_path: Path
) -> None:
    flags = {"--layer": 0, "--head": 0, "--text": text, "--length": 120, "--out": tmp_path / "a"} | changed
    result = duo("plot", "attention", "--model", text_model, *(word for flag in flags.items() for word in flag))
    assert_refused(result, *words)
    assert len(result.err.splitlines()) == 1


def test_layers_and_heads_go_in_pairs(duo: Duo, text_model: Path) -> None:
    result = duo("plot", "attention", "--model", text_model, "--layer", 0, 1, "--head", 0)
    assert_refused(result, "--layer and --head go in pairs")


# Samples.


def test_a_sample(duo: Duo, text_model: Path, text: Path, tmp_path: Path) -> None:
    args = ("--model", text_model, "--haystack", text, *SMALL, "--index", 2, "--out", tmp_path / "sample.png")
    found = labels_of(duo("plot", "sample", *args), tmp_path / "sample")
    for words in ("sample 2", "3 passkeys of 2 words", "The third passkey of the vault is", "asked for", "labels: "):
        assert words in found


def test_a_sample_before_the_first_is_refused(duo: Duo, text_model: Path) -> None:
    assert_refused(duo("plot", "sample", "--model", text_model, "--index", -1), "--index must be at least 0")


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("total", [3000, 128000])
def test_sample_figures_are_readable(count: int, total: int) -> None:
    """Needles beside each other, and sentences longer than their column."""
    tail, words = total - 90 * count, "uniform november " * 16
    passkeys = [
        plots.Passkey((100 + 70 * i, 160 + 70 * i), (tail + 90 * i + 20, tail + 90 * i + 80), f"That is {words}", words)
        for i in range(count)
    ]
    labels = np.zeros(total, bool)
    labels[tail + 20 : tail + 80] = True
    assert_readable(plots.sample_figure(labels, tail, passkeys, "a sample"))


@pytest.mark.parametrize("text", ["one two three four five six", "a" * 60, "one " * 30, "", "two  spaces\nand lines"])
def test_shortened_text_keeps_both_ends(text: str) -> None:
    found, whole = plots.shortened(text, 20), " ".join(text.split())
    assert len(found) <= 20
    first, dots, last = found.partition(" … ")
    assert whole.startswith(first) and whole.endswith(last) and bool(dots) == (len(whole) > 20)


# The command.


def test_help_says_what_it_draws(duo: Duo) -> None:
    found = duo("plot", "--help").out
    assert all(name in found for name in ("gates", "curves", "attention", "sample"))


def test_without_matplotlib_it_says_what_to_install(duo: Duo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(duo("plot", "gates", "smollm2-135m-instruct"), "pip install 'duo-jax[train]'")
