"""The loop that every evaluation shares, and the flags and checks of those that compare methods at several KV budgets.

Knows no task: a task lists its jobs, says what is asked in each, and how an answer is scored.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.patterns import Duo
from duo_eval.methods.registry import Method, method, reply
from duo_eval.runner.record import Record, Result, fingerprint, sha256
from duo_eval.stats.scores import FULL
from duo_jax import HeadPattern, Model, load_model, load_tokenizer
from duo_jax.certified import inference
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config, open_source
from duo_jax.checks import check_vocabulary
from duo_jax.model.precision import EmbedDtype, FloatDtype, WeightDtype
from duo_jax.plan import any_pattern
from pallas_kernels.types import Request

J = TypeVar("J")
# From jobs to each job's result, as they are finished.
Answer = Callable[[Sequence[J]], Iterator[tuple[J, Mapping[str, Any]]]]


def run(record: Record, jobs: Iterable[J], prepare: Callable[[list[J]], tuple[str, Answer[J]]], *, unit: str) -> None:
    """Do every job without a result, in order, and store each result at once: an interrupt loses only unfinished work.

    Args:
        record: the file of results.
        jobs: in an order in which every stage is a usable result.
        prepare: called with the missing jobs if there are any. Loads what they need, raises ValueError for settings
            that cannot work, and returns the data type of the computation and the function that does the jobs.
        unit: what a job is called in the progress bar.
    """
    missing = record.missing(jobs)
    if missing:
        dtype, answer = prepare(missing)
        with record.writing(dtype=dtype) as append, tqdm(total=len(missing), unit=unit, dynamic_ncols=True) as bar:
            for job, result in answer(missing):
                append(job, result)
                bar.update()
    print(f"{record.path} is {'' if missing else 'already '}complete")


@dataclass(frozen=True)
class MethodJob:
    """One question for one method; a task adds fields that identify the question."""

    method: str
    """As on the command line."""
    budget: float
    """Fraction of full attention's KV bytes."""


M = TypeVar("M", bound=MethodJob)


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, and how its answer is scored.

    Attributes:
        tokens: the whole prompt; all of it goes through the method.
        max_new_tokens: room for the answer.
        score: function from the text of an answer to its score, 0 to 1.
        facts: further fields of the result, such as the right answer.
        later: last tokens of the prompt that the method does not know during the prefill of the rest; see `greedy`.
    """

    tokens: Int32[np.ndarray, "T"]
    max_new_tokens: int
    score: Callable[[str], float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    later: int = 0

    def ask(self, method: Method, budget: float, model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Generate an answer; returns the score, the answer, and the memory and time that it took."""
        begin = time.perf_counter()
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "later": self.later, "budget": budget}
        text, new_tokens, memory = reply(method, model, tokenizer, self.tokens, **options)
        seconds = time.perf_counter() - begin
        return {
            "score": self.score(text),
            "answer": text,
            **self.facts,
            "tokens": len(self.tokens),
            "new_tokens": new_tokens,
            "kv_bytes": memory.nbytes,
            "held_bytes": memory.held_nbytes,
            "peak_bytes": memory.peak_nbytes,
            "read_bytes": memory.held_nbytes if memory.read_nbytes is None else memory.read_nbytes,
            "seconds": round(seconds, 3),
        }


@dataclass(frozen=True)
class Comparison:
    """A model, and the methods and budgets that are compared on it."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    methods: tuple[str, ...] = (FULL, "duo")
    """Ways to hold the context: full, duo (the pattern published for the model), duo=FOLDER, duo=PUBLISHED-NAME,
    duo+quest, random-heads, streamingllm, h2o, tova, snapkv, fastgen, expected-attention, kvzip-tokens; settings after
    a colon: snapkv:window=64,pool=5."""
    budgets: tuple[float, ...] = (0.5,)
    """Fractions of full attention's KV bytes at the prompt's length. Full attention and duo:sparsity=FRACTION, whose
    size is fixed, are run once, at budget 1."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    dtype: FloatDtype | None = None
    """Data type of weights and cache; the checkpoint's own by default, float32 on a CPU."""
    weight_dtype: WeightDtype | None = None
    """Quantize the weights of linear maps; w8a8 multiplies integers, int4-32 has a scale for every 32 channels."""
    embed_dtype: EmbedDtype | None = None
    """Quantize embeddings and head too, which keep their data type by default."""

    def requests(self) -> list[Request]:
        """The attention that methods run, for certification."""
        config = open_config(self.model).with_dtypes(dtype=self.dtype)
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        return inference(config, None, *(any_pattern(config, sparsity, **sizes) for sparsity in (0.5, 1.0)))

    @cached_property
    def trained_positions(self) -> int:
        """Longest sequence that the model was trained for; reads no weights."""
        return open_source(self.model, weights=False).config.trained_positions

    def check_length(self, longest: int) -> None:
        """Raise ValueError if `longest`, tokens of prompt and answer, is more than the model was trained for."""
        if longest > self.trained_positions:
            raise ValueError(
                f"{longest} tokens of prompt and answer are more than the {self.trained_positions} that {self.model} "
                "was trained for: ask for less"
            )

    def cells(self) -> tuple[tuple[str, float], ...]:
        """Every method at each of its budgets.

        Raises:
            ValueError: no method, a duplicate, or a budget outside (0, 1].
        """
        for name, values in (("methods", self.methods), ("budgets", self.budgets)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{name} needs at least one value, and each of them once, got {values}")
        if not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"--budgets are fractions of full attention's KV bytes, in (0, 1], got {self.budgets}")
        return tuple(
            (name, budget)
            for name, each in self.resolved.items()
            for budget in ((1.0,) if each.is_fixed else self.budgets)
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.model)

    @cached_property
    def resolved(self) -> dict[str, Method]:
        """Every method by its name on the command line.

        Raises:
            ValueError: an unknown method, or one without what it needs.
        """
        # Methods that evict tokens have sizes of their own.
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        return {text: method(text, model=self.model, tokenizer=self.tokenizer, defaults=sizes) for text in self.methods}

    def run(
        self,
        out: Path,
        task: Mapping[str, Any],
        jobs: Iterable[M],
        question: Callable[[M], Any],
        *,
        answer: Callable[[Model, Sequence[M]], Iterator[tuple[M, Mapping[str, Any]]]] | None = None,
        data: Mapping[str, str] | None = None,
        longest: int,
        shortest: int | None,
    ) -> list[Result]:
        """Do the missing jobs; returns all results of the file.

        Args:
            out: the file of results.
            task: settings of the task, stored in the file with those of the model.
            jobs: in an order in which every stage is a usable result.
            question: makes the `Question` of a job; the same for every method and budget.
            answer: yields each job with its result; by default every question is asked by itself.
            data: fingerprints of the files that questions are made of, by name.
            longest: tokens of the longest prompt and answer.
            shortest: tokens of the shortest prompt, or slightly fewer: a budget that a method cannot meet at this
                length is refused before anything is computed. None: unknown. A prompt that is too short for a budget
                gets a result without a score.

        Raises:
            ValueError: flags or a file that cannot be right, before anything is computed.
        """
        self.check_length(longest)
        dtypes: dict[str, Any] = {name: getattr(self, name) for name in ("dtype", "weight_dtype", "embed_dtype")}
        own = {name: getattr(self, name) for name in ("model", "sink_size", "recent_size")} | dtypes
        sources = {name: method_fingerprint(each) for name, each in self.resolved.items()} | dict(data or {})
        sources |= {"weights": weights_fingerprint(self.model)}
        record = Record.open(out, {**task, **own}, sources)

        def prepare(missing: list[M]) -> tuple[str, Answer[M]]:
            question(missing[0])  # Refuses bad data before the weights are read.
            model = load_model(self.model, **dtypes)
            for name, budget in self.cells():
                if shortest is not None or self.resolved[name].is_fixed:
                    self.resolved[name].check(model, budget, shortest or 1)
            return str(model.dtype), partial(answer or partial(self._one_by_one, question), model)

        run(record, jobs, prepare, unit="question")
        reasons = [result["refused"] for result in record.results if "refused" in result]
        if reasons:
            print(f"{len(reasons)} without a score: {reasons[0]}")
        return record.results

    def _one_by_one(
        self, question: Callable[[M], Question], model: Model, jobs: Sequence[M]
    ) -> Iterator[tuple[M, dict[str, Any]]]:
        previous: tuple[M, Question] | None = None
        for job in jobs:
            same = replace(job, method="", budget=0.0)
            if previous is None or previous[0] != same:
                previous = same, question(job)
            asked = previous[1]
            check_vocabulary(model.config, asked.tokens)
            try:
                yield job, asked.ask(self.resolved[job.method], job.budget, model, self.tokenizer)
            except ValueError as error:  # Everything else was checked, so the budget is too small.
                yield job, refused(error, len(asked.tokens))


def refused(error: ValueError, num_tokens: int) -> dict[str, Any]:
    """The result of a prompt that a method cannot hold within its budget."""
    return {"score": None, "refused": str(error), "tokens": num_tokens}


def method_fingerprint(method: Method) -> str:
    """Fingerprint of the method's gates or settings, whose defaults may change between versions."""
    if not isinstance(method, Duo):
        return sha256(repr(method).encode())
    gates = fingerprint(HeadPattern.load(method.pattern))
    # A file has the settings of `duo` elsewhere; the path of a pattern may change.
    return gates if type(method) is Duo else sha256(repr(replace(method, pattern=gates)).encode())
