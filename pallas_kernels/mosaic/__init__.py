"""Pallas kernels in the Mosaic flavour, for Hopper GPUs (sm_90a): TMA, wgmma, warpgroups with tasks of their own.

Prefill so far. On a CPU the kernel is interpreted, for tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic.dialect import interpreter
from pallas_kernels.mosaic.flash import BLOCK_Q, flash_attention
from pallas_kernels.tiles import device_kind
from pallas_kernels.types import Heads, Pools

__all__ = ["decode_attention", "full_attention", "gated_attention", "prefill_attention"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
BLOCK_K = {64: 128, 128: 128}
STAGES = 2


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    sink_size: int,
    recent_size: int,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.prefill_attention`."""
    _check(q, k, pools)
    length = q.shape[1]
    # Whole tiles: TMA writes no part of one. The usual chunks are whole tiles, and are not copied here.
    pad = ((0, 0), (0, -length % BLOCK_Q), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) if length % BLOCK_Q else x for x in (q, k, v))
    block_k = min([BLOCK_K[q.shape[3]], *(_power_below(pool.shape[2]) for pool in pools if pool.shape[0])])
    sizes: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size}
    tiles: dict[str, Any] = {"block_k": block_k, "stages": STAGES}
    # Not by `lax.platform_dependent`: the interpreter's side effects cannot stand in a branch that is not taken.
    interpret = interpreter() if device_kind() == "cpu" else None
    rows: dict[str, Any] = {"start": start, "lengths": lengths}
    out = flash_attention(q, k, v, pools, heads, **rows, **sizes, **tiles, interpret=interpret)
    return out[:, :length]


def decode_attention(*args: Any, **options: Any) -> Float[Array, "B N H"]:
    """Not there yet."""
    raise NotImplementedError("the mosaic backend has no decode kernel yet: use backend='triton'")


def gated_attention(*args: Any, **options: Any) -> Float[Array, "B T N H"]:
    """Not there yet."""
    raise NotImplementedError("the mosaic backend has no kernel for training: use backend='triton'")


def full_attention(*args: Any, **options: Any) -> Float[Array, "B T N H"]:
    """Not there yet."""
    raise NotImplementedError("the mosaic backend has no kernel for training: use backend='triton'")


def _check(q: Array, k: Array, pools: Pools) -> None:
    types = {q.dtype.name, k.dtype.name, *(pool.dtype.name for pool in pools)}
    if len(types) > 1 or types - set(DTYPES) or q.shape[3] not in HEAD_DIMS:
        raise NotImplementedError(
            f"the mosaic backend takes {' or '.join(DTYPES)}, one of them for queries and cache, and head dims of "
            f"{' or '.join(map(str, HEAD_DIMS))}, got {', '.join(sorted(types))} with {q.shape[3]}: use 'triton'"
        )
    smallest = min((pool.shape[2] for pool in pools if pool.shape[0]), default=BLOCK_Q)
    if smallest < 16:
        raise NotImplementedError(
            f"the mosaic backend needs pools and rings of at least 16 tokens, got {smallest}: use backend='triton'"
        )
    device = jax.devices()[0]
    if device.platform == "gpu" and not str(getattr(device, "compute_capability", "")).startswith("9."):
        raise NotImplementedError(f"the mosaic backend is for Hopper GPUs, this is {device.device_kind}")


def _power_below(size: int) -> int:
    return 1 << (size.bit_length() - 1)
