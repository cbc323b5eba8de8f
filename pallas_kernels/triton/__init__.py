"""Pallas kernels in the Triton flavour: NVIDIA GPUs from sm_80 on; interpreted on a CPU, for tests."""

from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import LOG2_E, compute_dtype
from pallas_kernels.gpus import tiles_for
from pallas_kernels.quantized import any_quantized
from pallas_kernels.triton.decode import split_attention
from pallas_kernels.triton.flash import flash_attention
from pallas_kernels.triton.gated import full_attention, gated_attention
from pallas_kernels.triton.tile import check
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window

__all__ = [
    "decode_attention",
    "decode_partial",
    "full_attention",
    "gated_attention",
    "prefill_attention",
    "prefill_partial",
]


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.prefill_attention`."""
    return _prefill(q, k, v, pools, heads, None, start, lengths, window)[0]


def prefill_partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `prefill_attention`: the tokens of its pools, and on the first of them the chunk."""
    out, log_total = _prefill(q, k, v, pools, heads, shards, start, lengths, window)
    return Partial(out, log_total.swapaxes(1, 2) / LOG2_E)


def _prefill(q, k, v, pools, heads, shards, start, lengths, window):
    """Attention of a chunk and its log-sum-exp, to the base of two."""
    check(q, k, *pools.stored)
    tiles = tiles_for("flash", q.shape[-1], compute_dtype(q, k).itemsize, quantized=any_quantized(pools.stored))
    rows: dict[str, Any] = {"start": start, "lengths": lengths}
    return flash_attention(q, k, v, pools, heads, **rows, window=window, tiles=tiles, shards=shards)


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`."""
    del window  # A ring of them holds what is visible.
    return _decode(q, pools, heads, None, lengths).out.astype(q.dtype)


def decode_partial(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `decode_attention`: the tokens of its pools."""
    del window  # A ring of them holds what is visible.
    return _decode(q, pools, heads, shards, lengths)


def _decode(q, pools, heads, shards, lengths):
    """Attention of one token a row and its log-sum-exp."""
    check(q, *pools.stored)
    itemsize = compute_dtype(q, pools.full_k).itemsize
    tiles = tiles_for("decode", q.shape[-1], itemsize, quantized=any_quantized(pools.stored))
    return split_attention(q, pools, heads, lengths=lengths, tiles=tiles, shards=shards)
