"""LongBench's tasks as lm-eval defines them: prompt, room for the answer, where it ends, metric. Knows no data."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from duo_eval.tasks.lm_eval_files import tasks_folder

# LongBench asks these without a chat template: their prompts are examples to go on from.
PLAIN = {"longbench_fewshot_tasks", "longbench_code_tasks"}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as LongBench calls it.
        template: the prompt, in Jinja.
        max_new_tokens: room for the answer.
        until: strings that end an answer.
        is_chat: whether it is asked in a chat template.
        process: lm-eval's metric, of a row and a list with the answer.
        source: data set, subset and split on the hub.
    """

    name: str
    template: str
    max_new_tokens: int
    until: tuple[str, ...]
    is_chat: bool
    process: Callable[[Mapping[str, Any], list[str]], Mapping[str, float]]
    source: tuple[str, str, str]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """What is asked about a row."""
        from lm_eval.utils import apply_template

        return str(apply_template(self.template, dict(row)))

    def score(self, row: Mapping[str, Any], answer: str) -> float:
        """Of an answer, 0 to 1: the best over the right answers of the row."""
        for end in self.until:
            answer = answer.partition(end)[0]
        return float(self.process(row, [answer])["score"])


def names() -> list[str]:
    """The tasks, without LongBench-E's."""
    stems = (path.stem for path in tasks_folder("longbench").glob("*.yaml"))
    return sorted(stem for stem in stems if not stem.startswith("_") and not stem.endswith("_e"))


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: there is none of this name.
        NotImplementedError: a package that its metric needs is missing.
    """
    if name not in names():
        raise ValueError(f"unknown task {name!r}; there are {', '.join(names())}")
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        with warnings.catch_warnings():
            # Of packages that the metrics import, about themselves.
            warnings.simplefilter("ignore")
            found = load_yaml(tasks_folder("longbench") / f"{name}.yaml")
    except ImportError as error:
        raise NotImplementedError(
            f"LongBench's metrics need more packages: pip install 'duo-jax[eval]' ({error})"
        ) from None
    options = found["generation_kwargs"]
    return Task(
        name,
        found["doc_to_text"],
        options["max_gen_toks"],
        tuple(options["until"]),
        not PLAIN & set(found["tag"]),
        found["process_results"],
        (found["dataset_path"], found["dataset_name"], found["test_split"]),
    )
