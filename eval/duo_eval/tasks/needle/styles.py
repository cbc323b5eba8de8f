"""Styles of needles: hidden sentence, question and score. A style is a function here and its row in `STYLES`.

Knows only text: no tokenizer, no haystack. Every score reaches 1.0 with the right answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from duo_train.data.vocabulary import HELD_OUT


@dataclass(frozen=True)
class Needle:
    """One sentence to find.

    Attributes:
        sentence: the text to hide.
        question: the question after the text.
        answer: the first words of the answer, given so that a small model need not find its form.
        key: the words that an answer must contain.
        score: function of an answer and the key, 0 to 1.
        max_new_tokens: room for the answer.
    """

    sentence: str
    question: str
    answer: str
    key: tuple[str, ...]
    score: Callable[[str, tuple[str, ...]], float]
    max_new_tokens: int

    @property
    def right(self) -> str:
        """The right answer after its first words, as the hidden sentence has it."""
        return self.sentence.partition(self.answer)[2].rstrip(".\n")


def words_found(answer: str, key: tuple[str, ...]) -> float:
    """The fraction of key words that an answer has, as whole words, in any order and case."""
    words = set(re.findall(r"\w+", answer.lower()))
    return sum(word.lower() in words for word in key) / len(key)


def first_number(answer: str, key: tuple[str, ...]) -> float:
    """1 if the first number of an answer is the key; later guesses do not count."""
    return float(re.findall(r"\d+", answer)[:1] == list(key))


def original(rng: np.random.Generator) -> Needle:
    """The needle of the first such test (Kamradt 2023): the same in every text, scored by its key words."""
    del rng  # Only the text around the needle differs.
    return Needle(
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n",
        "\nBased on the text above: what is the best thing to do in San Francisco?",
        "The best thing to do in San Francisco is",
        ("sandwich", "Dolores", "Park", "sunny", "day"),
        words_found,
        32,
    )


def digits(rng: np.random.Generator) -> Needle:
    """A passkey of five digits (Mohtashami & Jaggi 2023): right or wrong."""
    key = str(rng.integers(10000, 100000))
    # Measured on SmolLM2-135M-Instruct at 1024 tokens: 8 of 8 found with these words, 2 of 8 with "the pass key is".
    return Needle(
        f"\nRemember this. The passkey of the vault is {key}.\n",
        "\nBased on the text above: what is the passkey of the vault?",
        "The passkey of the vault is",
        (key,),
        first_number,
        12,
    )


def words(rng: np.random.Generator) -> Needle:
    """A passkey of five words that no gate was trained on: scored by how many of them an answer has."""
    key = tuple(rng.choice(HELD_OUT, 5, replace=False).tolist())
    return Needle(
        f"\nRemember this. The passkey of the vault is: {' '.join(key)}.\n",
        "\nBased on the text above: what is the passkey of the vault?",
        "The passkey of the vault is:",
        key,
        words_found,
        24,
    )


STYLES: dict[str, Callable[[np.random.Generator], Needle]] = {"original": original, "digits": digits, "words": words}
