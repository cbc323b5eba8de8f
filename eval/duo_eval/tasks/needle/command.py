"""`duo eval needle`: lengths and depths, the needles hidden there, and a map of the scores."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from duo_train.data.haystack import DEFAULT, load_haystack
from jaxtyping import Int32

from duo_eval.runner.record import sha256
from duo_eval.runner.run import Comparison, MethodJob, Question
from duo_eval.show.curves import score_curves
from duo_eval.show.heatmaps import needle_maps
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.show.score_table import score_summary, score_table
from duo_eval.stats.scores import in_words, scored
from duo_eval.tasks.needle.insert import NeedlePrompt, insert_needle
from duo_eval.tasks.needle.styles import STYLES, Needle
from duo_eval.tasks.prompt import QuestionLater, later_setting
from duo_jax.arguments import MOST_SEED, ArgumentError, whole_number
from duo_jax.text.tokens import encode

# Depths are stored with four digits.
MOST_DEPTHS = 10_001


@dataclass(frozen=True)
class Cell(MethodJob):
    """One needle, for one method."""

    length: int
    depth: float
    sample: int


@dataclass(frozen=True)
class NeedleTask:
    """Hide a sentence at many depths of long texts, ask for it with several methods, draw a map (paper section 3.2)."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = Comparison()
    out: Path = Path("needle.jsonl")
    """File to append to; results that it already has are not computed again. The maps are written next to it."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of prompt and answer."""
    depths: int = 10
    """Depths of the needle, evenly spaced from the start of the text to its end."""
    samples: int = 1
    """Needles in each cell: other keys, other stretches of text."""
    style: Literal["original", "digits", "words"] = "digits"
    """The sentence about San Francisco, scored by its key words; a passkey of five digits, right or wrong; one of five
    words, scored by how many come."""
    question_later: QuestionLater = False
    haystack: str = DEFAULT
    """Text to hide it in: pydoc (Python's own reference pages), essays (fetched by pip), a text or .jsonl[.zst] file, a
    folder of them, or a hub data set such as hub:kmfoda/booksum:chapter. A text that is too short is repeated."""
    haystack_chars: int | None = 20_000_000
    """Characters of the haystack to read at most."""
    chat: bool = True
    """Ask in the tokenizer's chat template, if it has one."""
    seed: int = 0
    """Decides keys and stretches of text."""

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: no length, or a number out of range.
        """
        if not self.lengths:
            raise ValueError("--lengths must have at least one length")
        for length in self.lengths:
            whole_number("lengths", length, self.room + 1, way=f"an answer has {self.room} tokens")
        whole_number("samples", self.samples, 1)
        whole_number("depths", self.depths, 2, MOST_DEPTHS)
        if self.haystack_chars is not None:
            whole_number("haystack_chars", self.haystack_chars, 1, MOST_SEED)

    def run(self) -> None:
        """Run the missing questions, cell by cell, and plot."""
        self.check()
        settings = asdict(self)
        shared = {name: settings[name] for name in ("depths", "style", "haystack", "haystack_chars", "chat", "seed")}
        shared |= later_setting(self.question_later)
        results = self.comparison.run(
            self.out,
            {"task": "needle", **shared},
            self._jobs(),
            self.question,
            data={"haystack": sha256(self.text.encode())},
            longest=max(self.lengths),
            shortest=max(min(self.lengths) - self.room, 1),
        )
        print("\n".join(in_words(scored(results))))
        if scored(results):
            RESULT.show_figures(self.out)

    def _jobs(self) -> Iterator[Cell]:
        """Whole maps one after the other, each from its shortest length on; a question goes to all methods in turn."""
        for sample in range(self.samples):
            for length in sorted(self.lengths):
                for depth in np.linspace(0, 1, self.depths).round(4).tolist():
                    for method, budget in self.comparison.cells():
                        yield Cell(method, budget, length, depth, sample)

    @property
    def room(self) -> int:
        """Tokens of the answer."""
        return STYLES[self.style](np.random.default_rng(0)).max_new_tokens

    def question(self, job: Cell) -> Question:
        """The same needle in the same text for every method."""
        try:
            needle, needle_prompt = self.hide(job.length, job.depth, job.sample)
        except ValueError as error:
            raise ArgumentError("lengths", str(error)) from None
        facts: dict[str, Any] = {"key": " ".join(needle.key), "position": needle_prompt.position}
        later = needle_prompt.question_length if self.question_later else 0
        return Question(
            needle_prompt.tokens, needle.max_new_tokens, lambda answer: needle.score(answer, needle.key), facts, later
        )

    def hide(self, length: int, depth: float, sample: int) -> tuple[Needle, NeedlePrompt]:
        """The needle of a cell, and its prompt.

        Raises:
            ValueError: a length that has no room for it, in words that follow the name of its flag.
        """
        rng = np.random.default_rng((self.seed, sample, length, round(1e4 * depth)))
        needle = STYLES[self.style](rng)
        # A text shorter than the cell is repeated. The stretch that is drawn depends on no other cell.
        hay = self._repeated[: max(len(self.hay), length)]
        tokenizer, prompt_length = self.comparison.tokenizer, length - needle.max_new_tokens
        try:
            return needle, insert_needle(
                tokenizer, hay, needle, rng, length=prompt_length, depth=depth, use_chat=self.chat
            )
        except ValueError as error:
            raise ValueError(f"of {length} has {needle.max_new_tokens} tokens for the answer, and {error}") from None

    @cached_property
    def text(self) -> str:
        """The haystack."""
        return load_haystack(self.haystack, max_chars=self.haystack_chars)

    @cached_property
    def hay(self) -> Int32[np.ndarray, "S"]:
        """Tokens of the haystack."""
        return np.asarray(encode(self.comparison.tokenizer, self.text), np.int32)

    @cached_property
    def _repeated(self) -> Int32[np.ndarray, "S"]:
        """The haystack, repeated if it is shorter than the longest prompt."""
        if len(self.hay) < max(self.lengths):
            print(f"{self.haystack!r} has {len(self.hay)} tokens: repeated in longer prompts")
        return np.resize(self.hay, max(len(self.hay), *self.lengths))


RESULT = ResultType(
    "Needle",
    of_task("needle"),
    {"Scores": score_summary, "Every cell": score_table},
    (needle_maps, score_curves),
    group="Accuracy",
)
