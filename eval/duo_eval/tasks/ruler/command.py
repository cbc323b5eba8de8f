"""`duo eval ruler`: tasks at several lengths, and their scores."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from duo_train.data.haystack import load_haystack

from duo_eval.runner.record import sha256
from duo_eval.runner.run import Comparison, MethodJob, Question
from duo_eval.stats.scores import grouped, in_words
from duo_eval.tasks.lm_eval.files import tasks_folder
from duo_eval.tasks.prompt import QuestionLater, known_tokens, later_setting, prompt
from duo_eval.tasks.ruler.kind import Example, Material, fitted
from duo_eval.tasks.ruler.qa import Questions, load
from duo_eval.tasks.ruler.tasks import TASKS, score
from duo_jax.arguments import MOST_SEED, whole_number

# Tasks that need a file, and the format of the file.
FILES: dict[str, Literal["squad", "hotpot"]] = {"qa_squad": "squad", "qa_hotpot": "hotpot"}


@dataclass(frozen=True)
class Entry(MethodJob):
    """One example of a task, for one method."""

    task: str
    length: int
    sample: int


@dataclass(frozen=True)
class RulerTask:
    """Ask the questions of RULER (arXiv 2404.06654), generated here at any length for any tokenizer."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = Comparison()
    out: Path = Path("ruler.jsonl")
    """File to append to; results that it already has are not computed again."""
    tasks: tuple[str, ...] = ()
    """Some of niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_squad,
    qa_hotpot; by default all, but for the last two where their files are not given."""
    lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of prompt and answer."""
    samples: int = 20
    """Examples of each task at each length."""
    haystack: str = "essays"
    """Text for needles, as in `duo eval needle`; RULER's own are these essays."""
    haystack_chars: int | None = 20_000_000
    """Characters of the haystack to read at most."""
    squad: Path | None = None
    """File in SQuAD's format, for qa_squad."""
    hotpot: Path | None = None
    """File in HotpotQA's format, for qa_hotpot."""
    question_later: QuestionLater = False
    chat: bool = True
    """Ask in the tokenizer's chat template, if it has one."""
    seed: int = 0
    """Example i of a task depends only on this, its length, and i."""

    def run(self) -> None:
        """Run the missing questions and print the means."""
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
        for name, style in FILES.items():
            if name in self.tasks and getattr(self, style) is None:
                raise ValueError(f"{name} needs a file: give --{style}, or leave it out of --tasks")
        if not self.lengths:
            raise ValueError("--lengths must have at least one length")
        for length in self.lengths:
            whole_number("lengths", length, 1)
        whole_number("samples", self.samples, 1)
        if self.haystack_chars is not None:
            whole_number("haystack_chars", self.haystack_chars, 1, MOST_SEED)
        tasks_folder("ruler")
        settings = asdict(self)
        shared = {name: settings[name] for name in ("haystack", "haystack_chars", "chat", "seed")}
        shared |= later_setting(self.question_later)
        _ = self._questions  # Refuse malformed files first.
        data = {name: sha256(getattr(self, style).read_bytes()) for name, style in self._files.items()}
        data["haystack"] = sha256(" ".join(self._words).encode())
        results = self.comparison.run(
            self.out,
            {"task": "ruler", **shared},
            self._jobs(),
            self._question,
            data=data,
            longest=max(self.lengths),
            shortest=max(1, min(self.lengths) - max(TASKS[name].max_new_tokens for name in self._chosen)),
        )
        for (length,), group in grouped(results, "length").items():
            print(f"{length} tokens:", *in_words(group), sep="\n")

    @property
    def _chosen(self) -> tuple[str, ...]:
        return self.tasks or tuple(
            name for name in TASKS if name not in FILES or getattr(self, FILES[name]) is not None
        )

    def _jobs(self) -> Iterator[Entry]:
        """The first example of everything, then the next; an example goes to all methods in turn."""
        for sample in range(self.samples):
            for length in sorted(self.lengths):
                for task in self._chosen:
                    for method, budget in self.comparison.cells():
                        yield Entry(method, budget, task, length, sample)

    def _question(self, job: Entry) -> Question:
        kind = TASKS[job.task]

        def tokens(example: Example) -> list[int]:
            return prompt(self.comparison.tokenizer, example.text, example.answer, use_chat=self.chat, joint=kind.joint)

        material = Material(self._words, self._questions.get(job.task), job.length)
        example, size = fitted(
            kind, (self.seed, job.task, job.length, job.sample), material, lambda made: len(tokens(made))
        )
        whole, later = tokens(example), 0
        if self.question_later:
            known = known_tokens(self.comparison.tokenizer, example.context, whole, use_chat=self.chat)
            later = len(whole) - known
        return Question(
            np.asarray(whole, np.int32),
            kind.max_new_tokens,
            lambda answer: score(kind, example, answer),
            {"outputs": example.outputs, "size": size},
            later,
        )

    @cached_property
    def _words(self) -> tuple[str, ...]:
        """Enough words of the haystack: no token is shorter than a character."""
        return tuple(load_haystack(self.haystack, max_chars=self.haystack_chars).split())

    @property
    def _files(self) -> dict[str, Literal["squad", "hotpot"]]:
        """Tasks with a file that are asked, and its format."""
        return {name: style for name, style in FILES.items() if name in self._chosen}

    @cached_property
    def _questions(self) -> dict[str, Questions]:
        return {name: load(getattr(self, style), style) for name, style in self._files.items()}
