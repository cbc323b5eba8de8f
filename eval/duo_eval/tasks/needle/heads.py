"""`duo eval heads`: which streaming heads lose needles. Effects of all on the answer, and single heads turned back.

The answer is scored by teacher forcing, token by token: greedy decoding gives it if every token is the first choice.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from duo_train.data.batches import Batch, stack
from duo_train.data.haystack import DEFAULT
from duo_train.data.needles import Sample
from duo_train.gated import GatedModel
from duo_train.recipes.learned import before_labels
from jaxtyping import Array, Bool, Float, Int32

from duo_eval.runner.record import Record, Result, fingerprint, sha256
from duo_eval.runner.run import Answer, Comparison, run
from duo_eval.show.result_type import ResultType, of_task, readable
from duo_eval.stats.scores import FULL
from duo_eval.tasks.needle.command import Cell, NeedleTask
from duo_eval.tasks.needle.heads_show import head_table, needle_table, restored_figure, token_figure
from duo_jax import HeadPattern, Model, load_model
from duo_jax.arguments import whole_number
from duo_jax.certified import training
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from pallas_kernels import Window
from pallas_kernels.types import Request

# Samples are padded to a multiple of this: lengths in tokens compile few programs.
PAD = 128


@dataclass(frozen=True)
class Job:
    """One needle."""

    length: int
    depth: float
    sample: int


@dataclass(frozen=True)
class HeadsTask:
    """Find the streaming heads of a pattern that lose needles: turn single heads back, measure the answer."""

    out: Path
    """File to append to; results that it already has are not computed again. The figures are written next to it."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    pattern: str = "smollm2-135m-instruct"
    """Head pattern: a published name or a folder."""
    sparsity: float = 0.5
    """Fraction of KV heads that stream."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    lengths: tuple[int, ...] = (4096,)
    """Tokens of prompt and answer."""
    depths: int = 10
    """Depths of the needle, evenly spaced from the start of the text to its end."""
    samples: int = 1
    """Needles at each depth."""
    turn_back: int = 4
    """Heads that are turned back to retrieval, one at a time and then together, for each lost needle: those with the
    largest effect."""
    style: Literal["digits", "words"] = "digits"
    """The needle, as in `duo eval needle`."""
    haystack: str = DEFAULT
    """Text to hide it in, as in `duo eval needle`."""
    seed: int = 0
    """Decides keys and stretches of text; with the same seed, `duo eval needle` asks for the same needles."""
    rematerialize: bool = False
    """Recompute each layer in the backward pass: less memory, a third more time."""

    def requests(self) -> list[Request]:
        """The attention whose gradients are taken, for certification."""
        return training(open_config(self.model), Window(self.sink_size, self.recent_size))

    def run(self) -> None:
        """Measure the missing needles, from the shortest length on."""
        whole_number("turn_back", self.turn_back, 1)
        comparison = Comparison(self.model)
        task = NeedleTask(
            comparison,
            lengths=self.lengths,
            depths=self.depths,
            samples=self.samples,
            style=self.style,
            haystack=self.haystack,
            seed=self.seed,
        )
        task.check()
        comparison.check_length(max(self.lengths))
        sizes: dict[str, Any] = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        pattern = HeadPattern.load(self.pattern, sparsity=self.sparsity, **sizes)
        settings = asdict(self)
        names = ("model", "pattern", "sparsity", *sizes, "depths", "turn_back", "style", "haystack", "seed")
        sources = {
            "pattern": fingerprint(pattern),
            "weights": weights_fingerprint(self.model),
            "haystack": sha256(task.text.encode()),
        }
        record = Record.open(self.out, {"task": "heads"} | {name: settings[name] for name in names}, sources)

        def prepare(missing: list[Job]) -> tuple[str, Answer[Job]]:
            # Refuses bad data before the weights are read.
            own = pattern.of(open_config(self.model))
            task.question(Cell(FULL, 1.0, **asdict(missing[0])))
            model = load_model(self.model)
            attention = GatedModel(**sizes, rematerialize=self.rematerialize)
            return str(model.dtype), partial(self._measure, task, Heads(model, attention, own))

        run(record, self._jobs(), prepare, unit="needle")
        with readable(self.out):
            print("\n".join(in_words(record.results)))
        if record.results:
            RESULT.show_figures(self.out)

    def _jobs(self) -> Iterator[Job]:
        for sample in range(self.samples):
            for length in sorted(self.lengths):
                for depth in np.linspace(0, 1, self.depths).round(4).tolist():
                    yield Job(length, depth, sample)

    def _measure(self, task: NeedleTask, heads: "Heads", jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            begin = time.perf_counter()
            needle, prompt = task.hide(job.length, job.depth, job.sample)
            tokens = np.concatenate([prompt.tokens, prompt.right])
            labels = np.arange(len(tokens)) >= len(prompt.tokens)
            result = heads.measure(tokens, labels, self.turn_back)
            yield (
                job,
                {
                    "key": " ".join(needle.key),
                    "distance": len(prompt.tokens) - prompt.position,
                    "answer": [task.comparison.tokenizer.decode([token]) for token in prompt.right],
                    **result,
                    "seconds": round(time.perf_counter() - begin, 3),
                },
            )


@dataclass(frozen=True, eq=False)
class Heads:
    """A model, and the pattern whose heads are turned back."""

    model: Model
    attention: GatedModel
    pattern: HeadPattern

    def measure(self, tokens: Int32[np.ndarray, "T"], labels: Bool[np.ndarray, "T"], most: int) -> dict[str, Any]:
        """The answer under full attention and under the pattern, each head's effect, and heads turned back.

        Args:
            tokens: prompt and answer.
            labels: True for the tokens of the answer.
            most: heads to turn back if the pattern loses an answer that full attention gives.

        Returns:
            `full` and `pattern`, the scores of the answer's tokens; `effect`, `[L, K]`, by how many nats the answer
            gets likelier per unit of a streaming head's gate; `turned`, a list of heads and scores.
        """
        batch, count, shape = batch_of(tokens, labels), int(labels.sum()), self.pattern.gates.shape

        def scores(is_retrieval: Bool[np.ndarray, "L K"]) -> dict[str, list[Any]]:
            gates = jnp.asarray(is_retrieval, jnp.float32)
            _, (nll, hits) = _answer(self.attention, gates, self.model, batch)
            return _scores(nll, hits, count)

        retrieval = self.pattern.is_retrieval
        (_, (nll, hits)), gradient = _effect(self.attention, jnp.asarray(retrieval, jnp.float32), self.model, batch)
        effect = np.where(retrieval, 0.0, -np.asarray(gradient, np.float64))
        full, kept = scores(np.ones(shape, bool)), _scores(nll, hits, count)
        turned = []
        if all(full["hits"]) and not all(kept["hits"]):
            streaming = np.flatnonzero(~retrieval & ~np.isnan(self.pattern.shown_gates))
            best = streaming[np.argsort(-effect.flat[streaming])][:most]
            for chosen in [*best[:, None], best]:
                changed = retrieval.copy()
                changed.flat[chosen] = True
                places = [[int(index) for index in np.unravel_index(head, shape)] for head in chosen]
                turned.append({"heads": places, **scores(changed)})
        return {"full": full, "pattern": kept, "effect": effect.round(4).tolist(), "turned": turned}


def batch_of(tokens: Int32[np.ndarray, "T"], labels: Bool[np.ndarray, "T"]) -> Batch:
    """One padded sample on the device."""
    sample = Sample(tokens, labels, (), (), 0, int(labels.argmax()), ())
    width = -(-len(tokens) // PAD) * PAD
    return Batch(*(jnp.asarray(array[0]) for array in stack([sample], accumulate=1, width=width, num_labels=PAD)))


def _loss(
    gates: Float[Array, "L K"], attention: GatedModel, model: Model, batch: Batch
) -> tuple[Float[Array, ""], tuple[Float[Array, "1 M"], Bool[Array, "1 M"]]]:
    """Negative log-likelihood of the answer, of each of its tokens, and whether each is the first choice."""
    if model.config.window_layers:
        gates = gates[np.array(model.config.full_layers)]
    hidden = before_labels(attention.student(model, batch.tokens, gates), batch.labels)
    logits = model.decoder.logits(hidden.astype(model.dtype))
    wanted = jnp.take_along_axis(batch.tokens, batch.labels, axis=1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return jnp.where(batch.valid, nll, 0.0).sum(), (nll, logits.argmax(-1) == wanted)


@partial(jax.jit, static_argnums=0)
def _answer(attention: GatedModel, gates: Array, model: Model, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
    return _loss(gates, attention, model, batch)


@partial(jax.jit, static_argnums=0)
def _effect(attention: GatedModel, gates: Array, model: Model, batch: Batch) -> Any:
    return jax.value_and_grad(_loss, has_aux=True)(gates, attention, model, batch)


def _scores(nll: Float[Array, "1 M"], hits: Bool[Array, "1 M"], count: int) -> dict[str, list[Any]]:
    return {
        "nll": np.asarray(nll, np.float64)[0, :count].round(4).tolist(),
        "hits": np.asarray(hits)[0, :count].tolist(),
    }


def in_words(results: Sequence[Result]) -> Iterator[str]:
    """How many needles are found, and how many of the lost ones single heads bring back."""
    full, kept = (sum(all(result[name]["hits"]) for result in results) for name in ("full", "pattern"))
    yield f"{len(results)} needles: full attention finds {full}, the pattern {kept}"
    lost = [result for result in results if result["turned"]]
    if lost:
        one = sum(any(all(turn["hits"]) for turn in result["turned"] if len(turn["heads"]) == 1) for result in lost)
        every = sum(all(result["turned"][-1]["hits"]) for result in lost)
        yield f"of {len(lost)} that only full attention finds, a single head brings back {one}, all heads tried {every}"


RESULT = ResultType(
    "Heads that lose needles",
    of_task("heads"),
    {"Heads turned back": head_table, "Every needle": needle_table},
    (restored_figure, token_figure),
    group="Accuracy",
)
