"""`duo eval ablation`: what a setting of training does: gates trained with each value, scored side by side.

Nothing here trains or scores: `duo identify` and `duo eval recall` do, with flags of their own.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from duo_jax import load_tokenizer
from eval.plot import draw, require_matplotlib
from eval.recall import Recall
from train.identify import Identify


@dataclass(frozen=True)
class Ablation:
    """Train gates in several ways, score them with `duo eval recall`, draw the curves (paper section 3.5)."""

    variants: tuple[str, ...]
    """Ways to train, each NAME=FLAGS of `duo identify`: usual= teacher="--attention.mixing teacher"."""
    out: Path
    """Folder for a pattern per variant, recall.jsonl and its figure; what it has already is not computed again."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    identify: str = ""
    """Flags of `duo identify` for all variants: --identify="--preset smollm2-cpu", with the equals sign."""
    recall: str = "--random 0 --prose 0"
    """Flags of `duo eval recall`, likewise."""

    def run(self) -> None:
        """Train what is missing, score what is missing, draw."""
        require_matplotlib()
        trainings = self._trainings()
        recall = self._recall()
        # What is wrong is refused before the first training, which may take hours.
        recall.check_counts()
        recall.samples_of(load_tokenizer(self.model))
        for training in trainings:
            training.prepare()
        for training in trainings:
            training.run()
        recall = replace(recall, patterns=tuple(f"{path.out.name}={path.out}" for path in trainings))
        recall.run()
        for path in draw(recall.out):
            print(path)

    def _trainings(self) -> list[Identify]:
        """A command for each variant."""
        named = [variant.partition("=") for variant in self.variants]
        names = [name for name, _, _ in named]
        if len(set(names)) < max(len(names), 2) or not all(name and equals for name, equals, _ in named):
            raise ValueError(f"need two or more NAME=FLAGS, each name once, got --variants {' '.join(self.variants)}")
        if any(Path(name).name != name for name in names):
            raise ValueError(f"a variant's name is that of its folder in {self.out}, got {', '.join(names)}")
        found = []
        for name, _, flags in named:
            own = [*_split(self.identify), *_split(flags)]
            args = ["--model", self.model, "--out", str(self.out / name), "--resume", *own]
            found.append(tyro.cli(Identify.variant(args), prog=f"duo identify ({name})", args=args))
        return found

    def _recall(self) -> Recall:
        args = ["--model", self.model, "--out", str(self.out / "recall.jsonl"), *_split(self.recall)]
        return tyro.cli(Recall, prog="duo eval recall", args=args)


def _split(flags: str) -> list[str]:
    """As a shell does."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"{flags!r} are no flags: {error}") from None
