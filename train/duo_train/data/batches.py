"""Samples stacked into arrays of a few shapes, to limit recompilation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int32

from duo_train.data.needles import Sample

# Label positions are padded to a multiple of this, because passkeys of random words differ by a few tokens.
LABEL_MULTIPLE = 256


class Batch(NamedTuple):
    """The samples of one step. The first axis is gradient accumulation: `A` micro-batches of `B` samples."""

    tokens: Int32[Array, "*A B T"]
    labels: Int32[Array, "*A B M"]  # positions of the label tokens
    valid: Bool[Array, "*A B M"]  # False where `labels` is padding


def padded_size(samples: Sequence[Sample], *, pad_multiple: int) -> tuple[int, int]:
    """The numbers of tokens and of labels that samples are padded to."""
    width = max(len(sample.tokens) for sample in samples)
    num_labels = max(int(np.count_nonzero(sample.labels)) for sample in samples)
    return _round_up(width, pad_multiple), _round_up(num_labels, LABEL_MULTIPLE)


def stack(samples: Sequence[Sample], *, accumulate: int, width: int, num_labels: int) -> tuple[np.ndarray, ...]:
    """A `Batch` on the host, `[accumulate, len(samples) // accumulate, ...]`; padding is hidden by causality."""
    tokens = np.zeros((len(samples), width), np.int32)
    labels = np.zeros((len(samples), num_labels), np.int32)
    valid = np.zeros((len(samples), num_labels), bool)
    for row, sample in enumerate(samples):
        positions = np.flatnonzero(sample.labels)
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(positions)] = positions
        valid[row, : len(positions)] = True
    split = (accumulate, len(samples) // accumulate)
    return tuple(array.reshape(*split, array.shape[1]) for array in (tokens, labels, valid))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
