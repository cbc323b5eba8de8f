"""`duo identify`: find the retrieval heads of a model. Flags, presets, the output folder; a recipe finds the heads."""

import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from tqdm import tqdm

import duo_jax
from duo_jax.arguments import whole_number
from duo_jax.certified import training
from duo_jax.checkpoint.open import open_config, usual_dtype
from duo_jax.cli.devices import DeviceOptions, ProcessOptions
from duo_jax.cli.options import ModelOptions
from duo_jax.differences import changes
from duo_jax.files import is_left_over, locked, write_text
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.processes import check_alike, is_first
from duo_jax.pattern.files import DEFAULT_RULE, GATES_FILE
from duo_jax.pattern.files import check_folder as check_pattern_folder
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.reading import read_json
from duo_train.backends import BACKENDS, resumed
from duo_train.checkpoints import CHECKPOINTS
from duo_train.data.needles import NeedleData, Needles
from duo_train.data.vocabulary import COMMON
from duo_train.gated import GatedModel
from duo_train.recipes import RECIPES, AttentionProfile, Distill, KVzip, PruLong, Recipe, Run
from pallas_kernels.choices import repeating
from pallas_kernels.types import Request

RUN_FILE = "run.json"
# In that file: the steps of a finished run that this one extends.
EXTENDS = "extends"
# In it, besides the settings.
BESIDES = ("contents", EXTENDS, BACKENDS)
# Fields that may differ on resume, because they do not affect the gates: output folder, checkpoints, devices.
FREE = ("out", "resume", "preset", "checkpoint_every", "keep_checkpoints", "processes", "mesh", "fsdp")

# Settings that runs of earlier versions lack, with what these runs did.
ADDED: dict[str, Any] = {"start_ranks": False}
PresetName = Literal["paper", "smollm2-cpu", "debug"]
if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = tyro.extras.literal_type_from_choices(RECIPES)


def recipe_settings(*recipes: Recipe) -> Any:
    """A field with the settings of every recipe by name: those given, and the defaults of the others."""
    given = {type(recipe): recipe for recipe in recipes}
    return field(default_factory=lambda: {name: given.get(recipe, recipe()) for name, recipe in RECIPES.items()})


@dataclass(frozen=True)
class Identify:
    """Find the retrieval heads of a model: gates, written as a head pattern."""

    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes]
    out: Path
    """Folder for the pattern, its configuration, metrics and checkpoints."""
    processes: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = ProcessOptions()
    mesh: str | None = None
    """Devices along each axis, such as data=4,sequence=2: data shares the samples of a batch, sequence the tokens of
    each sample. By default all devices share the work: samples as far as they divide the batch, tokens beyond that.
    Recipes that train nothing use one device by default; the devices of a mesh share only their weights."""
    fsdp: bool = True
    """Shard the weights over all devices and gather each layer when it is used; otherwise each device has a copy."""
    preset: PresetName = "paper"
    """Defaults of the other flags: the paper's, for a small model on two CPU cores, or for the shortest test
    run, which takes minutes on a CPU to compile."""
    recipe: RecipeName = "distill"
    """How the heads are found; attention-profile and kvzip train nothing."""
    start: str | None = None
    """Pattern whose gates are the initial gates: a folder or a published name."""
    start_ranks: bool = False
    """Begin with the ranks of those gates, evenly spaced from 0 to 1, for scores that only rank the heads."""
    sink_size: int = 64
    """First tokens that streaming heads keep at inference; stored in the pattern."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep at inference; stored in the pattern."""
    resume: bool = False
    """Resume the run in the folder from its last checkpoint; start it if there is none. With more steps than a finished
    run had, extend it: from its last step, the learning rate follows the schedule of all steps."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    data: Needles = Needles()
    attention: GatedModel = GatedModel()
    settings: Annotated[dict[str, Recipe], tyro.conf.arg(name="")] = recipe_settings()

    @classmethod
    def variant(cls, args: Sequence[str]) -> "type[Identify]":
        """The class of the preset in the arguments: this one with other defaults."""
        words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--preset=") else [arg])]
        presets = [value for flag, value in pairwise(words) if flag == "--preset"]
        return PRESETS.get(presets[-1] if presets else "paper", cls)

    @property
    def chosen(self) -> Recipe:
        """The recipe, with its settings."""
        return self.settings[self.recipe]

    @property
    def steps(self) -> int | None:
        """Steps of the recipe; None for one that trains nothing."""
        return getattr(self.chosen, "steps", None)

    def requests(self) -> list[Request]:
        """The attention that training runs, for certification."""
        if self.attention.backend is not None:
            return []
        config = open_config(self.model.model).with_dtypes(dtype=self.model.dtype)
        return training(config, self.attention.window, self._sharers(DeviceOptions(self.mesh).size))

    def _sharers(self, size: MeshSize) -> MeshSize:
        """Of the devices in use, those that share attention: only training divides it."""
        return MeshSize() if self.steps is None else size

    def _backends(self) -> list[dict[str, Any]]:
        """The entries of the run's file about backends; the last one is of what runs now."""
        path, config = self.out / RUN_FILE, open_config(self.model.model)
        config = config.with_dtypes(dtype=usual_dtype(config, self.model.dtype))
        devices = self.chosen.devices(config, DeviceOptions(self.mesh).make(), fsdp=self.fsdp)
        requests = training(config, self.attention.window, self._sharers(MeshSize.of(devices)))
        earlier = read_json(path).get(BACKENDS, []) if path.exists() else []
        return resumed(path, earlier, requests, self.attention.backend)

    def resolved(self) -> dict[str, Any]:
        """Everything that affects the gates, as JSON."""
        config = {name: value for name, value in dataclasses.asdict(self).items() if name not in (*FREE, "settings")}
        config |= config.pop("model") | {"data": self.data.saved(), "settings": vars(self.chosen)}
        return json.loads(json.dumps(config))

    def run(self) -> None:
        """Find the heads and write the pattern.

        Raises:
            ValueError: settings that contradict each other, or a folder with another run.
        """
        free = {name: getattr(self, name) for name in FREE if name not in ("processes", "preset")}
        self.processes.join(self.resolved() | free)
        self.check()
        if self.resume and (self.out / GATES_FILE).exists() and finished_steps(self.out) == self.steps:
            print(f"{self.out} has the finished run already")
            return
        backends = self._backends()
        run = self.prepare()
        # Nothing is written until every check has passed.
        with locked(self.out) if is_first() else nullcontext():
            self._find(run, backends)

    def check(self) -> None:
        """Check that the folder is free or has this same run. `run` compares weights and text later.

        Raises:
            ValueError: the folder has something else.
        """
        check_folder(self.out, self.resolved(), resume=self.resume)

    def _find(self, run: Run, backends: list[dict[str, Any]]) -> None:
        """Find the heads; the folder is locked."""
        config = self.resolved() | {"contents": contents(run)}
        check_folder(self.out, config, resume=self.resume)
        # All processes must have checked the folder before the first one writes.
        check_alike(config | {BACKENDS: backends})
        extends = extended(self.out, self.steps)
        about = config | {BACKENDS: backends} | extends
        if is_first() and (not (self.out / RUN_FILE).exists() or about != read_json(self.out / RUN_FILE)):
            write_text(self.out / RUN_FILE, json.dumps(about, indent=1) + "\n")
        if is_first() and extends:
            print(
                f"{self.out}: extending the run from step {extends[EXTENDS][-1]} to {self.steps}, with the learning "
                f"rate that a run of {self.steps} steps has there",
                file=sys.stderr,
            )
        with tqdm(desc=self.recipe, unit="step", dynamic_ncols=True, disable=not is_first()) as bar:
            try:
                with repeating(backends[-1]["choices"]):
                    gates = self.chosen.find(dataclasses.replace(run, report=partial(_show, bar)))
            except (KeyboardInterrupt, SystemExit):
                how = "run the same command again" if self.resume else "add --resume"
                print(f"\n{self.out}: stopped; {how} to resume", file=sys.stderr)
                raise
        if not is_first():
            return
        # An extended run leaves the earlier pattern until here. Without its gates, a run that is killed now is not
        # finished.
        (self.out / GATES_FILE).unlink(missing_ok=True)
        self.pattern(gates, extended(self.out, self.steps), run.model.config.window_layers).save(self.out)
        above = f"{int((gates > 0.5).sum())} of {gates.size} above 0.5"
        print(f"{self.out}: gates from {gates.min():.3g} to {gates.max():.3g}, {above}")

    def prepare(self) -> Run:
        """Load everything the recipe needs and check it; nothing is written."""
        self.pattern(np.ones((1, 1)))  # Rejects invalid sink_size and recent_size.
        whole_number("checkpoint_every", self.checkpoint_every, 1)
        whole_number("keep_checkpoints", self.keep_checkpoints, 1)
        mesh = DeviceOptions(self.mesh).make()
        config, start = open_config(self.model.model), None
        sharers = self.chosen.devices(config, mesh, fsdp=self.fsdp)
        if self.start is not None and self.steps is None:
            raise ValueError(f"--recipe {self.recipe} trains nothing, so it has no use for --start: leave that out")
        if self.start is not None:
            gates = HeadPattern.load(self.start).of(config).gates[list(config.full_layers)]
            start = ranks(gates) if self.start_ranks else gates
        elif self.start_ranks:
            raise ValueError("--start-ranks needs the gates to rank: --start PATTERN")
        fsdp = self.fsdp and sharers is not None
        model = self.model.load(mesh=sharers if fsdp else None, fsdp=fsdp)
        data = NeedleData(self.data, self.model.tokenizer())
        trained = model.config.trained_positions
        longest = max(self.data.lengths) + len(data[0].tokens) - data[0].text_length
        if longest > trained:
            warnings.warn(
                f"samples have up to {longest} tokens, but the model was trained with {trained}", stacklevel=2
            )
        run = Run(
            model,
            data,
            self.attention,
            self.out,
            start=start,
            resume=self.resume,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            mesh=mesh,
        )
        self.chosen.check(run)
        return run

    def pattern(
        self,
        gates: Float[np.ndarray, "F K"],
        extends: Mapping[str, Any] | None = None,
        window_layers: tuple[int, ...] = (),
    ) -> HeadPattern:
        """The gates as a pattern, with all settings as metadata; `F` layers have gates, window layers have none."""
        training = self.resolved() | dict(extends or {}) | {"duo_jax": duo_jax.__version__}
        metadata: dict[str, Any] = {"model_name": self.model.model, "training": training}
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        sparsity = self.chosen.sparsity
        if sparsity is not None:
            metadata |= {DEFAULT_RULE: sparsity}
        if window_layers:
            gates = np.insert(gates, [layer - n for n, layer in enumerate(window_layers)], 0, axis=0)
        return HeadPattern.from_gates(gates, **sizes, sparsity=sparsity, metadata=metadata, window_layers=window_layers)


def ranks(gates: Float[np.ndarray, "L K"]) -> Float[np.ndarray, "L K"]:
    """Evenly spaced from 0 for the smallest gate to 1 for the largest; equal gates share their mean."""
    ascending = np.sort(gates, axis=None)
    first, after = (np.searchsorted(ascending, gates, side) for side in ("left", "right"))
    return (first + after - 1) / 2 / max(gates.size - 1, 1)


def contents(run: Run) -> dict[str, str | None]:
    """Fingerprints of the weights, the text and the initial gates: files may have changed when a run is resumed."""
    weights = hashlib.sha256()
    mesh = run.model.mesh
    # Every process needs the numbers, which are on one device.
    first = partial(jax.jit, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))(_first)
    for leaf in jax.tree.leaves(run.model.params):
        weights.update(np.asarray(first(leaf)).tobytes())
    return {
        "weights": weights.hexdigest()[:16],
        "text": hashlib.sha256(run.data.text.tobytes()).hexdigest()[:16],
        "start": None if run.start is None else hashlib.sha256(run.start.tobytes()).hexdigest()[:16],
    }


def _first(x: Array) -> Array:
    """The first 1024 numbers of an array."""
    rows = x[: -(-1024 // x.shape[-1])] if x.ndim == 2 else x
    return rows.ravel()[:1024]


def finished_steps(folder: Path) -> int | None:
    """The steps of the finished run in a folder; None if there is none, or a recipe that trains nothing."""
    if not (folder / GATES_FILE).exists() or not (folder / RUN_FILE).exists():
        return None
    training = HeadPattern.load(folder).metadata.get("training")
    settings = training.get("settings") if isinstance(training, dict) else None
    steps = settings.get("steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


def extended(folder: Path, steps: int | None) -> dict[str, list[int]]:
    """The numbers of steps at which runs in this folder were finished, before they were extended to `steps`."""
    path = folder / RUN_FILE
    earlier = read_json(path).get(EXTENDS, []) if path.exists() else []
    finished = finished_steps(folder)
    if steps is not None and finished is not None and finished < steps and finished not in earlier:
        earlier = [*earlier, finished]
    return {EXTENDS: earlier} if earlier else {}


def check_folder(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Check that a run may write to the folder; `config` may come without fingerprints.

    Raises:
        ValueError: the folder has other files, or a run with other settings.
        OSError: nothing can be written there.
    """
    path = folder / RUN_FILE
    if path.exists():
        if not resume:
            raise ValueError(f"{folder} has a run already: add --resume to continue it, or choose another folder")
        try:
            saved = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; choose another folder") from None
        if not {"model", "recipe", "settings"} <= set(saved):
            raise ValueError(f"{path} is not the file of a run: choose another folder")
        before = ADDED | {name: saved[name] for name in saved if name in config or name not in BESIDES}
        old, asked = before["settings"], config["settings"].get("steps")
        if isinstance(old, dict) and asked is not None and (finished := finished_steps(folder)) is not None:
            if asked < finished:
                raise ValueError(
                    f"the run in {folder} is finished, with {finished} steps: give as many with "
                    f"--{config['recipe']}.steps, or more to extend it, or choose another folder"
                )
            if asked > finished and _last_checkpoint(folder) < finished:
                raise ValueError(
                    f"the run in {folder} has no checkpoint of its last step, {finished}, so it cannot be extended: "
                    f"choose another folder and --start {folder}"
                )
            if old.get("steps") == finished:
                before["settings"] = {**old, "steps": asked}
        different = changes(before, config)
        if different:
            raise ValueError(
                f"the run in {folder} has other settings: {'; '.join(different)}. Give the same ones, or another folder"
            )
    elif folder.exists() and (not folder.is_dir() or not all(map(is_left_over, folder.iterdir()))):
        raise ValueError(f"{folder} is not empty and has no run: choose another folder")
    check_pattern_folder(folder)


def _last_checkpoint(folder: Path) -> int:
    """The step of the last checkpoint in a folder; 0 if there is none."""
    names = (path.name for path in (folder / CHECKPOINTS).glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _show(bar: Any, done: int, total: int, metrics: Mapping[str, float | int]) -> None:
    bar.total = total
    if not bar.n:  # The first step of this process; a resumed run does not start at step 1.
        bar.initial = bar.n = bar.last_print_n = done - 1
    shown = ("loss", "distillation", "next_token", "mean_gate", "above_half")
    bar.set_postfix({name: f"{metrics[name]:.4g}" for name in shown if name in metrics}, refresh=False)
    bar.update(done - bar.n)


@dataclass(frozen=True)
class SmolLM2Cpu(Identify):
    """A small model on two CPU cores: samples of about 1070 tokens with 8 passkeys, and a much shorter window."""

    preset: PresetName = "smollm2-cpu"
    checkpoint_every: int = 10
    data: Needles = Needles(
        num_passkeys=8,
        passkey_words=5,
        vocabulary=COMMON,
        min_length=540,
        max_length=540,
        num_lengths=1,
        num_samples=150,
    )
    attention: GatedModel = GatedModel(sink_size=32, recent_size=128, rematerialize=False)
    settings: Annotated[dict[str, Recipe], tyro.conf.arg(name="")] = recipe_settings(
        Distill(steps=200, learning_rate=0.05, cooldown=0.4, reg_weight=0.2, pad_multiple=64),
        PruLong(steps=200, multiplier_rate=0.3, pad_multiple=64),
        AttentionProfile(num_samples=8, length=1024),
        KVzip(num_samples=4, length=1024),
    )


@dataclass(frozen=True)
class Debug(Identify):
    """The shortest test run on any model, most of which is compilation; its gates mean nothing."""

    preset: PresetName = "debug"
    checkpoint_every: int = 2
    # One length, and nothing computed twice: one program, and a smaller one, which is what takes the time.
    data: Needles = Needles(num_passkeys=2, passkey_words=2, min_length=300, max_length=300, num_lengths=1)
    attention: GatedModel = GatedModel(sink_size=4, recent_size=16, rematerialize=False)
    settings: Annotated[dict[str, Recipe], tyro.conf.arg(name="")] = recipe_settings(
        Distill(steps=5),
        PruLong(steps=5),
        AttentionProfile(num_samples=1, length=128),
        KVzip(num_samples=1, length=128),
    )


PRESETS: dict[str, type[Identify]] = {"paper": Identify, "smollm2-cpu": SmolLM2Cpu, "debug": Debug}
