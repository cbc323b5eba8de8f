"""The kernel in Triton's own language: in Triton's interpreter, and compiled for absent GPUs."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import pytest
from duo_eval.aot.compile import assemble, compile_for
from duo_eval.aot.kernels import program

from pallas_kernels import decode_attention, gated_attention, prefill_attention
from pallas_kernels.gpus import GPUS
from pallas_kernels.quantized import empty, store
from pallas_kernels.schedule import Splits
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

from pallas_kernels import decode_attention
from pallas_kernels.jax_triton import decode_kernel as implementation
from pallas_kernels.tiles import DecodeTiles, trying
from tests.test_mosaic import WINDOW, poisoned, problem

class OfInt(type):
    __instancecheck__ = lambda cls, value: isinstance(value, builtins.int)


class Int(metaclass=OfInt):
    def __new__(cls, value):
        return builtins.int(value.item() if isinstance(value, np.ndarray) else value)


interpreter.int = Int
NAMES = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


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
    out = [Buffer(np.full(shape.shape, np.nan, shape.dtype)) for shape in sizes.pop(implementation.OUT_TYPE)]
    kernel[grid](*map(Buffer, args), *out, **sizes)
    return [jnp.asarray(buffer.array) for buffer in out]


implementation.jax_triton.triton_call = triton_call
cases = (
    (64, "float32", (True, False)),
    (40, "float16", (False,)),
    (16, "float32", (True,)),
)
for head_dim, dtype, is_retrieval in cases:
    q, _, _, pools, heads = problem(
        tokens=1, starts=(0, 0), capacity=600, head_dim=head_dim, is_retrieval=is_retrieval, dtype=jnp.dtype(dtype)
    )
    lengths = jnp.asarray([597, 33], jnp.int32)
    pools = poisoned(pools, lengths)
    with trying("decode", DecodeTiles(block_k=32, min_split=64, max_programs=24, num_warps=4, num_stages=2)):
        found = implementation.decode(q[:, 0], pools, heads, lengths=lengths, capability=90).out
    wanted = decode_attention(q[:, 0], pools, heads, lengths=lengths, window=WINDOW, backend="reference")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 if dtype == "float32" else 3e-3)
"""


@pytest.mark.process
@needs_triton
def test_decode_equals_the_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", INTERPRET], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize(("gpu", "capability"), [("a100-80g", 80), ("h200", 90)])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 64), ("bf16", 128), ("fp16", 256), ("fp32", 128)])
def test_the_kernel_compiles_without_spills(dtype, head_dim, gpu, capability, tmp_path, monkeypatch):
    """Llama-3-8B's heads, and pools of more than 2 ** 31 elements."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pallas_kernels.jax_triton.decode_kernel import decode_kernel, sizes, tiles_here

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # jax_triton unsets it.
    tiles = tiles_here(head_dim, 4 if dtype == "fp32" else 2)
    splits = Splits(128, 128, (1 << 22, 320), tiles.block_k, tiles.min_split)
    settings = sizes(4, head_dim, 1, 8, splits)
    types = [f"*{dtype}"] * 5 + ["*i32"] * 4 + ["*fp32"] * 2
    signature = dict(zip(decode_kernel.arg_names, types, strict=False)) | dict.fromkeys(settings, "constexpr")
    # jax_triton guarantees this alignment for every array.
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(len(types))}
    source = triton.compiler.ASTSource(decode_kernel, signature, constexprs=settings, attrs=attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert re.search(r"tt\.addptr[^\n]*xi64", compiled.asm["ttir"])
    assert 0 < compiled.metadata.shared <= GPUS[gpu].shared_memory_per_core - 1024
    (tmp_path / "decode.ptx").write_text(compiled.asm["ptx"])
    (kernel,) = assemble(gpu, tmp_path / "decode.ptx")
    assert 0 < kernel.registers <= 255 and kernel.spill_bytes == 0


@needs_triton
@pytest.mark.parametrize("gpu", ["a100-80g", "h200"])
def test_a_layer_compiles_for_an_absent_gpu(gpu):
    function, shapes = program("decode", "jax_triton")
    assert "triton_kernel_call" in compile_for(gpu, function, *shapes).as_text()


def test_refusals_name_the_reason():
    count = jnp.ones(1, jnp.int32)
    rows = {"start": count, "lengths": count, "window": WINDOW, "backend": "jax_triton"}
    q, k, v, pools, heads = problem(tokens=4, starts=(0,))
    with pytest.raises(NotImplementedError, match="has no prefill attention: use backend='xla'"):
        prefill_attention(q, k, v, pools, heads, **rows)
    with pytest.raises(NotImplementedError, match="has no training attention: use backend='xla'"):
        gated_attention(q, k, v, jnp.ones(2), window=WINDOW, backend="jax_triton")
    with pytest.raises(NotImplementedError, match=r"of compute capability 8\.0 or higher, this is cpu"):
        decode_attention(q[:, 0], pools, heads, lengths=count, window=WINDOW, backend="jax_triton")
    with pytest.raises(NotImplementedError, match=r"one of them for queries and cache, got bfloat16, float32: use"):
        decode_attention(q[:, 0].astype(jnp.float32), pools, heads, lengths=count, window=WINDOW, backend="jax_triton")
    like = [empty((1, 64), "int4", values=values) for values in (False, True)]
    packed = pools._replace(full_k=store(pools.full_k, like[0]), full_v=store(pools.full_v, like[1]))
    with pytest.raises(NotImplementedError, match="one of them for queries and cache, got bfloat16, int4: use"):
        decode_attention(q[:, 0], packed, heads, lengths=count, window=WINDOW, backend="jax_triton")
