"""`duo eval harness`: any task of lm-evaluation-harness, under any method, with results as one JSON file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from duo_eval.methods.registry import Method, method
from duo_eval.runner.provenance import provenance
from duo_eval.runner.record import Record, fingerprint, write
from duo_eval.runner.run import method_fingerprint
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType
from duo_eval.stats.scores import FULL
from duo_eval.tasks.lm_eval.files import fingerprints
from duo_eval.tasks.sandbox.sandbox import isolation
from duo_jax import LM, HeadPattern
from duo_jax.arguments import whole_number
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.options import ModelOptions, PatternOptions
from duo_jax.reading import read_json


@dataclass(frozen=True)
class Harness:
    """Run tasks of lm-evaluation-harness, or YAML tasks in its format, with full attention or any other method."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    tasks: tuple[str, ...]
    """Tasks, groups or tags by name, or paths of YAML files. `lm-eval ls tasks` lists those that lm-eval has."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    method: str | None = None
    """Hold the context by a method in place of a head pattern: snapkv, h2o, ..., as `duo eval needle` names them. Every
    context is then computed by itself."""
    budget: float | None = None
    """Fraction of full attention's KV bytes that the method may hold; 0.5 by default, 1 for full. Needs --method."""
    out: Path = Path("harness.json")
    """File to write. Requests that were answered before an interruption are not computed again."""
    include_path: tuple[Path, ...] = ()
    """Folders of further YAML tasks."""
    data: tuple[str, ...] = ()
    """TASK=FILE: JSON lines in place of a task's data set, such as mbpp=mbpp.jsonl."""
    num_fewshot: int | None = None
    """Worked examples in a prompt; the task's own number by default."""
    limit: int | None = None
    """Questions of each task, from the first on; all by default."""
    gen_kwargs: str | None = None
    """Settings of generation that replace a task's own: max_gen_toks=64,temperature=0.7"""
    batch_size: int | None = None
    """Most texts computed together; 8 by default, always 1 with --method."""
    max_length: int | None = None
    """Most tokens of a text; by default as many as the model was trained for."""
    truncate: bool = False
    """Cut longer contexts at the left, as lm-eval does; without it they are refused."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    system: str | None = None
    """System message."""
    run_code: bool = False
    """Allow tasks that run generated code: each program in a process of its own, isolated by the system."""
    unsafe: bool = False
    """Run that code even where the system cannot isolate it: it may change your files."""
    samples: bool = False
    """Keep every question with its prompt, answer and score in the file."""
    backend: str | None = None
    """Attention backend; by default the fastest one that is right on this device. Not with --method."""
    seed: int = 1234
    """Seed of the worked examples."""

    def run(self) -> None:
        """Find the tasks, load the model, evaluate, write."""
        try:
            import lm_eval
            from lm_eval.utils import make_table

            from duo_eval.tasks.lm_eval.adapter import DuoLM
            from duo_eval.tasks.lm_eval.tasks import leaves, load_tasks
        except ImportError as error:
            raise ValueError(f"duo eval harness needs lm-eval ({error}): pip install 'duo-jax[eval]'") from None
        if not self.tasks:
            raise ValueError("--tasks names no task")
        if self.limit is not None:
            whole_number("limit", self.limit, 1)
        self._check()
        tokenizer = chosen = None
        if self.method is not None:
            tokenizer = self.model.tokenizer()
            chosen = method(self.method, model=self.model.model, tokenizer=tokenizer)
        about = self._about(chosen)
        Record.open(self.out, about)  # Refuses a file of another run; one of this run is made again.
        loaded, manager = load_tasks(self.tasks, include=self.include_path, data=self._data(), unsafe=self.unsafe)
        runs_code = [task.config.task for task in leaves(loaded) if getattr(task, "UNSAFE_CODE", False)]
        if runs_code and not self.run_code:
            raise ValueError(f"{', '.join(runs_code)} runs code that the model writes: allow it with --run-code")
        sandbox = isolation(unsafe=self.unsafe) if runs_code else None
        sources = {"weights": weights_fingerprint(self.model.model)}
        Record.open(self.out, about, sources)
        tokenizer = tokenizer or self.model.tokenizer()
        pattern = self.pattern.load(self.max_length or open_config(self.model.model).trained_positions)
        model = self.model.load(pattern=pattern)
        lm = DuoLM(
            LM(model, tokenizer, pattern),
            method=chosen,
            budget=self._budget(chosen),
            name=self.model.model,
            batch_size=self._batch_size,
            max_length=self.max_length,
            truncate=self.truncate,
            backend=self.backend,
        )
        # lm-eval stores the answer to each request by its text; the name of the store identifies the settings.
        key = hashlib.sha256(json.dumps([about, sources], sort_keys=True).encode()).hexdigest()[:12]
        store = self.out.with_name(f"{self.out.name}.{key}")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=_tops(loaded),
            task_manager=manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            gen_kwargs=self.gen_kwargs,
            use_cache=str(store),
            apply_chat_template=self.chat,
            fewshot_as_multiturn=self.chat,
            system_instruction=self.system,
            log_samples=self.samples,
            confirm_run_unsafe_code=self.run_code,
            bootstrap_iters=1000,
            fewshot_random_seed=self.seed,
        )
        record = provenance() | {"about": about, "gates": sources} | _kept(results, self.samples)
        record |= {"sandbox": sandbox} if sandbox else {}
        write(self.out, json.loads(json.dumps(record, default=str)))
        for path in self.out.parent.glob(f"{store.name}_rank*.db*"):
            path.unlink()
        print(make_table(results))
        print(f"written to {self.out}")

    def _check(self) -> None:
        """Refuse flags that would have no effect.

        Raises:
            ValueError: with the flags.
        """
        if self.method is None:
            if self.budget is not None:
                raise ValueError("--budget is a method's: give --method, or --kv-budget with --pattern")
            return
        if self.pattern.pattern:
            raise ValueError("--method takes the place of --pattern: give one of them")
        unused: dict[str, Any] = {**vars(self.pattern), "backend": self.backend}
        unused["batch_size"] = None if self.batch_size == 1 else self.batch_size
        if flags := [f"--{name.replace('_', '-')}" for name, value in unused.items() if value is not None]:
            raise ValueError(f"--method computes every context by itself, in its own way: leave out {', '.join(flags)}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"--budget is a fraction of full attention's KV bytes, in (0, 1], got {self.budget}")
        if self.method == FULL and self.budget not in (None, 1.0):
            raise ValueError(f"full attention holds every token: --budget must be 1, got {self.budget}")

    def _budget(self, chosen: Method | None) -> float:
        return self.budget if self.budget is not None else 1.0 if chosen is None or chosen.is_fixed else 0.5

    @property
    def _batch_size(self) -> int:
        return self.batch_size if self.batch_size is not None else 8 if self.method is None else 1

    def _about(self, chosen: Method | None) -> dict[str, Any]:
        """The settings that scores depend on, with fingerprints of gates, a method's settings and files."""
        unused = {"out", "unsafe"} if chosen else {"out", "unsafe", "method", "budget"}
        about: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in unused}
        about |= {"batch_size": self._batch_size} | ({"budget": self._budget(chosen)} if chosen else {})
        if self.pattern.pattern:
            about["gates"] = fingerprint(HeadPattern.load(self.pattern.pattern))
        if chosen:
            about["gates"] = method_fingerprint(chosen)
        about["files"] = fingerprints([*self._data().values(), *self.include_path])
        return dict(json.loads(json.dumps(about, default=str)))

    def _data(self) -> dict[str, Path]:
        data = {}
        for entry in self.data:
            name, _, path = entry.partition("=")
            if not name or not path:
                raise ValueError(f"--data takes TASK=FILE, got {entry!r}")
            data[name] = Path(path)
        return data


def _tops(loaded: Mapping[str, Any]) -> list[Any]:
    """Groups with all their tasks, and the tasks without a group, in the form that lm-eval loads again."""
    inside = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    below = {name for names in loaded["group_map"].values() for name in names}
    groups = [group for name, group in loaded["groups"].items() if name not in below]
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]


def _kept(results: Any, samples: bool) -> dict[str, Any]:
    """The fields of lm-eval's results that are kept."""
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    kept = {name: results[name] for name in names if name in results}
    return kept | ({"samples": results["samples"]} if samples else {})


def harness_table(path: Path) -> str:
    """Scores of lm-eval, task by task: each metric with its standard error."""
    record = read_json(path)
    rows = []
    for task, metrics in record["results"].items():
        shots, count = record["n-shot"].get(task, ""), record["n-samples"].get(task, {}).get("effective", "")
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                error_text = f"{error:.4f}" if isinstance(error, int | float) else ""
                label = metric if filtered in ("", "none") else f"{metric}, {filtered}"
                rows.append([task, shots, count, label, f"{value:.4f}", error_text])
    return rows_to_table(rows, ["task", "shots", "n", "metric", "value", "standard error"], "lrrlr")


RESULT = ResultType(
    "lm-evaluation-harness",
    lambda first: {"about", "results", "n-shot", "n-samples"} <= set(first),
    {"Scores": harness_table},
    group="Accuracy",
)
