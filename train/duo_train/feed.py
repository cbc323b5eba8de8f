"""Batches by step, placed on the devices, with the targets that the objective computes once per sample.

In a run of several processes each draws the samples of its own devices; which they are depends only on the step.
"""

import math
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float

from duo_jax.mesh.mesh import constrain
from duo_jax.mesh.processes import gather
from duo_jax.model.model import Model
from duo_train.data.batches import Batch, padded_size, stack
from duo_train.devices import Sharding
from duo_train.gated import GatedModel
from duo_train.objective import Objective
from duo_train.run import Run

# Host memory for targets that are reused when samples repeat.
KEPT_BYTES = 4 << 30


class Feed:
    """The batches of a run."""

    def __init__(self, objective: Objective, run: Run, sharding: Sharding) -> None:
        self.objective, self.data, self.sharding = objective, run.data, sharding
        self.attention = sharding.model(run.attention)
        self.kept: dict[int, np.ndarray] = {}  # targets by sample

    def batch(self, model: Model, step: int) -> tuple[Batch, Float[Array, "A B M D"] | None]:
        """The batch of a step, counted from 0, and the objective's targets for it."""
        objective, sharding, num_samples = self.objective, self.sharding, self.data.config.num_samples
        first = step * objective.batch_size * objective.accumulate
        micro_batches = range(objective.accumulate)
        numbers = [first + micro * objective.batch_size + row for micro in micro_batches for row in sharding.rows]
        samples = [self.data[number] for number in numbers]
        ids = [number % num_samples for number in numbers] if num_samples else []
        known = bool(ids) and all(i in self.kept for i in ids)
        multiple = math.lcm(objective.pad_multiple, sharding.size.sequence)
        # All processes must agree on the shape of the batch, and on whether to compute targets.
        agreed = gather([*padded_size(samples, pad_multiple=multiple), not known])
        width, num_labels, unknown = (max(column) for column in zip(*agreed, strict=True))
        tokens, labels, valid = stack(samples, accumulate=objective.accumulate, width=width, num_labels=num_labels)
        batch = Batch(sharding.put(tokens, tokens=True), sharding.put(labels), sharding.put(valid))
        if not unknown:
            kept = [np.resize(self.kept[i], (num_labels, self.kept[i].shape[1])) for i in ids]
            return batch, sharding.put(np.stack(kept).reshape(*labels.shape, -1))
        targets = _targets(objective, self.attention, model, batch)
        if targets is not None and ids and sum(row.nbytes for row in self.kept.values()) < KEPT_BYTES:
            rows = sharding.local_rows(targets).reshape(len(ids), *targets.shape[2:])
            self.kept |= {i: row[: s.labels.sum()] for i, row, s in zip(ids, rows, samples, strict=True)}
        return batch, targets


@partial(jax.jit, static_argnums=(0, 1))
def _targets(objective: Objective, attention: GatedModel, model: Model, batch: Batch) -> Float[Array, "A B M D"] | None:
    targets = jax.lax.map(lambda micro: objective.targets(attention, model, micro), batch)
    return constrain(targets, attention.mesh, None, "data")
