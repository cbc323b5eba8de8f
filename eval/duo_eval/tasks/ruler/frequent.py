"""Frequent words (RULER, section 3): the three most frequent of made-up words, whose counts follow a zeta law."""

import string
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np
from scipy.special import zeta

from duo_eval.tasks.ruler.kind import Example, Kind, Material, divided, prompts

LETTERS = 6
# One different word for this many tokens of the example.
TOKENS_PER_WORD = 50
NOISE = "..."


@dataclass(frozen=True)
class FrequentWords(Kind):
    """The size is the number of words, most of them noise."""

    alpha: float = 2.0
    """Exponent: the word of rank k takes a part in proportion to k to the minus alpha."""

    max_new_tokens: ClassVar[int] = 50

    def least(self) -> int:
        """Enough words that the three most frequent appear, each a different number of times."""
        return 64

    def make(self, rng: Random, size: int, material: Material) -> Example:
        """See `Kind.make`."""
        words: dict[str, None] = {NOISE: None}  # The most frequent word is noise.
        while len(words) < max(material.length // TOKENS_PER_WORD, 4):
            words["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
        ranks = np.arange(1, len(words) + 1)
        counts = (size * ranks**-self.alpha / zeta(self.alpha)).astype(int)
        text = [word for word, count in zip(words, counts.tolist(), strict=True) for _ in range(count)]
        rng.shuffle(text)
        texts = prompts("fwe_utils.py", "CONFIG")
        parts = divided(texts["template"], context=" ".join(text))
        return Example(*parts, texts["answer_prefix"].strip(), tuple(list(words)[1:4]))
