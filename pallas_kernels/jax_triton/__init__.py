"""Decode as a kernel in Triton's own language, through jax_triton: for when Pallas's Triton lowering is gone.

Decode alone, on NVIDIA GPUs from sm_80 on. Needs `duo-jax[cuda12]` or `[cuda13]`.
"""

import importlib
from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.gpus import compute_capability, tiles_for
from pallas_kernels.quantized import any_quantized, read_dtype
from pallas_kernels.types import Heads, Pools, Unsupported
from pallas_kernels.window import Window

__all__ = ["decode_attention"]

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`."""
    types = {q.dtype.name, *(read_dtype(pool, q.dtype).name for pool in pools.stored)}
    head_dim, quantized = q.shape[-1], any_quantized(pools.stored)
    if len(types) > 1 or types - set(DTYPES) or head_dim > MAX_HEAD_DIM:
        raise Unsupported(
            f"the jax_triton backend takes {', '.join(DTYPES)}, one of them for queries and cache, and head dims up to "
            f"{MAX_HEAD_DIM}, got {', '.join(sorted(types))} with {head_dim}: use backend='triton'"
        )
    if quantized and (head_dim < 16 or head_dim.bit_count() > 1):
        raise Unsupported(
            "the jax_triton backend takes quantized caches of head dims that are powers of two, at least 16, got "
            f"{head_dim}: use backend='xla'"
        )
    capability = compute_capability()
    if capability is None:
        raise Unsupported("the jax_triton backend runs on NVIDIA GPUs alone: use backend='triton'")
    try:
        decode: Any = importlib.import_module("pallas_kernels.jax_triton.decode")
    except ImportError as error:
        raise Unsupported(f"the jax_triton backend needs jax-triton and triton: {error}") from None
    del window  # A ring of them holds what is visible.
    settings: dict[str, Any] = {
        "tiles": tiles_for("decode", head_dim, q.dtype.itemsize, quantized=quantized),
        "capability": 10 * capability[0] + capability[1],
    }
    return decode.split_attention(q, pools, heads, lengths=lengths, **settings)
