"""`duo choose`: the questions of `duo eval needle` at a few budgets, all measures of each, and the choice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from duo_train.data.haystack import DEFAULT
from tqdm import tqdm

from duo_eval.methods.patterns import Pooled
from duo_eval.runner.record import read, sha256
from duo_eval.runner.run import Comparison
from duo_eval.show.result_type import readable
from duo_eval.stats.scores import FULL
from duo_eval.tasks.choose.joint import ask
from duo_eval.tasks.choose.results import ALLOWED, RESULT, Choice, Row, choose, loss_curves, loss_table, rows_of
from duo_eval.tasks.needle.command import Cell, NeedleTask
from duo_jax import LM, HeadPattern, Model
from duo_jax.arguments import MOST_SEED, ArgumentError, real_number, seed_number, whole_number
from duo_jax.checkpoint.open import open_config
from duo_jax.model.precision import EmbedDtype, FloatDtype, WeightDtype
from duo_jax.pattern.files import DEFAULT_RULE, check_folder, find_folder, is_published, published_patterns
from pallas_kernels.types import Request

# Depths follow each other by the golden section: any number of needles is spread evenly, and more fill the gaps.
GOLDEN = 0.6180339887
MOST_NEEDLES = 40_000


@dataclass(frozen=True)
class Choose:
    """Measure what a head pattern loses at a few KV budgets, and choose the smallest within the loss you allow."""

    packages = ("matplotlib", "scipy", "tabulate")
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id; with or without a chat template."""
    pattern: str | None = None
    """Head pattern: a folder or a published name; by default the one published for the model."""
    context: int = 4096
    """Tokens of prompt and answer: the length at which you will use the model."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Fractions of full attention's KV bytes to measure. More of them can join the same file later."""
    loss: float = 100 * ALLOWED
    """Points that each measure may lose, with 95 % confidence."""
    needles: int = 300
    """Questions at each budget. To show a loss of at most 1 point takes 299, of 5 points 59, if nothing is lost."""
    text: str = DEFAULT
    """Your own text, in which needles are hidden and whose likelihood is measured: a text or .jsonl[.zst] file, a
    folder of them, pydoc (Python's own reference pages), essays (fetched by pip), or a hub data set."""
    text_chars: int | None = 20_000_000
    """Characters of the text to read at most."""
    chat: bool = True
    """Ask in the tokenizer's chat template, if it has one."""
    seed: int = 1
    """Decides keys and stretches of text."""
    dtype: FloatDtype | None = None
    """Data type of weights and cache; the checkpoint's own by default, float32 on a CPU."""
    weight_dtype: WeightDtype | None = None
    """Quantize the weights of linear maps; w8a8 multiplies integers, int4-32 has a scale for every 32 channels."""
    embed_dtype: EmbedDtype | None = None
    """Quantize embeddings and head too, which keep their data type by default."""
    out: Path = Path("choose.jsonl")
    """File to append to; results that it already has are not measured again. The figure is written next to it."""
    apply: bool = False
    """Store the chosen sparsity in the pattern's config.json: from then on it is the default of this pattern."""
    copy_to: Path | None = None
    """Store it in a copy of the pattern in this folder instead."""

    def requests(self) -> list[Request]:
        """The attention that is compared, for certification."""
        return self._comparison.requests()

    def run(self) -> None:
        """Measure what is missing, print, draw, and store the choice.

        Raises:
            ValueError: settings that cannot be right, before anything is computed; or nothing to store.
        """
        self._check()
        comparison, task = self._comparison, self._task
        comparison.run(
            self.out,
            # One pattern a file: budgets of two would be ranked as if they were of one.
            {"task": "choose", "pattern": self._source}
            | {name: getattr(self, name) for name in ("text", "text_chars", "chat", "seed")},
            self._jobs(),
            self._hide,
            answer=self._answer,
            data={"text": sha256(task.text.encode())},
            longest=self.context,
            shortest=max(self.context - task.room, 1),
        )
        with readable(self.out):
            table, choice = loss_table(self.out).partition("\n\n")[0], self._choice()
        print(f"\n{table}\n", *choice.reasons, sep="\n")
        replace(RESULT, figures=(partial(loss_curves, allowed=self.loss / 100),)).show_figures(self.out)
        if self._target is not None:
            self._store(self._target, choice)

    def _check(self) -> None:
        """Refuse what can be refused without weights."""
        real_number("loss", self.loss, 0.01, 100)
        whole_number("needles", self.needles, 1, MOST_NEEDLES)
        if self.text_chars is not None:
            whole_number("text_chars", self.text_chars, 1, MOST_SEED)
        seed_number("seed", self.seed)
        whole_number("context", self.context, self._task.room + 1, way=f"an answer has {self._task.room} tokens")
        self._comparison.cells()
        HeadPattern.load(self._source).check(open_config(self.model))
        if self._target is not None:
            if is_published(self._target):
                raise ValueError(
                    f"{self._source} is a published pattern, part of the installed package: give --copy-to FOLDER to "
                    "store the choice in a copy"
                )
            check_folder(self._target)
        if self.context > (trained := self._comparison.trained_positions):
            raise ArgumentError(
                "context", f"of {self.context} is more than the {trained} tokens that {self.model} was trained for"
            )
        if len(self._task.hay) < 2 * self.context:
            raise ValueError(
                f"the text {self.text!r} has {len(self._task.hay)} tokens: give at least twice --context "
                f"{self.context}, so that not every question has the same text"
            )

    @cached_property
    def _source(self) -> str:
        """Folder or name of the pattern."""
        name = Path(self.model).name.lower() if self.pattern is None else self.pattern
        if self.pattern is None and name not in published_patterns():
            raise ValueError(
                f"no pattern is published for the model {self.model!r}: give --pattern; `duo identify` finds one"
            )
        return name

    @cached_property
    def _target(self) -> Path | None:
        """Folder to store the choice in."""
        return self.copy_to or (find_folder(self._source) if self.apply else None)

    @cached_property
    def _comparison(self) -> Comparison:
        pattern = HeadPattern.load(self._source)
        sizes: dict[str, Any] = {"sink_size": int(pattern.sink_size), "recent_size": int(pattern.recent_size)}
        dtypes: dict[str, Any] = {name: getattr(self, name) for name in ("dtype", "weight_dtype", "embed_dtype")}
        return Comparison(self.model, (FULL, f"duo={self._source}"), self.budgets, **sizes, **dtypes)

    @cached_property
    def _task(self) -> NeedleTask:
        return NeedleTask(
            self._comparison,
            lengths=(self.context,),
            haystack=self.text,
            haystack_chars=self.text_chars,
            chat=self.chat,
            seed=self.seed,
        )

    def _jobs(self) -> Iterator[Cell]:
        """A question goes to full attention and all budgets in turn: the file is a usable result at any time."""
        for number in range(self.needles):
            depth = round(number * GOLDEN % 1, 4)
            for method, budget in self._comparison.cells():
                yield Cell(method, budget, self.context, depth, number)

    def _hide(self, job: Cell) -> Any:
        try:
            return self._task.hide(job.length, job.depth, job.sample)
        except ValueError as error:
            raise ArgumentError("context", str(error)) from None

    def _answer(self, model: Model, jobs: Sequence[Cell]) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
        """Every job with its measures, after the time that all of them will take."""

        def measure(job: Cell) -> dict[str, Any]:
            needle, prompt = self._hide(job)
            method = self._comparison.resolved[job.method]
            assert isinstance(method, Pooled)
            pattern = method.pattern_at(model, job.budget, len(prompt.tokens))
            facts = {"sparsity": pattern.sparsity, "stretches": len(self._task.hay) // self.context}
            return facts | ask(LM(model, self._comparison.tokenizer, pattern), needle, prompt)

        # The first answer compiles, the second tells the time of all others.
        compiled, first = measure(jobs[0])["seconds"], measure(jobs[0])
        cells = len({(job.method, job.budget) for job in jobs})
        seconds = first["seconds"] * (len(jobs) - 1) + max(0.0, compiled - first["seconds"]) * (cells - 1)
        count = f"{len(jobs)} question{'s' * (len(jobs) > 1)}"
        tqdm.write(f"{count} of {first['seconds']:.1f} s: about {_duration(seconds)} on this device")
        yield jobs[0], first
        for job in jobs[1:]:
            yield job, measure(job)

    def _choice(self) -> Choice:
        """What follows from all results at this context."""
        return choose(self._rows(), self.loss / 100)

    def _rows(self) -> list[Row]:
        return rows_of([record for record in read(self.out)[1] if record["job"]["length"] == self.context])

    def _store(self, folder: Path, choice: Choice) -> None:
        """Write the pattern with the chosen sparsity as its default."""
        if choice.row is None:
            raise ValueError(f"nothing is stored in {folder}: no budget was chosen")
        pattern = HeadPattern.load(self._source)
        about = {
            "model": self.model,
            "context": self.context,
            "kv_budget": choice.row.budget,
            "loss": self.loss,
            "needles": len(choice.row.records),
            "text": self.text,
        }
        metadata = pattern.metadata | {DEFAULT_RULE: choice.row.sparsity, "chosen": about}
        replace(pattern, metadata=metadata).save(folder)
        print(f"{folder} now loads with a sparsity of {choice.row.sparsity:.3f}, if no other rule is given")


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
