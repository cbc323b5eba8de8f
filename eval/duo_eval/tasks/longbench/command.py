"""`duo eval longbench`: which tasks, how long prompts may be, and their scores."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from duo_eval.runner.record import read, sha256
from duo_eval.runner.run import Comparison, MethodJob, Question
from duo_eval.stats.scores import in_words
from duo_eval.tasks.longbench.data import file_of, load_rows
from duo_eval.tasks.longbench.tasks import Task, load_task, names
from duo_eval.tasks.prompt import prompt


@dataclass(frozen=True)
class Row(MethodJob):
    """One row of a task's data, put to one method."""

    task: str
    row: int


@dataclass(frozen=True)
class LongBenchTask:
    """Ask the 21 tasks of LongBench, the whole prompt through the method (paper section 3.2)."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = Comparison()
    out: Path = Path("longbench.jsonl")
    """File to append to; what it has already is not computed again."""
    tasks: tuple[str, ...] = ()
    """Tasks by LongBench's names, such as narrativeqa; by default all, or those that --data has."""
    data: Path | None = None
    """Folder with LongBench's files, one TASK.jsonl each; without it they come from the hub."""
    limit: int | None = None
    """First rows of each task to ask; all by default."""
    max_length: int | None = None
    """Tokens of prompt and answer; what the model was trained for by default. A longer prompt loses its middle."""

    def run(self) -> None:
        """Ask for what the file lacks; print the means."""
        if (self.limit or 1) < 1 or (self.max_length or 1) < 1:
            raise ValueError(f"need a limit and a max_length of at least 1, got {self.limit=}, {self.max_length=}")
        room = max(task.max_new_tokens for task in self._tasks.values())
        if self._length <= 2 * room:
            raise ValueError(f"--max-length must be above {2 * room}, twice the longest answer, got {self._length}")
        self.comparison.run(
            self.out,
            {"task": "longbench", "max_length": self._length},
            self._jobs(),
            self._question,
            data={name: sha256(json.dumps(rows, sort_keys=True).encode()) for name, rows in self._rows.items()},
            longest=self._length,
            shortest=None,
        )
        print("\n".join(in_words(read(self.out)[1])))

    @property
    def _length(self) -> int:
        return self.max_length or self.comparison.trained_positions

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        chosen = self.tasks or tuple(name for name in names() if self.data is None or file_of(name, self.data).exists())
        if not chosen:
            raise FileNotFoundError(f"no file of LongBench in {self.data}: there may be {', '.join(names())}.jsonl")
        return {name: load_task(name) for name in chosen}

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        return {name: load_rows(name, self.data, task.source) for name, task in self._tasks.items()}

    def _jobs(self) -> Iterator[Row]:
        """A row of every task, then the next; all methods side by side."""
        for number in range(max(map(len, self._rows.values()))):
            for name, rows in self._rows.items():
                if number < min(len(rows), self.limit or len(rows)):
                    for method, budget in self.comparison.cells():
                        yield Row(method, budget, name, number)

    def _question(self, job: Row) -> Question:
        task, row = self._tasks[job.task], self._rows[job.task][job.row]
        tokens = prompt(
            self.comparison.tokenizer,
            task.prompt(row),
            use_chat=self.comparison.chat and task.is_chat,
            joint="",
            limit=self._length - task.max_new_tokens,
        )
        return Question(
            np.asarray(tokens, np.int32),
            task.max_new_tokens,
            lambda answer: task.score(row, answer),
            {"answers": row["answers"]},
        )
