"""The kernels in Triton's own language: in Triton's interpreter, and compiled for absent GPUs."""

import os
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import pytest
from duo_eval.aot.compile import kernels_on
from duo_eval.aot.kernels import program

from pallas_kernels import decode_attention, gated_attention, prefill_attention
from pallas_kernels.gpus import GPUS
from tests.test_mosaic import WINDOW, problem

MISSING = [name for name in ("triton", "jax_triton") if find_spec(name) is None]
if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    MISSING.append("jax's CUDA plugin")


def needs_triton(test):
    skip = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make test-aot")
    return pytest.mark.aot(skip(test))


# Triton decides on import whether it interprets. Its arrays must have PyTorch's methods, and it converts arrays to
# numbers in a way that NumPy no longer allows.
INTERPRET = """
import builtins

import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from pallas_kernels import works
from pallas_kernels.jax_triton import decode_kernel, flash_kernel, launch
from pallas_kernels.ops import find_backend
from pallas_kernels.quantized import empty, store
from pallas_kernels.tiles import DecodeTiles, FlashTiles, trying
from tests.test_mosaic import WINDOW, in_pages, poisoned, problem


class OfInt(type):
    __instancecheck__ = lambda cls, value: isinstance(value, builtins.int)


class Int(metaclass=OfInt):
    def __new__(cls, value):
        return builtins.int(value.item() if isinstance(value, np.ndarray) else value)


interpreter.int = Int
NAMES = {"float32": "fp32", "float16": "fp16", "int32": "i32", "uint16": "u16", "uint32": "u32"}


class Buffer:
    def __init__(self, array):
        self.array = np.array(array)
        self.dtype = NAMES[self.array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def new_empty(self, *size, **options):
        return self

    untyped_storage = cpu = lambda self: self
    storage_offset = size = stride = lambda self: 0
    set_ = copy_ = lambda self, *other: None


def triton_call(*args, kernel, grid, name, num_warps, num_stages, compute_capability, **sizes):
    out = [Buffer(np.full(shape.shape, np.nan, shape.dtype)) for shape in sizes.pop(launch.OUT_TYPE)]
    kernel[grid](*map(Buffer, args), *out, **sizes)
    return [jnp.asarray(buffer.array) for buffer in out]


launch.jax_triton.triton_call = triton_call


def compare(found, expected, dtype, tokens=None):
    # Outputs and log-sums; those of padding are any numbers.
    for x, y in zip(found, expected, strict=True):
        assert np.isfinite(x).all()
        for row in range(len(x)):
            at = slice(None) if tokens is None else slice(tokens[row])
            np.testing.assert_allclose(x[row, at], y[row, at], rtol=0, atol=2e-5 if dtype == "float32" else 3e-3)
"""
DECODE = """
cases = (
    (64, "float32", (True, False), None, None),
    (40, "float16", (False,), None, None),
    (16, "float32", (True,), None, None),
    (32, "float32", (True, False), 128, None),  # In pages.
    (16, "float32", (True,), None, "int4"),
    (64, "float16", (True, False), None, "int4"),
    (64, "float16", (True,), None, "int8"),
    (32, "float32", (True, False), None, "int8"),
)
for head_dim, dtype, is_retrieval, page, cache in cases:
    q, _, _, pools, heads = problem(
        tokens=1, starts=(0, 0), capacity=600 if page is None else 640, head_dim=head_dim, is_retrieval=is_retrieval,
        dtype=jnp.dtype(dtype)
    )
    lengths = jnp.asarray([597, 33], jnp.int32)
    pools = poisoned(pools, lengths)
    if cache is not None:
        # The ring stays as it is.
        like = [empty((1, head_dim), cache, values=values) for values in (False, True)]
        full_k, full_v = (store(jnp.nan_to_num(pool), one) for pool, one in zip(pools.full, like, strict=True))
        pools = pools._replace(full_k=full_k, full_v=full_v)
    pools = pools if page is None else in_pages(pools, page)
    arrays, rows = (q[:, 0], pools, heads), {"lengths": lengths, "window": WINDOW}
    with trying("decode", DecodeTiles(block_k=32, min_split=64, max_programs=24, num_warps=4, num_stages=2)):
        compare(decode_kernel.decode(*arrays, **rows), find_backend("triton").decode(*arrays, **rows), dtype)
"""
PREFILL = """
works.LEAST_KEYS = 64
cases = (
    # Rows that are ragged, one of them empty; a pool's last tile partly filled; a ring that wrapped; unaligned starts.
    ({"tokens": 50, "starts": (101, 0, 37), "lengths": (50, 0, 21), "cores": 1}, {}),
    # The group of a KV head in one tile, keys in several parts; a row with fewer parts.
    ({"tokens": 9, "starts": (248, 70), "cores": 16}, {}),
    # Windows with more sinks than a tile of keys has, and with none.
    ({"tokens": 40, "starts": (3,), "is_retrieval": (False,), "head_dim": 40}, {"dtype": "float16"}),
    ({"tokens": 40, "starts": (70,), "is_retrieval": (False,)}, {"window": (0, 80)}),
    ({"tokens": 33, "starts": (0, 9), "is_retrieval": (True,)}, {}),
    ({"tokens": 20, "starts": (250, 130), "capacity": 256, "cores": 4}, {"page": 128}),
)
for case, options in cases:
    works.multiprocessors = lambda cores=case.pop("cores", 2): cores
    lengths, dtype = case.pop("lengths", (case["tokens"],) * len(case["starts"])), options.get("dtype", "float32")
    q, k, v, pools, heads = problem(**{"head_dim": 32} | case, dtype=jnp.dtype(dtype))
    pools = poisoned(pools, case["starts"])
    pools = in_pages(pools, options["page"]) if "page" in options else pools
    window = type(WINDOW)(*options["window"]) if "window" in options else WINDOW
    rows = {"start": jnp.asarray(case["starts"], jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32)}
    rows |= {"window": window}
    with trying("flash", FlashTiles(32, 16, 4, 1)):
        found, expected = (
            backend.prefill(q, k, v, pools, heads, **rows) for backend in (flash_kernel, find_backend("triton"))
        )
    compare(found, expected, dtype, lengths)
"""


@pytest.mark.process
@needs_triton
@pytest.mark.parametrize("cases", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_partial_results_equal_those_of_triton(cases):
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", INTERPRET + cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("gpu", ["a100-80g", "h200"])
@pytest.mark.parametrize(
    ("operation", "dtype", "head_dim", "cache"),
    [
        *(
            ("prefill", *case, "same")
            for case in (("bfloat16", 64), ("bfloat16", 128), ("float16", 256), ("float32", 64))
        ),
        *(
            ("decode", *case, "same")
            for case in (("bfloat16", 64), ("bfloat16", 128), ("float16", 256), ("float32", 128))
        ),
        *(("decode", "bfloat16", *case) for case in ((64, "int8"), (128, "int8"), (128, "int4"), (256, "int4"))),
        *(("training", *case, "same") for case in (("bfloat16", 64), ("bfloat16", 128))),
    ],
)
def test_no_kernel_spills(operation, dtype, head_dim, cache, gpu):
    """Llama-3-8B's heads, a chunk of 2,048 tokens, and pools of more than 2 ** 31 elements."""
    function, shapes = program(operation, "jax_triton", dtype=dtype, head_dim=head_dim, cache=cache, capacity=1 << 22)
    kernels = kernels_on(gpu, function, *shapes)
    assert len(kernels) == {"prefill": 1, "decode": 1, "training": 6}[operation]
    for kernel in kernels:
        assert 0 < kernel.registers <= 255 and kernel.spill_bytes == 0 and kernel.address_bits == 64, kernel
        assert 0 < kernel.shared_memory <= GPUS[gpu].shared_memory_per_core - 1024, kernel


def test_refusals_name_the_reason():
    count = jnp.ones(1, jnp.int32)
    rows = {"start": count, "lengths": count, "window": WINDOW, "backend": "jax_triton"}
    q, k, v, pools, heads = problem(tokens=4, starts=(0,))
    with pytest.raises(NotImplementedError, match=r"of compute capability 8\.0 or higher, this is cpu"):
        prefill_attention(q, k, v, pools, heads, **rows)
    with pytest.raises(NotImplementedError, match=r"of compute capability 8\.0 or higher, this is cpu"):
        gated_attention(q, k, v, jnp.ones(2), window=WINDOW, backend="jax_triton")
    with pytest.raises(NotImplementedError, match=r"of compute capability 8\.0 or higher, this is cpu"):
        decode_attention(q[:, 0], pools, heads, lengths=count, window=WINDOW, backend="jax_triton")
    with pytest.raises(NotImplementedError, match=r"one of them for queries and cache, got bfloat16, float32: use"):
        decode_attention(q[:, 0].astype(jnp.float32), pools, heads, lengths=count, window=WINDOW, backend="jax_triton")
