"""Pallas kernels in the Mosaic flavour, for Hopper GPUs (sm_90a): TMA, wgmma, warpgroups with tasks of their own.

Prefill and decode. On a CPU the kernels are interpreted, for tests.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpus import compute_capability, device_kind, tiles_for
from pallas_kernels.mosaic.decode import split_attention
from pallas_kernels.mosaic.dialect import interpreter
from pallas_kernels.mosaic.flash import BLOCK_Q, flash_attention
from pallas_kernels.mosaic.pipeline import ROWS
from pallas_kernels.types import Heads, Pools, Unsupported
from pallas_kernels.window import Window

__all__ = ["decode_attention", "prefill_attention"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)


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
    _check(q, pools)
    length = q.shape[1]
    # Whole tiles: TMA writes no part of one. The usual chunks are whole tiles, and are not copied here.
    pad = ((0, 0), (0, -length % BLOCK_Q), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) if length % BLOCK_Q else x for x in (q, k, v))
    rows: dict[str, Any] = {"start": start, "lengths": lengths}
    tiles = _tiles("mosaic_flash", q, pools)
    return flash_attention(q, k, v, pools, heads, **rows, window=window, tiles=tiles, interpret=_interpret())[
        :, :length
    ]


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`."""
    _check(q, pools)
    group = q.shape[1] // heads.slot.shape[0]
    if group > ROWS:
        raise Unsupported(f"the mosaic backend takes up to {ROWS} query heads a KV head, got {group}")
    del window  # A ring of them holds what is visible.
    tiles = _tiles("mosaic_decode", q, pools)
    return split_attention(q, pools, heads, lengths=lengths, tiles=tiles, interpret=_interpret())


def _check(q: Array, pools: Pools) -> None:
    types = {q.dtype.name, *(pool.dtype.name for pool in pools.stored)}
    if len(types) > 1 or types - set(DTYPES) or q.shape[-1] not in HEAD_DIMS:
        raise Unsupported(
            f"the mosaic backend takes {' or '.join(DTYPES)}, one of them for queries and cache, and head dims of "
            f"{' or '.join(map(str, HEAD_DIMS))}, got {', '.join(sorted(types))} with {q.shape[-1]}: use 'triton'"
        )
    lengths = [pool.shape[2] for pool in pools.stored if pool.shape[0]]
    if any(length < 16 or length % 8 for length in lengths):
        raise Unsupported(
            "the mosaic backend needs a cache length and sink_size + recent_size that are multiples of 8, and at least "
            f"16, got {', '.join(map(str, lengths))}: use backend='triton'"
        )
    capability = compute_capability()
    if device_kind() != "cpu" and (capability is None or capability[0] != 9):
        raise Unsupported(f"the mosaic backend is for Hopper GPUs, this is {device_kind()}")


def _tiles(kernel: str, q: Array, pools: Pools) -> Any:
    """Tiles of a kernel, no larger than a slot of any pool."""
    tiles = tiles_for(kernel, q.shape[-1], q.dtype.itemsize)
    powers = [1 << (pool.shape[2].bit_length() - 1) for pool in pools.stored if pool.shape[0]]
    return replace(tiles, block_k=min([tiles.block_k, *powers]))


def _interpret() -> Any:
    # Not by `lax.platform_dependent`: the interpreter's side effects cannot stand in a branch that is not taken.
    return interpreter() if device_kind() == "cpu" else None
