"""Sizes of prompts, chunks and caches: few different ones, so that most calls find a compiled program."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from duo_jax.arguments import whole_number

# Most tokens of a prompt computed at a time by default: limits the memory of activations, not the result.
CHUNK_SIZE = 1024

# Fixed cost of a chunk, in tokens: reading the weights, loops over heads. Measured on two CPU cores with SmolLM2 at
# 2048 tokens: chunks of 256, 512 and 1024 take 3.5, 2.7 and 2.3 s.
CHUNK_OVERHEAD = 100


def bucket(count: int) -> int:
    """Round `count` up to one of eight sizes per power of two (by at most 1/8), to limit recompilation."""
    step = max(16, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def chunk_width(length: int, chunk_size: int | None = None) -> int:
    """Tokens per chunk for a prompt: `chunk_size`, or by default the power of two that should take the least time.

    Only a few widths occur, so a new prompt seldom compiles.

    Raises:
        ValueError: a chunk size below 1.
    """
    if chunk_size is not None:
        return min(whole_number("chunk_size", chunk_size, 1), 1 << max(4, (length - 1).bit_length()))
    widths = [1 << power for power in range(4, CHUNK_SIZE.bit_length())]
    return min(widths, key=lambda width: -(-length // width) * (width + CHUNK_OVERHEAD))


def chunks(
    tokens: Int32[Array | np.ndarray, "B T"], lengths: Int32[Array | np.ndarray, "B"], width: int
) -> Iterator[tuple[int, Array | np.ndarray, Array | np.ndarray]]:
    """Split right-padded rows: for every chunk its first column, tokens `[B, width]` and valid tokens per row `[B]`."""
    for begin in range(0, tokens.shape[1], width):
        chunk = tokens[:, begin : begin + width]
        yield begin, pad_columns(chunk, width - chunk.shape[1]), (lengths - begin).clip(0, width)


def pad_columns(tokens: Int32[Array | np.ndarray, "B T"], count: int) -> Array | np.ndarray:
    """Append `count` columns of padding, on the host where the tokens are."""
    pad = np.pad if isinstance(tokens, np.ndarray) else jnp.pad
    return pad(tokens, ((0, 0), (0, count)))
