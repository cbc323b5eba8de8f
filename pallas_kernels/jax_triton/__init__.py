"""Decode as a kernel in Triton's own language, through jax_triton: for when Pallas's Triton lowering is gone.

Decode alone, on NVIDIA GPUs from sm_80 on. Needs `duo-jax[cuda12]` or `[cuda13]`.
"""

import importlib
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import compute_dtype
from pallas_kernels.tiles import device_kind, tiles_for
from pallas_kernels.types import Heads, Pools

__all__ = ["decode_attention", "full_attention", "gated_attention", "prefill_attention"]

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256
# Of GPUs for which programs are compiled without one: a kind of device does not tell.
CAPABILITIES = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA H100 80GB HBM3": 90, "NVIDIA H200": 90}


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    sink_size: int,
    recent_size: int,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`."""
    types = {q.dtype.name, *(pool.dtype.name for pool in pools)}
    if len(types) > 1 or types - set(DTYPES) or q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the jax_triton backend takes {', '.join(DTYPES)}, one of them for queries and cache, and head dims up to "
            f"{MAX_HEAD_DIM}, got {', '.join(sorted(types))} with {q.shape[-1]}: use backend='triton'"
        )
    if device_kind() == "cpu":
        raise NotImplementedError("the jax_triton backend runs on NVIDIA GPUs alone: use backend='triton'")
    try:
        decode: Any = importlib.import_module("pallas_kernels.jax_triton.decode")
    except ImportError as error:
        raise NotImplementedError(f"the jax_triton backend needs jax-triton and triton: {error}") from None
    del sink_size, recent_size  # A ring of them holds what is visible.
    tiles = tiles_for("decode", q.shape[-1], compute_dtype(q, pools.retrieval_k).itemsize)
    return decode.split_attention(q, pools, heads, lengths=lengths, tiles=tiles, capability=_capability())


def prefill_attention(*args: Any, **options: Any) -> Float[Array, "B T N H"]:
    """Not made."""
    raise NotImplementedError("the jax_triton backend has decode alone: use backend='triton'")


def gated_attention(*args: Any, **options: Any) -> Float[Array, "B T N H"]:
    """Not made."""
    raise NotImplementedError("the jax_triton backend has decode alone: use backend='triton'")


def full_attention(*args: Any, **options: Any) -> Float[Array, "B T N H"]:
    """Not made."""
    raise NotImplementedError("the jax_triton backend has decode alone: use backend='triton'")


def _capability() -> int | None:
    """Compute capability of the GPU that programs are made for, as in 90; None: the one that is here."""
    return None if jax.default_backend() == "gpu" else CAPABILITIES.get(device_kind())
