"""Lower every GPU kernel for CUDA on a machine without a GPU: Pallas refuses the same programs here as there."""

import re

import jax.numpy as jnp
import pytest
from duo_eval.aot.kernels import program
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import Heads, Pools, Window, decode_attention, gated_attention, prefill_attention

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
H200 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
KERNELS = {
    "prefill": ["flash_kernel"],
    "decode": ["combine_kernel", "decode_kernel"],
    # Full and streaming attention, forward; then the gradients of both.
    "training": ["flash_kernel"] * 2 + ["query_gradient_kernel", "key_gradient_kernel"] * 2,
}


def launches(function, shapes):
    """Sorted names of the kernels that a program for CUDA launches."""
    with use_abstract_mesh(H200):
        text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return sorted(re.findall(r'name = "(\w+?_kernel)"', text))


@pytest.mark.parametrize("operation", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", 128), ("float16", 64), ("float32", 256), ("bfloat16", 80), ("float32", 96)],
)
def test_triton_kernels_lower_for_cuda_one_launch_for_both_head_types(operation, dtype, head_dim):
    found = launches(*program(operation, "triton", dtype=dtype, head_dim=head_dim, tokens=500, capacity=1000))
    assert found == sorted(KERNELS[operation])


@pytest.mark.parametrize(
    ("operation", "dtype", "head_dim", "cache"),
    [("prefill", "bfloat16", 128, "int4"), ("decode", "float16", 64, "int8")],
)
def test_quantized_caches_lower_for_cuda(operation, dtype, head_dim, cache):
    shapes = {"dtype": dtype, "head_dim": head_dim, "cache": cache, "tokens": 500, "capacity": 1000}
    # Prefill: over the chunk and the rings, and in a loop over the segments of slots.
    expected = sorted(KERNELS[operation]) * (2 if operation == "prefill" else 1)
    assert launches(*program(operation, "triton", **shapes)) == expected


def test_a_short_chunk_reads_packed_keys():
    """As in decode; another kernel attends to the chunk and the rings. Of other types, slots are unpacked."""
    for backend, other in (("triton", ["flash_kernel"]), ("mosaic", [])):
        found = launches(*program("prefill", backend, cache="int4", tokens=32, capacity=1000))
        assert found == ["combine_kernel", "decode_kernel", *other]
    unpacked = {"tokens": 32, "capacity": 1000, "cache": "int4"}
    for each in ({"dtype": "float32"}, {"head_dim": 96}, {"tokens": 129}):
        assert launches(*program("prefill", "triton", **unpacked | each)) == ["flash_kernel"] * 2


@pytest.mark.parametrize(
    ("operation", "head_dim", "cache"),
    [("prefill", 64, "same"), ("prefill", 128, "int4"), ("decode", 64, "same"), ("decode", 128, "same")],
)
def test_the_mosaic_kernels_lower_for_cuda(operation, head_dim, cache):
    function, shapes = program(operation, "mosaic", head_dim=head_dim, cache=cache, tokens=500, capacity=1000)
    with use_abstract_mesh(H200):
        text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == (1 if cache == "same" else 2)


@pytest.mark.parametrize(("dtype", "head_dim"), [("float8_e4m3fn", 64), ("float32", 320)])
def test_triton_names_the_reason_of_a_refusal(dtype, head_dim):
    def zeros(*shape):
        return jnp.zeros(shape, jnp.dtype(dtype))

    q, kv, pool, ring = (
        zeros(1, 4, 2, head_dim),
        zeros(1, 4, 1, head_dim),
        zeros(1, 1, 8, head_dim),
        zeros(1, 1, 3, head_dim),
    )
    pools, table = Pools(pool, pool, ring, ring), Heads(jnp.ones(1, bool), jnp.zeros(1, jnp.int32))
    count, sizes = jnp.ones(1, jnp.int32), {"window": Window(1, 2), "backend": "triton"}
    calls = (
        lambda: prefill_attention(q, kv, kv, pools, table, start=count, lengths=count, **sizes),
        lambda: decode_attention(q[:, 0], pools, table, lengths=count, **sizes),
        lambda: gated_attention(q, kv, kv, jnp.ones(1), **sizes),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=rf"triton backend takes .*got {dtype} with {head_dim}: use"):
            call()
