"""Asking a model with several methods at several KV budgets: flags, checks and the loop that every task shares.

Knows no task: it says which jobs there are, what is asked in one, and how an answer is scored.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.pools import Duo
from duo_eval.methods.registry import Method, greedy, method
from duo_eval.runner.record import Record, fingerprint, sha256
from duo_eval.stats.scores import FULL
from duo_jax import HeadPattern, Model, load_model, load_tokenizer
from duo_jax.checkpoint.load import open_source
from duo_jax.checks import check_vocabulary


@dataclass(frozen=True)
class Job:
    """One question to one method; a task adds fields that say which."""

    method: str
    """As named on the command line."""
    budget: float
    """Fraction of full attention's KV bytes."""


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, and what its answer is worth.

    Attributes:
        tokens: the whole prompt; all of it goes through the method.
        max_new_tokens: room for the answer.
        score: of the text of an answer, 0 to 1.
        facts: what else its record should say, such as the right answer.
        later: last tokens of the prompt that the method does not know while it takes in the rest; see `greedy`.
    """

    tokens: Int32[np.ndarray, "T"]
    max_new_tokens: int
    score: Callable[[str], float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    later: int = 0


@dataclass(frozen=True)
class Asking:
    """Who is asked: a model, with these methods at these budgets."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    methods: tuple[str, ...] = (FULL, "duo")
    """Ways to hold the context: full, duo (the pattern published for the model), duo=FOLDER, duo=PUBLISHED-NAME,
    random-heads, streamingllm, h2o, tova, snapkv, fastgen; settings after a colon: snapkv:window=64,pool=5."""
    budgets: tuple[float, ...] = (0.5,)
    """Fractions of full attention's KV bytes at the prompt's length; full attention takes all of them once."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    chat: bool = True
    """Ask in the tokenizer's chat template, where it has one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of weights and cache; the checkpoint's own by default, float32 on a CPU."""

    @cached_property
    def trained_positions(self) -> int:
        """Tokens that the model was trained for; no weights are read."""
        return open_source(self.model, weights=False).config.trained_positions

    def cells(self) -> tuple[tuple[str, float], ...]:
        """Every method at every budget that it can have.

        Raises:
            ValueError: nothing to ask, something twice, or a budget outside (0, 1].
        """
        for name, values in (("methods", self.methods), ("budgets", self.budgets)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{name} needs at least one, and each of them once, got {values}")
        if not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"--budgets are fractions of full attention's KV bytes, in (0, 1], got {self.budgets}")
        return tuple((name, budget) for name in self.methods for budget in ((1.0,) if name == FULL else self.budgets))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.model)

    def resolved(self) -> dict[str, Method]:
        """Every method by its name on the command line.

        Raises:
            ValueError: an unknown method, or one without what it needs.
        """
        # The rules that evict have sizes of their own.
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        # The patterns published for models have their names.
        published = f"duo={Path(self.model).name.lower()}"
        return {
            text: method(re.sub(r"^duo(?=:|$)", published, text), tokenizer=self.tokenizer, defaults=sizes)
            for text in self.methods
        }

    def ask(
        self,
        out: Path,
        task: Mapping[str, Any],
        jobs: Iterable[J],
        question: Callable[[J], Question],
        *,
        data: Mapping[str, str] | None = None,
        longest: int,
        shortest: int | None,
    ) -> None:
        """Do every job that the file lacks, one after the other; an interrupt loses the one in hand.

        Args:
            out: the file of results.
            task: what the file is about, beside the model.
            jobs: in an order in which every stage is a usable result.
            question: makes the prompt of a job; the same for every method and budget.
            data: fingerprints of files that questions are made of, by name.
            longest: tokens of the longest prompt and answer.
            shortest: tokens of the shortest prompt, or a few less: a budget that a method cannot meet there is refused
                at once. None: not known. A single prompt too short for a budget gets a record without a score.

        Raises:
            ValueError: anything in flags or file that cannot be right, before anything is computed.
        """
        if longest > self.trained_positions:
            raise ValueError(
                f"{longest} tokens of prompt and answer are more than the {self.trained_positions} that {self.model} "
                "was trained for: ask for less"
            )
        methods = self.resolved()
        behind = {name: _behind(found) for name, found in methods.items()}
        own = {name: getattr(self, name) for name in ("model", "sink_size", "recent_size", "chat", "dtype")}
        record = Record.open(out, {**task, **own}, behind | dict(data or {}))
        missing = record.missing(jobs)
        if not missing:
            print(f"{out} had all of it")
            return
        question(missing[0])  # Data that cannot be asked for is refused before the weights are read.
        model = load_model(self.model, dtype=self.dtype)
        for name, budget in self.cells():
            if shortest is not None:
                methods[name].check(model, budget, shortest)
        with record.writing(dtype=str(model.dtype)) as append:
            made: tuple[J, Question] | None = None
            for job in tqdm(missing, unit="question", dynamic_ncols=True):
                asked = replace(job, method="", budget=0.0)
                if made is None or made[0] != asked:
                    made = asked, question(job)
                check_vocabulary(model.config, made[1].tokens)
                try:
                    result = answered(made[1], methods[job.method], job.budget, model, self.tokenizer)
                except ValueError as error:  # Only the budget can be wrong now.
                    result = {"score": None, "refused": str(error), "tokens": len(made[1].tokens)}
                append(job, result)
        refused = [result["refused"] for result in record.results if "refused" in result]
        print(f"{out} has all of it" + (f", {len(refused)} without a score: {refused[0]}" if refused else ""))


def _behind(method: Method) -> str:
    """What a name stands for: gates, or settings, which a later version may change."""
    return fingerprint(HeadPattern.load(method.pattern)) if isinstance(method, Duo) else sha256(repr(method).encode())


def answered(
    question: Question, method: Method, budget: float, model: Model, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A question's record: the score, the answer, and what it took."""
    begin = time.perf_counter()
    tokens, memory = greedy(
        method,
        model,
        question.tokens,
        max_new_tokens=question.max_new_tokens,
        eos_ids=model.config.eos_ids,
        budget=budget,
        later=question.later,
    )
    seconds = time.perf_counter() - begin
    answer = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return {
        "score": question.score(answer),
        "answer": answer,
        **question.facts,
        "tokens": len(question.tokens),
        "new_tokens": len(tokens),
        "kv_bytes": memory.nbytes,
        "held_bytes": memory.held_nbytes,
        "peak_bytes": memory.peak_nbytes,
        "seconds": round(seconds, 3),
    }
