"""Kernels in Triton's own language, through jax_triton: for when Pallas's Triton lowering is gone.

Prefill, decode and training, on NVIDIA GPUs from sm_80 on. Needs `duo-jax[cuda12]` or `[cuda13]`.
"""

import importlib
from dataclasses import replace
from typing import Any

from pallas_kernels.pages import refused_pages
from pallas_kernels.tiles import refused_size
from pallas_kernels.types import Backend, Partial, Request

__all__ = ["BACKEND"]

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256


def refuses(request: Request) -> str | None:
    """The reason why the kernels cannot run a request, or None."""
    # Quantized pools are unpacked before prefill, and read as they are packed in decode.
    if reason := refused_pages("jax_triton", request) or replace(request, bits=frozenset()).refused_types(DTYPES):
        return reason
    if request.operation == "decode" and (reason := request.refused_packing()):
        return reason
    if request.head_dim > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, got {request.head_dim}"
    if reason := request.refused_gpu() or refused_size(request):
        return reason
    try:
        _kernel("launch")
    except ImportError as error:
        return f"needs jax-triton and triton ({error})"
    return None


def _kernel(name: str) -> Any:
    """A module of this package; they import jax-triton and triton, which not every machine has."""
    return importlib.import_module(f"{__name__}.{name}")


def prefill(*args: Any, **rows: Any) -> Partial:
    """See `pallas_kernels.prefill_attention`."""
    return _kernel("flash_kernel").prefill(*args, **rows)


def decode(*args: Any, **rows: Any) -> Partial:
    """See `pallas_kernels.decode_attention`."""
    return _kernel("decode_kernel").decode(*args, **rows)


def training(*args: Any) -> Partial:
    """See `pallas_kernels.types.Backend`."""
    return _kernel("training_kernels").training(*args)


BACKEND = Backend("jax_triton", refuses, prefill, decode, training)
