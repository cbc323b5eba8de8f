"""Samples stacked into arrays of few different shapes, so that a step is compiled seldom."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int32

from duo_train.data.needles import Sample

# Label positions are padded to a multiple of this: passkeys of random words differ by a few tokens.
LABEL_MULTIPLE = 256


class Batch(NamedTuple):
    """Samples of one step. The first axis is gradient accumulation: `A` micro-batches of `B` samples."""

    tokens: Int32[Array, "*A B T"]
    labels: Int32[Array, "*A B M"]  # positions of the label tokens
    valid: Bool[Array, "*A B M"]  # False where `labels` is padding


def widths(samples: Sequence[Sample], *, pad_multiple: int) -> tuple[int, int]:
    """Tokens and labels that samples are padded to."""
    width = max(len(sample.tokens) for sample in samples)
    most = max(int(np.count_nonzero(sample.labels)) for sample in samples)
    return _round_up(width, pad_multiple), _round_up(most, LABEL_MULTIPLE)


def stack(samples: Sequence[Sample], *, accumulate: int, width: int, most: int) -> tuple[np.ndarray, ...]:
    """A `Batch` of the host, `[accumulate, len(samples) // accumulate, ...]`; causality hides the padding."""
    positions = [np.flatnonzero(sample.labels) for sample in samples]
    tokens = np.zeros((len(samples), width), np.int32)
    labels = np.zeros((len(samples), most), np.int32)
    valid = np.zeros((len(samples), most), bool)
    for row, (sample, found) in enumerate(zip(samples, positions, strict=True)):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(found)] = found
        valid[row, : len(found)] = True
    split = (accumulate, len(samples) // accumulate)
    return tuple(array.reshape(*split, array.shape[1]) for array in (tokens, labels, valid))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
