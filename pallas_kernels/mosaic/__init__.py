"""Pallas kernels in the Mosaic flavour: for Hopper GPUs (sm_90a) TMA, wgmma, warpgroups with tasks of their own.

Prefill and decode; on Ampere and Ada (sm_80 to sm_89) prefill, from jax 0.11.2 on. On a CPU the kernels for Hopper are
interpreted, for tests.
"""

from dataclasses import replace
from typing import Any

from pallas_kernels.gpus import chip
from pallas_kernels.mosaic import ampere, flash
from pallas_kernels.mosaic.compat import CLEARED
from pallas_kernels.mosaic.decode import decode
from pallas_kernels.mosaic.pipeline import ROWS
from pallas_kernels.pages import refused_pages
from pallas_kernels.ptxas import miscompiles, ptxas_version, version_text
from pallas_kernels.types import Backend, Partial, Request

__all__ = ["BACKEND"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)


def refuses(request: Request) -> str | None:
    """The reason why the kernels cannot run a request, or None."""
    if request.capability is not None and request.capability[0] == 8:
        return ampere.BACKEND.supports(request)
    # Quantized pools are unpacked before prefill, not before decode.
    unpacked = replace(request, bits=frozenset()) if request.operation == "prefill" else request
    if reason := request.refused_shards() or unpacked.refused_types(DTYPES):
        return reason
    if request.head_dim not in HEAD_DIMS:
        return f"takes head dims of {' or '.join(map(str, HEAD_DIMS))}, got {request.head_dim}"
    if request.operation == "decode" and request.group > ROWS:
        return f"takes up to {ROWS} query heads a KV head, got {request.group}"
    if reason := refused_pages("mosaic", request):
        return reason
    if any(length < CLEARED or length % 8 for length in request.capacities):
        return (
            "needs a cache length and a window size (sinks and recent tokens) that are multiples of 8, and at least "
            f"{CLEARED}, got {', '.join(map(str, request.capacities))}"
        )
    if request.device != "cpu" and request.capability != (9, 0):
        return f"is for GPUs from Ampere to Hopper, this is {request.device}"
    if request.device != "cpu" and miscompiles(version := ptxas_version("mosaic")):
        return (
            f"needs another ptxas than {version_text(version)}, which compiles masks wrongly: put 12.9.86 or newer "
            "first on the PATH"
        )
    return None


def prefill(*args: Any, **rows: Any) -> Partial:
    """See `pallas_kernels.prefill_attention`."""
    capability = chip().capability
    kernel = ampere if capability is not None and capability[0] == 8 else flash
    return kernel.prefill(*args, **rows)


BACKEND = Backend("mosaic", refuses, prefill, decode)
