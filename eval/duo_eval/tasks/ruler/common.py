"""Common words (RULER, section 3): ten words that come often, among many that come seldom, in a numbered list."""

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from duo_eval.tasks.ruler.kind import Example, Kind, Material, divided, prompts
from duo_eval.tasks.ruler.words import all_words

COMMON = 10
# Below this length words are repeated less often, so that enough different words fit.
SHORT = 4096


@dataclass(frozen=True)
class CommonWords(Kind):
    """A list after a short one with its answer; the size is the number of different words."""

    max_new_tokens: ClassVar[int] = 120
    joint: ClassVar[str] = "\n\n"

    def least(self) -> int:
        """The common words, and one more."""
        return COMMON + 1

    def make(self, rng: Random, size: int, material: Material) -> Example | None:
        """See `Kind.make`."""
        if size > len(all_words()):
            return None
        short = material.length < SHORT
        example = _list(rng, *((20, 3, 1) if short else (40, 10, 3)))
        question = _list(rng, size, *((6, 1) if short else (30, 3)))
        answers = " ".join(f"{number}. {word}" for number, word in enumerate(example.outputs, 1))
        before = f"{example.text} {example.answer} {answers}\n"
        return replace(question, context=before + question.context)


def _list(rng: Random, size: int, common_repeats: int, other_repeats: int) -> Example:
    # The same common words in every size.
    words = rng.sample(all_words(), len(all_words()))[:size]
    common = words[:COMMON]
    listed = common * common_repeats + words[COMMON:] * other_repeats
    rng.shuffle(listed)
    texts = prompts("cwe_utils.py", "CONFIG")
    context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Example(*divided(texts["template"], context=context), texts["answer_prefix"].strip(), tuple(common))
