"""Question answering (RULER, section 3): the paragraphs that a question needs, mixed with others.

Reads files in the formats of SQuAD and HotpotQA; knows no network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from duo_eval.tasks.ruler.kind import Example, Kind, Material, divided, prompts
from duo_jax.reading import MOST_JSON_BYTES, parse_json, read_text


@dataclass(frozen=True)
class Question:
    """A question, its correct answers, and the paragraphs that it needs; all others are noise."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """All questions of a file, and all of its paragraphs, each once."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class QA(Kind):
    """The size is the number of paragraphs; those of the same article come before others."""

    max_new_tokens: ClassVar[int] = 32
    match: ClassVar[Literal["all", "any"]] = "any"
    attempts: ClassVar[int] = 200

    def least(self) -> int:
        """The paragraphs that a question needs are always included, whatever the size."""
        return 1

    def make(self, rng: Random, size: int, material: Material) -> Example | None:
        """See `Kind.make`."""
        data: Questions = material.questions
        if size > 1 and size > len(data.paragraphs):
            return None
        asked = rng.choice(data.questions)
        # One order for all sizes: a larger example contains the paragraphs of a smaller one.
        others = rng.sample(asked.related, len(asked.related))
        known = {*asked.needed, *asked.related}
        others += rng.sample(rest := [n for n in range(len(data.paragraphs)) if n not in known], len(rest))
        chosen = [*asked.needed, *others[: max(0, size - len(asked.needed))]]
        rng.shuffle(chosen)
        document: str = prompts("qa_utils.py", "DOCUMENT_PROMPT")
        texts = prompts("qa_utils.py", "CONFIG")
        context = "\n\n".join(
            document.format(i=place, document=data.paragraphs[number]) for place, number in enumerate(chosen, 1)
        )
        parts = divided(texts["template"], context=context, query=asked.text)
        return Example(*parts, texts["answer_prefix"].strip(), asked.answers)


def load(path: Path, style: Literal["squad", "hotpot"]) -> Questions:
    """The questions of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, with the line; or not of the format, with the place.
    """
    try:
        data = parse_json(read_text(path, most=MOST_JSON_BYTES), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: give a file in the format of {style}") from None
    questions = _READERS[style](data, path)
    if not questions.questions:
        raise ValueError(f"{path} has no question with an answer")
    return questions


def _squad(data: Any, path: Path) -> Questions:
    paragraphs: dict[str, int] = {}
    articles, drafts = [], []
    for a, article in enumerate(_field(data, "data", list, f"{path}")):
        own = []
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{path}: data[{a}]")):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            number = paragraphs.setdefault(_field(paragraph, "context", str, place), len(paragraphs))
            own.append(number)
            for q, question in enumerate(_field(paragraph, "qas", list, place)):
                at = f"{place}.qas[{q}]"
                texts = [_field(answer, "text", str, at) for answer in _field(question, "answers", list, at)]
                if texts and not question.get("is_impossible"):
                    drafts.append((_field(question, "question", str, at), tuple(texts), number, a))
        articles.append(own)
    questions = tuple(
        Question(text, answers, (number,), tuple(dict.fromkeys(n for n in articles[a] if n != number)))
        for text, answers, number, a in drafts
    )
    return Questions(questions, tuple(paragraphs))


def _hotpot(data: Any, path: Path) -> Questions:
    if not isinstance(data, list):
        raise ValueError(f"{path} must be a list of questions, got {type(data).__name__}")
    paragraphs: dict[str, int] = {}
    questions = []
    for number, entry in enumerate(data):
        place, needed = f"{path}: [{number}]", []
        for context in _field(entry, "context", list, place):
            if not (isinstance(context, list) and len(context) == 2 and isinstance(context[1], list)):
                raise ValueError(f"{place}.context must hold [title, sentences], got {str(context)[:60]!r}")
            text = f"{context[0]}\n{''.join(map(str, context[1]))}"
            needed.append(paragraphs.setdefault(text, len(paragraphs)))
        texts = _field(entry, "question", str, place), _field(entry, "answer", str, place)
        questions.append(Question(texts[0], (texts[1],), tuple(dict.fromkeys(needed))))
    return Questions(tuple(questions), tuple(paragraphs))


def _field(entry: Any, name: str, kind: type, place: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise ValueError(f"{place} has no {name!r} that is a {kind.__name__}, got {str(entry)[:60]!r}")
    return entry[name]


_READERS: dict[str, Callable[[Any, Path], Questions]] = {"squad": _squad, "hotpot": _hotpot}
