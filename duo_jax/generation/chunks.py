"""Sizes of prompts, chunks and caches: few different ones, so that most calls find a compiled program."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from duo_jax.arguments import whole_number
from pallas_kernels.gpus import device_kind

# Most tokens of a prompt computed at a time by default: limits the memory of activations, not the result. On a GPU a
# chunk's programs must keep more than a hundred multiprocessors busy: those of 1024 tokens of half of the heads keep
# about 70 % of an H200's, of 8192 nearly all. Activations of 8192 tokens of Llama-3-8B take 1.1 GB.
CHUNK_SIZE = 1024
GPU_CHUNK_SIZE = 8192

# Smaller calls are padded to so many tokens of prompt, of answer and of cache, so that they share their programs: a CPU
# takes half a minute to compile one of SmolLM2, and a few milliseconds to compute the padding. The rows of a batch
# share the tokens of prompt and cache.
LEAST_PROMPT, LEAST_ANSWER, LEAST_ROOM = 64, 128, 256
LEAST_WIDTH = 16

# Fixed cost of a chunk, in tokens: reading the weights, loops over heads. Measured on two CPU cores with SmolLM2 at
# 2048 tokens: chunks of 256, 512 and 1024 take 3.5, 2.7 and 2.3 s. On a GPU, computed: the weights are read in the time
# of about 150 (A100) to 300 (H100) tokens' products.
CHUNK_OVERHEAD, GPU_CHUNK_OVERHEAD = 100, 200


def most_at_a_time(rows: int = 1, *, on_gpu: bool | None = None) -> int:
    """Tokens of each row of a prompt that are computed at a time by default, at most.

    Args:
        rows: sequences of a batch, which share what a GPU computes at a time.
        on_gpu: whether for a GPU; by default, the device that programs run on.
    """
    if not (device_kind() != "cpu" if on_gpu is None else on_gpu):
        return CHUNK_SIZE
    share = max(1, GPU_CHUNK_SIZE // rows)
    return max(CHUNK_SIZE, 1 << (share.bit_length() - 1))


def bucket(count: int) -> int:
    """Round `count` up to one of eight sizes per power of two (by at most 1/8), to limit recompilation."""
    step = max(16, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def answer_capacity(count: int) -> int:
    """Columns of the arrays of an answer of up to `count` tokens."""
    return bucket(max(count, LEAST_ANSWER))


def cache_room(count: int, rows: int = 1) -> int:
    """Size of a cache for `count` tokens of each row."""
    return bucket(max(count, LEAST_ROOM // rows))


def chunk_width(length: int, chunk_size: int | None = None, *, rows: int = 1) -> int:
    """Tokens per chunk for a prompt: `chunk_size`, or by default the power of two that should take the least time.

    Only a few widths occur, so a new prompt seldom compiles. `rows` is the number of prompts in the batch.

    Raises:
        ValueError: a chunk size below 1.
    """
    if chunk_size is not None:
        return min(whole_number("chunk_size", chunk_size, 1), 1 << max(4, (length - 1).bit_length()))
    overhead = CHUNK_OVERHEAD if device_kind() == "cpu" else GPU_CHUNK_OVERHEAD
    least = min(LEAST_PROMPT, max(LEAST_WIDTH, LEAST_ROOM // rows)).bit_length() - 1
    widths = [1 << power for power in range(least, most_at_a_time(rows).bit_length())]
    return min(widths, key=lambda width: -(-length // width) * (width + overhead))


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
