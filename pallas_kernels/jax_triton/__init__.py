"""Decode as a kernel in Triton's own language, through jax_triton: for when Pallas's Triton lowering is gone.

Only decode from caches that are not quantized, on NVIDIA GPUs from sm_80 on. Needs `duo-jax[cuda12]` or `[cuda13]`.
"""

import importlib
from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.gpus import chip
from pallas_kernels.types import Backend, Heads, Partial, Pools, Request, TokenShards
from pallas_kernels.window import Window

__all__ = ["BACKEND"]

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256
KERNEL = "pallas_kernels.jax_triton.decode_kernel"


def refuses(request: Request) -> str | None:
    """The reason why the kernel cannot run a request, or None."""
    if reason := request.refused_layout():
        return reason
    if reason := request.refused_types(DTYPES):
        return reason
    if request.head_dim > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, got {request.head_dim}"
    if reason := request.refused_gpu():
        return reason
    try:
        importlib.import_module(KERNEL)
    except ImportError as error:
        return f"needs jax-triton and triton ({error})"
    return None


def decode(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention`."""
    del window, shards  # A ring stores nothing but visible tokens; shards are refused.
    kernel: Any = importlib.import_module(KERNEL)
    major, minor = chip().capability or (0, 0)
    return kernel.decode(q, pools, heads, lengths=lengths, capability=10 * major + minor)


BACKEND = Backend("jax_triton", refuses, decode=decode)
