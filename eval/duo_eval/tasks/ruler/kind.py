"""The interface of a kind of RULER task, which makes examples of any size; and the largest example that fits a length.

Knows no tokenizer: a function measures the length of an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from duo_eval.tasks.lm_eval.files import literal, tasks_folder


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        context: the long text, with everything before the question.
        question: the rest of the prompt, which asks about the text.
        answer: the beginning of the answer.
        outputs: strings that an answer must contain: all of them or any, depending on the task.
    """

    context: str
    question: str
    answer: str
    outputs: tuple[str, ...]

    @property
    def text(self) -> str:
        """Context and question."""
        return self.context + self.question


@dataclass(frozen=True)
class Material:
    """The material of examples.

    Attributes:
        words: the words of a long real text.
        questions: for question answering, a `qa.Questions`.
        length: most tokens of the example and its answer.
    """

    words: tuple[str, ...]
    questions: Any
    length: int


class Kind(ABC):
    """A kind of task: a frozen dataclass whose fields distinguish its tasks."""

    # Tokens of the answer.
    max_new_tokens: ClassVar[int]
    # "all": the score is the fraction of outputs in an answer. "any": one of them is enough.
    match: ClassVar[Literal["all", "any"]] = "all"
    # Between question and answer, where there is no chat template.
    joint: ClassVar[str] = " "
    # Examples to draw until one fits at its least size.
    attempts: ClassVar[int] = 1

    @abstractmethod
    def least(self) -> int:
        """The smallest size with room for everything that an example must contain."""

    @abstractmethod
    def make(self, rng: Random, size: int, material: Material) -> Example | None:
        """An example; `size` counts the parts of its context. None: the material has fewer.

        From the same state of `rng`, every size has the same question.
        """


def fitted(
    kind: Kind, seed: tuple[Any, ...], material: Material, count: Callable[[Example], int]
) -> tuple[Example, int]:
    """The largest example with at most `material.length` tokens of prompt and answer, and its size.

    Raises:
        ValueError: a length without room for the smallest example.
    """
    shortest = []
    for attempt in range(kind.attempts):

        def make(size: int, attempt: int = attempt) -> Example | None:
            example = kind.make(Random(repr((*seed, attempt))), size, material)
            if example is None:
                return None
            shortest.append(count(example) + kind.max_new_tokens)
            return example if shortest[-1] <= material.length else None

        low, high = kind.least(), 2 * kind.least()
        best = make(low)
        if best is None:
            continue
        while (larger := make(high)) is not None:
            best, low, high = larger, high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if (example := make(middle)) is None:
                high = middle
            else:
                best, low = example, middle
        return best, low
    least = f"{min(shortest)} tokens" if shortest else "more text than there is"
    raise ValueError(f"the smallest example takes {least}, prompt and answer, got a length of {material.length}")


def prompts(file: str, name: str) -> Any:
    """A text of lm-eval's RULER."""
    return literal(tasks_folder("ruler") / file, name)


def divided(template: str, *, context: str, **filled: Any) -> tuple[str, str]:
    """A filled template of lm-eval in two parts, divided where kvpress's data of RULER are: its context, its question.

    Whitespace between the two is part of the context.
    """
    before, _, after = template.partition("{context}")
    question = after.lstrip()
    between = after.removesuffix(question)
    return before.format(**filled) + context + between, question.format(**filled)
