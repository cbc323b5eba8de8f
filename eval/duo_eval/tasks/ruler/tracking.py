"""Variable tracking (RULER, section 3): which variables have a value, through a chain of assignments in noise."""

import itertools
import string
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from duo_eval.tasks.ruler.kind import Example, Kind, Material, divided, prompts

# Lines of noise in the worked example, and letters of its names: fewer than in the question, so that none is in both.
EXAMPLE_LINES, EXAMPLE_LETTERS = 8, 3


@dataclass(frozen=True)
class Tracking(Kind):
    """One chain, after a short one with its answer; the size is the number of lines of noise."""

    hops: int = 4
    """Assignments from one variable to the next."""
    letters: int = 5
    """Letters of a name."""

    max_new_tokens: ClassVar[int] = 30

    def least(self) -> int:
        """Lines for the chain to lie between."""
        return self.hops + 1

    def make(self, rng: Random, size: int, material: Material) -> Example:
        """See `Kind.make`."""
        example = self._chain(rng, EXAMPLE_LINES, EXAMPLE_LETTERS)
        question = self._chain(rng, size, self.letters)
        before = f"{example.text} {example.answer} {' '.join(example.outputs)}\n\n\n"
        return replace(question, context=before + question.context)

    def _chain(self, rng: Random, lines: int, letters: int) -> Example:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [] if name in names else [name]
        value = str(rng.randrange(10_000, 100_000))
        assignments = [f"VAR {names[0]} = {value}"]
        assignments += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
        noise = prompts("vt_utils.py", "noise").strip()
        context = [noise] * lines
        # Insert from the last on: places then count only lines of noise, and the chain keeps its order.
        places = sorted(rng.sample(range(lines), len(assignments)), reverse=True)
        for place, assignment in zip(places, reversed(assignments), strict=True):
            context.insert(place, assignment)
        texts = prompts("vt_utils.py", "CONFIG")["variable_tracking"]
        filled = {"query": value, "num_v": len(names)}
        parts = divided(texts["template"], context="\n".join(context), **filled)
        return Example(*parts, texts["answer_prefix"].strip().format(**filled), tuple(names))
