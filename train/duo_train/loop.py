"""The training loop: one jitted step, checkpoints, metrics, signals. Trains any `Objective` and knows no recipe.

A run that is killed at any moment and resumed ends with the gates of one that was not: a step depends only on the state
and on its own number, and the metrics after the last checkpoint are written again.
"""

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from duo_jax.mesh.mesh import constrain
from duo_jax.mesh.processes import check_alike, gather, is_first, share_verdicts
from duo_jax.model.model import Model
from duo_train.checkpoints import Checkpoints
from duo_train.data.batches import Batch
from duo_train.devices import Sharding
from duo_train.feed import Feed
from duo_train.gated import GatedModel
from duo_train.metrics import METRICS_FILE, MetricsWriter
from duo_train.objective import Objective, Params
from duo_train.run import Run


class State(NamedTuple):
    """Everything that a step changes."""

    step: Int32[Array, ""]
    params: Params
    optimizer: optax.OptState


def train(objective: Objective, run: Run) -> Float[np.ndarray, "L K"]:
    """Train gates, with checkpoints and metrics in `run.folder`.

    Raises:
        ValueError: a batch that the devices cannot share, or `run.folder` has checkpoints and `run.resume` is false.
        FloatingPointError: a loss or gate that is not finite, with the step; the checkpoints before it are kept.
        OSError: a checkpoint that could not be written; the ones before it are kept.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        SystemExit: SIGTERM, after a checkpoint was written.
    """
    sharding = Sharding(run.devices, run.model.config, objective.batch_size)
    if not run.resume and (run.folder / METRICS_FILE).exists():
        raise ValueError(f"{run.folder} has the metrics of a run: resume it, or choose another folder")
    share_verdicts()
    check_alike({"start": None if run.start is None else run.start.tolist(), "steps": objective.steps})
    feed = Feed(objective, run, sharding)
    start = jnp.ones(run.shape, jnp.float32) if run.start is None else jnp.asarray(run.start, jnp.float32)
    params = objective.init(start)
    state = sharding.replicate(State(jnp.int32(0), params, objective.optimizer().init(params)))
    with Checkpoints(run.folder, keep=run.keep_checkpoints) as checkpoints, _signals() as caught:
        if checkpoints.latest is not None:
            if not run.resume:
                raise ValueError(f"{run.folder} has the checkpoints of a run: resume it, or choose another folder")
            state = checkpoints.restore(state)
        done = int(state.step)
        if done != (checkpoints.latest or 0):
            raise ValueError(
                f"the checkpoint of step {checkpoints.latest} in {run.folder} is of step {done}: remove it"
            )
        model = run.model if run.model.is_fsdp else sharding.replicate(run.model)
        writer = MetricsWriter(run.folder / METRICS_FILE if is_first() else None, done)
        for number in range(done, objective.steps):
            begin = time.perf_counter()
            batch, targets = feed.batch(model, number)
            new, arrays = step(objective, feed.attention, model, state, batch, targets)
            metrics = {name: float(value) for name, value in arrays.items()}
            _check_finite(number + 1, metrics, checkpoints.latest)
            state = new
            metrics |= {"seconds": time.perf_counter() - begin, "tokens": batch.tokens.size}
            writer.write({"step": number + 1, **metrics})
            finished = number + 1 == objective.steps
            # Signals are read once per step: one that arrives later waits for the next step and its checkpoint, or
            # for the end of the run. A signal to one process stops all: they write checkpoints together.
            signals = [received for row in gather(caught[:1] or [0]) for received in row if received]
            leaving = bool(signals) and not finished
            last = leaving or finished
            if last or (number + 1) % run.checkpoint_every == 0:
                checkpoints.save(int(state.step), state, force=last)
            run.report(number + 1, objective.steps, metrics)
            if leaving:
                _leave(signals[0])
    return np.asarray(jax.device_get(objective.gates(state.params)), np.float64)


@partial(jax.jit, static_argnums=(0, 1))
def step(
    objective: Objective,
    attention: GatedModel,
    model: Model,
    state: State,
    batch: Batch,
    targets: Float[Array, "A B M D"] | None,
) -> tuple[State, dict[str, Array]]:
    """One optimizer step: gradients of every micro-batch added up, then the update."""
    key = jax.random.fold_in(jax.random.key(objective.seed), state.step)
    # The mean is over the label tokens of the whole step: a sum of means would favour samples with few of them.
    count = batch.valid.sum(dtype=jnp.float32)

    def micro(params: Params, batch: Batch, targets: Array | None) -> Array:
        losses = objective.losses(attention, model, params, batch, targets, key)
        return jnp.where(batch.valid, losses, 0.0).sum() / count

    def accumulate(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro)(state.params, *micro_batch)), None

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
    (loss, gradient), _ = jax.lax.scan(accumulate, zero, (batch, targets))

    def penalty(params: Params) -> tuple[Array, dict[str, Array]]:
        return objective.penalty(params, state.step)

    (extra, metrics), more = jax.value_and_grad(penalty, has_aux=True)(state.params)
    gradient = jax.tree.map(jnp.add, gradient, more)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power.
        updates, optimizer = objective.optimizer().update(gradient, state.optimizer, state.params)
    params = objective.project(optax.apply_updates(state.params, updates))
    gates = objective.gates(params)
    metrics = {
        "loss": loss + extra,
        objective.loss_name: loss,
        "regularization": extra,
        "mean_gate": gates.mean(),
        "above_half": (gates > 0.5).mean(dtype=jnp.float32),
        "learning_rate": objective.schedule(state.step),
        **metrics,
    }
    # Without this, XLA would shard the state as it shards the gradient.
    return constrain((State(state.step + 1, params, optimizer), metrics), attention.mesh)


def _check_finite(step: int, metrics: Mapping[str, float | int], latest: int | None) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        kept = "no checkpoint was written yet" if latest is None else f"the checkpoint of step {latest} is kept"
        raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite, so training stops; {kept}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM wait for the end of the step; a second one stops the process at once."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught:
            _leave(number)
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, catch) for number in numbers}
    except ValueError:  # Only the main thread may set handlers; in other threads training works without them.
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
