"""`duo eval ablation`: the effect of a training setting. Trains gates with each value and scores them together.

`duo identify` trains and `duo eval recall` scores; this command only calls them.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from duo_train.identify import Identify

from duo_eval.tasks.recall import Recall, Scoring
from duo_jax import load_tokenizer
from duo_jax.pattern.files import GATES_FILE
from pallas_kernels.types import Request

# Flags that this command sets.
RESERVED = ("--model", "--out", "--resume", "--no-resume", "--distributed")


@dataclass(frozen=True)
class Ablation:
    """Train gates in several ways, score them as `duo eval recall` does, draw the curves (paper section 3.5)."""

    variants: tuple[str, ...]
    """Ways to train, each NAME=FLAGS of `duo identify`: usual= teacher="--attention.mixing teacher"."""
    out: Path
    """Folder for a pattern per variant, recall.jsonl and its figures; results that it already has are kept."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    identify: str = ""
    """Flags of `duo identify` for all variants: --identify="--preset smollm2-cpu", with the equals sign."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = Scoring(random=0, prose=0)

    def requests(self) -> list[Request]:
        """The attention of training and of scoring, for certification."""
        trainings = [each for training in self._trainings().values() for each in training.requests()]
        return [*trainings, *Recall(model=self.model, scoring=self.scoring).requests()]

    def run(self) -> None:
        """Train missing gates, score them and plot."""
        trainings = self._trainings()
        recall = Recall(
            patterns=tuple(f"{name}={training.out}" for name, training in trainings.items()),
            out=self.out / "recall.jsonl",
            model=self.model,
            scoring=self.scoring,
        )
        # Refuse bad settings before the first training, which may take hours.
        recall.check()
        self.scoring.texts(load_tokenizer(self.model))
        for training in trainings.values():
            training.check()
        missing = [training for training in trainings.values() if not (training.out / GATES_FILE).exists()]
        for training in missing:
            training.prepare()
        for training in missing:
            training.run()
        recall.run()

    def _trainings(self) -> dict[str, Identify]:
        """The training command of each variant."""
        named = [variant.partition("=") for variant in self.variants]
        names = [name for name, _, _ in named]
        if len(set(names)) < max(len(names), 2) or not all(name and equals for name, equals, _ in named):
            raise ValueError(f"need two or more NAME=FLAGS, each name once, got --variants {' '.join(self.variants)}")
        if any(Path(name).name != name or name == ".." or Path(name).suffix == ".jsonl" for name in names):
            raise ValueError(f"a variant's name is that of its folder in {self.out}, got {', '.join(names)}")
        return {name: self._training(name, [*_split(self.identify), *_split(flags)]) for name, _, flags in named}

    def _training(self, name: str, flags: list[str]) -> Identify:
        reserved = [flag for flag in flags if flag.partition("=")[0] in RESERVED]
        if reserved:
            raise ValueError(
                f"{name}: {', '.join(reserved)} cannot vary; train with `duo identify`, then `duo eval recall`"
            )
        args = [*flags, "--model", self.model, "--out", str(self.out / name), "--resume"]
        return tyro.cli(Identify.variant(args), prog=f"duo identify ({name})", args=args)


def _split(flags: str) -> list[str]:
    """Split as a shell does."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"{flags!r} cannot be split into flags: {error}") from None
