"""Pallas kernels in the Triton flavour: NVIDIA GPUs from sm_80 on; interpreted on a CPU, for tests."""

import os

from pallas_kernels.pages import refused_pages
from pallas_kernels.tiles import refused_size
from pallas_kernels.triton.append import append
from pallas_kernels.triton.decode import decode
from pallas_kernels.triton.flash import prefill
from pallas_kernels.triton.training import training
from pallas_kernels.types import Backend, Request

__all__ = ["BACKEND"]

DTYPES = ("float32", "bfloat16", "float16")
# Two tiles with that many columns still fit into shared memory.
MAX_HEAD_DIM = 256

# XLA warns about each parameter of a kernel. Where llvm-symbolizer is installed, it names the functions of every
# warning's stack trace, which nobody sees: 12 of the 16 CPU seconds that the compilation of a decode kernel took.
os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")


def refuses(request: Request) -> str | None:
    """The reason why the kernels cannot run a request, or None."""
    head_dim = request.head_dim
    if reason := refused_pages("triton", request):
        return reason
    if request.operation in ("decode", "append") and (reason := request.refused_packing()):
        return reason
    if request.dtypes - set(DTYPES) or head_dim > MAX_HEAD_DIM:
        types = ", ".join(sorted(request.dtypes))
        return f"takes {', '.join(DTYPES)} and head dims up to {MAX_HEAD_DIM}, got {types} with {head_dim}"
    if request.capability is not None and (reason := request.refused_gpu()):  # On a CPU, it is interpreted.
        return reason
    return refused_size(request)


BACKEND = Backend("triton", refuses, prefill, decode, training, append)
