"""What every kind of RULER task offers: an example of any size; and the largest one that fits a length.

Knows no tokenizer: how long an example is, a function says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from duo_eval.tasks.lm_eval_files import literal, tasks_folder


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        text: what is asked, the long context within it.
        answer: what the answer begins with.
        outputs: what an answer must have: all of them, or any, as the task says.
    """

    text: str
    answer: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What examples are made of, beside chance.

    Attributes:
        words: the words of a long real text.
        questions: for question answering, a `qa.Questions`.
        length: tokens that the example may have, its answer included.
    """

    words: tuple[str, ...]
    questions: Any
    length: int


class Kind(ABC):
    """A kind of task: a frozen dataclass whose fields tell its tasks apart."""

    # Tokens of the answer.
    max_new_tokens: ClassVar[int]
    # Whether an answer must have all outputs, and its score is their fraction; or any of them.
    match: ClassVar[Literal["all", "any"]] = "all"
    # Between question and answer, where there is no chat template.
    joint: ClassVar[str] = " "
    # Examples to draw until one fits at its least size.
    attempts: ClassVar[int] = 1

    @abstractmethod
    def least(self) -> int:
        """The smallest size that has room for everything that must be in an example."""

    @abstractmethod
    def make(self, rng: Random, size: int, material: Material) -> Example | None:
        """An example; `size` counts what its context is made of. None: there is not so much.

        From one state of `rng`, every size asks for the same.
        """


def fitted(
    kind: Kind, seed: tuple[Any, ...], material: Material, count: Callable[[Example], int]
) -> tuple[Example, int]:
    """The largest example of which prompt and answer have at most `material.length` tokens, and its size.

    Raises:
        ValueError: a length in which the smallest one has no room.
    """
    shortest = []
    for attempt in range(kind.attempts):

        def make(size: int, attempt: int = attempt) -> Example | None:
            made = kind.make(Random(repr((*seed, attempt))), size, material)
            if made is None:
                return None
            shortest.append(count(made) + kind.max_new_tokens)
            return made if shortest[-1] <= material.length else None

        low, high = kind.least(), 2 * kind.least()
        best = make(low)
        if best is None:
            continue
        while (larger := make(high)) is not None:
            best, low, high = larger, high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if (made := make(middle)) is None:
                high = middle
            else:
                best, low = made, middle
        return best, low
    least = f"{min(shortest)} tokens" if shortest else "more than there is"
    raise ValueError(f"the smallest example takes {least}, prompt and answer, got a length of {material.length}")


def prompts(file: str, name: str) -> Any:
    """A text of lm-eval's RULER."""
    return literal(tasks_folder("ruler") / file, name)
