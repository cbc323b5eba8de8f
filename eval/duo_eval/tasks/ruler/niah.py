"""RULER's needles: keys with values, hidden in a repeated sentence, in essays or in other needles (section 3)."""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import ClassVar, Literal

import numpy as np

from duo_eval.tasks.ruler.kind import Example, Kind, Material, divided, prompts
from duo_eval.tasks.ruler.words import adjectives, nouns

# Depths of needles in essays, as fractions of the sentences.
DEPTHS = np.linspace(0, 1, 40)


@dataclass(frozen=True)
class Niah(Kind):
    """Needles; the size is the number of lines, or of words of an essay."""

    haystack: Literal["repeat", "essay", "needle"]
    """A repeated sentence; real text; or needles that no question asks for."""
    key: Literal["words", "uuids"] = "words"
    """The kind of key."""
    value: Literal["numbers", "uuids"] = "numbers"
    """The kind of value."""
    num_keys: int = 1
    """Keys in the text."""
    num_values: int = 1
    """Values of each key."""
    num_queries: int = 1
    """Keys that are asked for."""

    max_new_tokens: ClassVar[int] = 128

    def least(self) -> int:
        """A line for each needle; in essays, enough sentences between which to put them."""
        needles = self.num_keys * self.num_values
        return 50 if self.haystack == "essay" else needles

    def make(self, rng: Random, size: int, material: Material) -> Example:
        """See `Kind.make`."""
        keys = [_DRAW[self.key](rng) for _ in range(self.num_keys)]
        values = [[_DRAW[self.value](rng) for _ in range(self.num_values)] for _ in keys]
        sentence = prompts("prepare_niah.py", "NEEDLE")
        needles = [self._needle(sentence, key, value) for key, row in zip(keys, values, strict=True) for value in row]
        rng.shuffle(needles)
        asked = rng.sample(range(self.num_keys), self.num_queries)
        if self.haystack == "essay":
            # A text that is too short is repeated.
            words = material.words * -(-size // len(material.words))
            context = _between_sentences(rng, words[:size], needles)
        else:
            if self.haystack == "repeat":
                lines = [prompts("prepare_niah.py", "haystack")] * size
            else:
                others = ((_DRAW[self.key](rng), _DRAW[self.value](rng)) for _ in range(size))
                lines = [self._needle(sentence, *other) for other in others]
            for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        return self._example(context, [keys[number] for number in asked], [values[number] for number in asked])

    def _needle(self, sentence: str, key: str, value: str) -> str:
        return sentence.format(type_needle_v=self.value, key=key, value=value)

    def _example(self, context: str, keys: list[str], values: list[list[str]]) -> Example:
        """The question, in the singular if there is one answer."""
        template: str = prompts("niah_utils.py", "TEMPLATE")
        question = template.rpartition("\n")[2]
        start = "What are all the"
        if not question.startswith(start):
            raise ValueError(f"lm-eval's question begins otherwise than {start!r}: {question!r}")
        answer, kind = f"The{question.removeprefix(start).rstrip('?')} are", str(self.value)
        if self.num_queries * self.num_values == 1:
            kind = kind.removesuffix("s")
            answer = answer.removesuffix("are") + "is"
            for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
                template = template.replace(many, one)
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        filled = {"type_needle_v": kind, "query": query}
        outputs = tuple(value for row in values for value in row)
        return Example(*divided(template, context=context, **filled), answer.format(**filled), outputs)


def _between_sentences(rng: Random, words: tuple[str, ...], needles: list[str]) -> str:
    """The text with needles at random depths, each between two sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(words))
    depths = sorted(rng.sample(DEPTHS.tolist(), len(needles)))
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        sentences.insert(int(depth * len(sentences)), needle)
    return " ".join(sentences)


@cache
def _pairs() -> tuple[list[str], list[str]]:
    return adjectives(), nouns()


def _word(rng: Random) -> str:
    return "-".join(rng.choice(words) for words in _pairs())


def _number(rng: Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _uuid(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAW: dict[str, Callable[[Random], str]] = {"words": _word, "numbers": _number, "uuids": _uuid}
