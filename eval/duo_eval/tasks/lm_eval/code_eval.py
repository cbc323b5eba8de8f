"""The metric `code_eval` for tasks that judge generated code: the same numbers, but every program runs in the sandbox.

The original is downloaded from a hub and runs code in forks of this process, without limits on memory or network.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from duo_eval.tasks.sandbox.sandbox import Limits, run

# The sandbox's verdict on a program.
Outcome = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True)
class CodeEval:
    """The part of `evaluate`'s metric `code_eval` that lm-eval's tasks use."""

    unsafe: bool = False

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """pass@k by its unbiased estimator (Chen et al. 2021, section 2.1), and the outcome of each program."""
        outcomes = {
            task: [run(f"{program}\n{test}", Limits(), unsafe=self.unsafe).outcome for program in programs]
            for task, (test, programs) in enumerate(zip(references, predictions, strict=True))
        }
        means = {}
        for count in k:
            if all(len(programs) >= count for programs in predictions):
                passed = [
                    _pass_at(count, len(task_outcomes), sum(outcome == "passed" for outcome in task_outcomes))
                    for task_outcomes in outcomes.values()
                ]
                means[f"pass@{count}"] = sum(passed) / len(passed)
        return means, outcomes


@contextmanager
def sandboxed(*, unsafe: bool = False) -> Iterator[None]:
    """Make `evaluate.load("code_eval")` return the metric above, while tasks are loaded."""
    import evaluate

    real = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval(unsafe) if path == "code_eval" else real(path, *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = real


def _pass_at(k: int, total: int, passed: int) -> float:
    return 1.0 - math.comb(total - passed, k) / math.comb(total, k)
