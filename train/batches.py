"""Samples stacked into arrays of few different shapes, so that a step is compiled seldom."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Int32

from train.needles import Sample

# Label positions are padded to a multiple of this: passkeys of random words differ by a few tokens.
LABEL_MULTIPLE = 256


class Batch(NamedTuple):
    """Samples of one step. The first axis is gradient accumulation: `A` micro-batches of `B` samples."""

    tokens: Int32[Array, "*A B T"]
    labels: Int32[Array, "*A B M"]  # positions of the label tokens
    valid: Bool[Array, "*A B M"]  # False where `labels` is padding


def stack(samples: Sequence[Sample], *, accumulate: int, pad_multiple: int, sharding: Sharding) -> Batch:
    """Arrays `[accumulate, len(samples) // accumulate, ...]`, padded at the right, where causality hides it."""
    positions = [np.flatnonzero(sample.labels) for sample in samples]
    width = _round_up(max(len(sample.tokens) for sample in samples), pad_multiple)
    most = _round_up(max(len(found) for found in positions), LABEL_MULTIPLE)
    tokens = np.zeros((len(samples), width), np.int32)
    labels = np.zeros((len(samples), most), np.int32)
    valid = np.zeros((len(samples), most), bool)
    for row, (sample, found) in enumerate(zip(samples, positions, strict=True)):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(found)] = found
        valid[row, : len(found)] = True
    split = (accumulate, len(samples) // accumulate)
    host = (array.reshape(*split, array.shape[1]) for array in (tokens, labels, valid))
    return Batch(*(jax.device_put(array, sharding) for array in host))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
