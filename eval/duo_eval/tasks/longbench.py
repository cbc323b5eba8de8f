"""`duo eval longbench`: the 21 tasks of LongBench (arXiv 2308.14508), with lm-eval's prompts and metrics.

Their rows come from a folder with a file of JSON lines for each task, or from the hub.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from duo_train.data.haystack import hub_rows

from duo_eval.runner.record import sha256
from duo_eval.runner.run import Comparison, MethodJob, Question
from duo_eval.stats.scores import in_words
from duo_eval.tasks.lm_eval.files import tasks_folder
from duo_eval.tasks.prompt import prompt
from duo_eval.tasks.rows import read_rows
from duo_jax.arguments import whole_number

# LongBench asks these without a chat template: the model continues the examples of their prompts.
PLAIN = {"longbench_fewshot_tasks", "longbench_code_tasks"}


@dataclass(frozen=True, eq=False)
class Task:
    """One task, as lm-eval defines it."""

    config: Mapping[str, Any]

    @property
    def max_new_tokens(self) -> int:
        """Room for the answer."""
        return int(self.config["generation_kwargs"]["max_gen_toks"])

    @property
    def is_chat(self) -> bool:
        """Whether it is asked in a chat template."""
        return not PLAIN & set(self.config["tag"])

    def rows(self, folder: Path | None) -> list[dict[str, Any]]:
        """All rows of data, each checked.

        Args:
            folder: contains a file TASK.jsonl for each task; None downloads the data set from the hub.

        Raises:
            FileNotFoundError: no such file or data set, or no connection.
            ValueError: a row that is not one of LongBench's, with its line.
        """
        if folder is not None:
            return [_named(row) for row in read_rows(file_of(self.config["task"], folder), wrong=_wrong)]
        source = (self.config[name] for name in ("dataset_path", "dataset_name"))
        rows = []
        for place, row in hub_rows(*source, split=self.config["test_split"]):
            if not isinstance(row, dict) or (complaint := _wrong(row)):
                raise ValueError(f"{place}: {complaint if isinstance(row, dict) else 'not a row of fields'}")
            rows.append(_named(row))
        return rows

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The question about a row."""
        from lm_eval.utils import apply_template

        return str(apply_template(self.config["doc_to_text"], dict(row)))

    def score(self, row: Mapping[str, Any], answer: str) -> float:
        """Score of an answer, 0 to 1: the best over the right answers of the row."""
        for end in self.config["generation_kwargs"]["until"]:
            answer = answer.partition(end)[0]
        return float(self.config["process_results"](row, [answer])["score"])


@dataclass(frozen=True)
class Row(MethodJob):
    """One row of a task's data, for one method."""

    task: str
    row: int


@dataclass(frozen=True)
class LongBenchTask:
    """Ask the 21 tasks of LongBench, the whole prompt through the method (paper section 3.2)."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = Comparison()
    out: Path = Path("longbench.jsonl")
    """File to append to; results that it already has are not computed again."""
    tasks: tuple[str, ...] = ()
    """Tasks by LongBench's names, such as narrativeqa; by default all, or those that --data has."""
    data: Path | None = None
    """Folder with LongBench's files, one TASK.jsonl each; without it they come from the hub."""
    limit: int | None = None
    """First rows of each task to ask; all by default."""
    chat: bool = True
    """Ask in the tokenizer's chat template, if it has one."""
    max_length: int | None = None
    """Tokens of prompt and answer, by default the length that the model was trained for. A longer prompt loses its
    middle."""

    def run(self) -> None:
        """Run the missing questions and print the means."""
        for name, value in {"limit": self.limit, "max_length": self.max_length}.items():
            if value is not None:
                whole_number(name, value, 1)
        room = max(task.max_new_tokens for task in self._tasks.values())
        if self._length <= 2 * room:
            raise ValueError(f"--max-length must be above {2 * room}, twice the longest answer, got {self._length}")
        results = self.comparison.run(
            self.out,
            {"task": "longbench", "max_length": self._length, "chat": self.chat},
            self._jobs(),
            self._question,
            data={name: sha256(json.dumps(rows, sort_keys=True).encode()) for name, rows in self._rows.items()},
            longest=self._length,
            shortest=None,
        )
        print("\n".join(in_words(results)))

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
        return {name: task.rows(self.data) for name, task in self._tasks.items()}

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
            use_chat=self.chat and task.is_chat,
            joint="",
            limit=self._length - task.max_new_tokens,
        )
        return Question(
            np.asarray(tokens, np.int32),
            task.max_new_tokens,
            lambda answer: task.score(row, answer),
            {"answers": row["answers"]},
        )


def names() -> list[str]:
    """The tasks, without LongBench-E's."""
    stems = (path.stem for path in tasks_folder("longbench").glob("*.yaml"))
    return sorted(stem for stem in stems if not stem.startswith("_") and not stem.endswith("_e"))


def load_task(name: str) -> Task:
    """A task by LongBench's name.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a package that its metric needs is missing.
    """
    if name not in names():
        raise ValueError(f"unknown task {name!r}; there are {', '.join(names())}")
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        with warnings.catch_warnings():
            # Packages that the metrics import warn about themselves.
            warnings.simplefilter("ignore")
            config = load_yaml(tasks_folder("longbench") / f"{name}.yaml")
    except ImportError as error:
        raise NotImplementedError(
            f"LongBench's metrics need more packages: pip install 'duo-jax[eval]' ({error})"
        ) from None
    return Task({**config, "task": name})


def file_of(name: str, folder: Path) -> Path:
    """The file with a task's rows."""
    return folder.expanduser() / f"{name}.jsonl"


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the field names of lm-eval's prompts, which call LongBench's `input` the question."""
    return {"question": row.get("input", ""), "all_classes": None, **row}


def _wrong(row: Mapping[str, Any]) -> str | None:
    row = _named(row)
    for name in ("context", "question"):
        if not isinstance(row.get(name), str):
            return f"no string in field {name!r}, got {str(row.get(name))[:60]!r}"
    for name in ("answers", "all_classes"):
        value = row.get(name)
        is_list = isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
        if not is_list and (name == "answers" or value is not None):
            return f"no list of strings in field {name!r}, got {str(value)[:60]!r}"
    return None
