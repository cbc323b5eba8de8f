"""The training loop: one jitted step, checkpoints, metrics, signals. Knows no recipe: it trains any `Learned`.

A run that is killed at any moment and resumed ends with the gates of one that was not: a step depends on the state and
on its own number alone, and what was written after the last checkpoint is written again.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int32

from duo_jax.files import write_text
from duo_jax.mesh.mesh import constrain
from duo_jax.mesh.processes import check_alike, gather, is_first
from duo_jax.model import Model
from duo_train.data.batches import Batch, stack, widths
from duo_train.devices import Sharding
from duo_train.gated import GatedModel
from duo_train.recipes.base import METRICS_FILE, Run
from duo_train.recipes.learned import Learned, Params

CHECKPOINTS = "checkpoints"
# Host memory for targets that are used again when samples come round.
KEPT_BYTES = 4 << 30


class State(NamedTuple):
    """Everything that a step changes."""

    step: Int32[Array, ""]
    params: Params
    optimizer: optax.OptState


def train(recipe: Learned, run: Run) -> Float[np.ndarray, "L K"]:
    """Train the recipe's gates, with checkpoints and metrics in `run.folder`.

    Raises:
        ValueError: a batch that the devices cannot share, or checkpoints in the folder of a run that is not resumed.
        FloatingPointError: a loss or gate that is not finite, with the step; the checkpoints before it stay.
        OSError: a checkpoint that could not be written; the ones before it stay.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        SystemExit: SIGTERM, after a checkpoint was written.
    """
    recipe.check(run)
    sharding = Sharding(run.mesh, run.model.config, recipe.batch_size)
    if not run.resume and (run.folder / METRICS_FILE).exists():
        raise ValueError(f"{run.folder} holds the metrics of a run: resume it, or choose another folder")
    check_alike({"start": None if run.start is None else run.start.tolist(), "steps": recipe.steps})
    feed = _Feed(recipe, run, sharding)
    start = jnp.ones(run.shape, jnp.float32) if run.start is None else jnp.asarray(run.start, jnp.float32)
    params = recipe.init(start)
    state = sharding.replicate(State(jnp.int32(0), params, recipe.optimizer().init(params)))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=run.keep_checkpoints, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with (
        ocp.CheckpointManager((run.folder / CHECKPOINTS).absolute(), options=options) as checkpoints,
        _signals() as caught,
    ):
        if checkpoints.latest_step() is not None:
            if not run.resume:
                raise ValueError(f"{run.folder} holds checkpoints of a run: resume it, or choose another folder")
            state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(state))
        done = int(state.step)
        model = sharding.replicate(run.model)
        with _Metrics(run.folder / METRICS_FILE if is_first() else None, done) as metrics:
            for number in range(done, recipe.steps):
                begin = time.perf_counter()
                batch, targets = feed.batch(model, number)
                new, figures = step(recipe, feed.attention, model, state, batch, targets)
                figures = {name: float(value) for name, value in figures.items()}
                _check_finite(number + 1, figures, checkpoints.latest_step())
                state = new
                figures |= {"seconds": time.perf_counter() - begin, "tokens": batch.tokens.size}
                metrics.write({"step": number + 1, **figures})
                finished = number + 1 == recipe.steps
                # Asked once: a signal from here on waits for the next step, and its checkpoint. After the last step the
                # gates are as good as written. A signal to one process is one to all: they write checkpoints together.
                signals = [number for row in gather(caught[:1] or [0]) for number in row if number]
                leaving = bool(signals) and not finished
                last = leaving or finished
                if last or (number + 1) % run.checkpoint_every == 0:
                    _save(checkpoints, state, force=last)
                run.report(number + 1, recipe.steps, figures)
                if leaving:
                    _leave(signals[0])
    return np.asarray(jax.device_get(recipe.gates(state.params)), np.float64)


@partial(jax.jit, static_argnums=(0, 1))
def step(
    recipe: Learned,
    attention: GatedModel,
    model: Model,
    state: State,
    batch: Batch,
    targets: Float[Array, "A B M D"] | None,
) -> tuple[State, dict[str, Array]]:
    """One optimizer step: gradients of every micro-batch added up, then the update."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    # The mean is over the label tokens of the whole step: a sum of means would favour samples with few of them.
    count = batch.valid.sum(dtype=jnp.float32)

    def micro(params: Params, batch: Batch, targets: Array | None) -> Array:
        losses = recipe.losses(attention, model, params, batch, targets, key)
        return jnp.where(batch.valid, losses, 0.0).sum() / count

    def accumulate(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro)(state.params, *micro_batch)), None

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
    (loss, gradient), _ = jax.lax.scan(accumulate, zero, (batch, targets))

    def penalty(params: Params) -> tuple[Array, dict[str, Array]]:
        return recipe.penalty(params, state.step)

    (extra, figures), more = jax.value_and_grad(penalty, has_aux=True)(state.params)
    gradient = jax.tree.map(jnp.add, gradient, more)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power.
        updates, optimizer = recipe.optimizer().update(gradient, state.optimizer, state.params)
    params = recipe.project(optax.apply_updates(state.params, updates))
    gates = recipe.gates(params)
    figures = {
        "loss": loss + extra,
        recipe.loss_name: loss,
        "regularization": extra,
        "mean_gate": gates.mean(),
        "above_half": (gates > 0.5).mean(dtype=jnp.float32),
        "learning_rate": recipe.schedule(state.step),
        **figures,
    }
    # Left to choose, XLA would leave the state divided as its gradient is.
    return constrain((State(state.step + 1, params, optimizer), figures), attention.mesh)


def _save(checkpoints: ocp.CheckpointManager, state: State, *, force: bool) -> None:
    """Write a checkpoint: all of it or, whatever stops it (a full disk), nothing that would be taken for one."""
    step, latest = int(state.step), checkpoints.latest_step()
    log = logging.getLogger("absl")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # Orbax logs the traceback of what it raises.
        checkpoints.save(step, args=ocp.args.StandardSave(state), force=force)
    except Exception as error:  # What Orbax raises depends on who noticed first.
        kept = "there is none before it" if latest is None else f"that of step {latest} is kept"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise OSError(f"could not save the checkpoint of step {step} ({kept}): {reason}") from error
    finally:
        log.setLevel(level)


class _Feed:
    """Batches by step, placed on the devices; and what the model alone gives the loss, computed once a sample.

    Of several processes, each draws the samples of its own devices: which they are depends on the step alone.
    """

    def __init__(self, recipe: Learned, run: Run, sharding: Sharding) -> None:
        self.recipe, self.run, self.sharding = recipe, run, sharding
        self.attention = sharding.model(run.attention)
        self.kept: dict[int, np.ndarray] = {}

    def batch(self, model: Model, step: int) -> tuple[Batch, Float[Array, "A B M D"] | None]:
        """The batch of a step, counted from 0, and the recipe's targets for it."""
        recipe, config = self.recipe, self.run.data.config
        first = step * recipe.batch_size * recipe.accumulate
        numbers = [
            first + micro * recipe.batch_size + row for micro in range(recipe.accumulate) for row in self.sharding.rows
        ]
        samples = [self.run.data[number] for number in numbers]
        ids = [number % config.num_samples for number in numbers] if config.num_samples else []
        known = bool(ids) and all(i in self.kept for i in ids)
        multiple = math.lcm(recipe.pad_multiple, self.sharding.size.sequence)
        agreed = gather([*widths(samples, pad_multiple=multiple), not known])
        width, most, unknown = (max(column) for column in zip(*agreed, strict=True))
        tokens, labels, valid = stack(samples, accumulate=recipe.accumulate, width=width, most=most)
        batch = Batch(self.sharding.put(tokens, tokens=True), self.sharding.put(labels), self.sharding.put(valid))
        if not unknown:
            kept = [np.resize(self.kept[i], (most, self.kept[i].shape[1])) for i in ids]
            return batch, self.sharding.put(np.stack(kept).reshape(*labels.shape, -1))
        targets = _targets(recipe, self.attention, model, batch)
        if targets is not None and ids and sum(row.nbytes for row in self.kept.values()) < KEPT_BYTES:
            rows = self.sharding.local_rows(targets).reshape(len(ids), *targets.shape[2:])
            self.kept |= {i: row[: s.labels.sum()] for i, row, s in zip(ids, rows, samples, strict=True)}
        return batch, targets


@partial(jax.jit, static_argnums=(0, 1))
def _targets(recipe: Learned, attention: GatedModel, model: Model, batch: Batch) -> Float[Array, "A B M D"] | None:
    found = jax.lax.map(lambda micro: recipe.targets(attention, model, micro), batch)
    return constrain(found, attention.mesh, None, "data")


class _Metrics:
    """One JSON object a line and step. Lines after the checkpoint that a run goes on from are dropped.

    Without a path, another process writes.
    """

    def __init__(self, path: Path | None, done: int) -> None:
        self.file = None
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done))
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append a line and hand it to the system at once."""
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def _check_finite(step: int, figures: Mapping[str, float | int], latest: int | None) -> None:
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        kept = "no checkpoint was written yet" if latest is None else f"the checkpoint of step {latest} is kept"
        raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite, so training stops; {kept}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to stop: they wait for the end of the step; a second one does not wait."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught:
            _leave(number)
        caught.append(number)

    wanted = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, catch) for number in wanted}
    except ValueError:  # Only the main thread may: a notebook's or a server's other threads train without.
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
