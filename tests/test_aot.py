"""Programs compiled for absent GPUs; needs jax's CUDA plugin: `make test-aot`."""

import re
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product

# Before jax loads the CUDA plugin, which reads only then where Mosaic's runtime is.
import jax
import jax.experimental.mosaic.gpu
import jax.numpy as jnp
import jaxtyping
import pytest
from duo_eval.aot.compile import compile_for, gpus_like, kernels_on, memory_of
from duo_eval.aot.kernels import program
from duo_eval.aot.programs import decode, is_close, prefill_chunk, training_step, verify
from duo_train.gated import GatedModel
from flax import nnx

from duo_jax import PRESETS
from duo_jax.mesh.mesh import MeshSize, mesh_of
from duo_jax.model.mixture import Experts
from duo_jax.plan import Plan, any_pattern
from pallas_kernels.gpus import GPUS
from pallas_kernels.mosaic.warps import is_available
from pallas_kernels.tiles import tiles_for

try:
    PLUGIN = version("jax-cuda12-plugin")
except PackageNotFoundError:
    PLUGIN = ""
pytestmark = [pytest.mark.aot, pytest.mark.skipif(not PLUGIN, reason="needs jax's CUDA plugin: make test-aot")]


@pytest.fixture(autouse=True)
def shapes_for_arrays(monkeypatch):
    """Arguments are shapes instead of arrays, which the check of annotations would refuse."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def is_merge(kernel):
    """Whether a kernel is the one that merges the parts of decode: it has no pools, and no loop."""
    return kernel.name.startswith("combine_kernel")


def test_a_training_step_s_memory_is_linear_in_the_tokens():
    """Two layers of Llama-3-8B; all 32 at 32k tokens were compiled once, see eval/results/aot."""
    config = replace(PRESETS["llama-3-8b"], num_layers=2, dtype="bfloat16")
    gated = GatedModel(backend="triton")
    small, large = (
        memory_of(compile_for("a100-80g", *training_step(config, length, gated))) for length in (4096, 8192)
    )
    assert large.temporaries < 2.1 * small.temporaries
    # All weights but the head are used.
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert small.arguments == pytest.approx(2 * (2 * layer + 128256 * 4096), rel=0.01)
    assert large.total < GPUS["a100-80g"].memory_bytes


def test_eight_gpus_share_the_weights_in_training():
    """Each has an eighth and, whatever the number of layers, gathers one or two; all 80 were compiled once."""
    mesh, sizes = mesh_of(MeshSize(sequence=8), gpus_like("h100-80g", 8)), []
    for layers in (2, 4):
        config = replace(PRESETS["llama-3-70b"], num_layers=layers, dtype="bfloat16")
        program = training_step(config, 8192, GatedModel(backend="triton"), mesh)
        sizes.append(memory_of(compile_for("h100-80g", *program, mesh=mesh)))
    small, large = sizes
    layer = (large.arguments - small.arguments) / 2 * 8
    assert layer == pytest.approx(2 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672), rel=0.01)
    hidden = 8192 // 8 * 8192 * 2  # What a layer keeps for its gradient.
    assert large.temporaries - small.temporaries < 2 * hidden + 0.05 * layer
    assert large.temporaries < 2.5 * layer


@pytest.mark.parametrize(("gpu", "backend"), [("a100-80g", "triton"), ("h200", "triton"), ("h200", "mosaic")])
def test_llama_3_8b_prefills_and_decodes_within_one_gpu_and_in_place(gpu, backend):
    """All 32 layers, half of the heads streaming, 256k tokens."""
    config, length = replace(PRESETS["llama-3-8b"], dtype="bfloat16"), 1 << 18
    heads = config.num_layers * config.num_kv_heads // 2
    pools = 2 * 2 * config.head_dim * heads * (length + 64 + 256)
    weights = 2 * config.num_parameters
    plan = Plan(config, any_pattern(config, 0.5), chunk_size=8192)
    found = memory_of(compile_for(gpu, *decode(plan, length, backend)))
    assert found.arguments == pytest.approx(weights + pools, rel=1e-3)
    # Pools are written in place: nothing of their size is allocated, and the temporaries are small.
    assert found.aliased >= pools and found.temporaries < 0.01 * pools
    chunk = memory_of(compile_for(gpu, *prefill_chunk(plan, length, backend)))
    assert chunk.aliased >= pools and chunk.temporaries < 2e9
    assert max(found.total, chunk.total) < GPUS[gpu].memory_bytes


@pytest.mark.parametrize("weight_dtype", [None, "int8", "w8a8", "int4"])
def test_a_plan_is_within_its_tolerance_and_quantized_pools_are_written_in_place(weight_dtype):
    """Two layers of Llama-3-8B, 8M tokens in 4 bits; whole models were compiled once, see eval/results/aot."""
    config = replace(PRESETS["llama-3-8b"], num_layers=2, dtype="bfloat16", weight_dtype=weight_dtype)
    plan = Plan(config, any_pattern(config, 0.5), chunk_size=4096, kv_dtype="int4")
    found = verify(plan, 1 << 23, "a100-80g")
    assert is_close(found), found
    for sizes in found["programs"].values():
        assert sizes["aliased"] >= plan.kv(1 << 23) and sizes["temporaries"] < 0.15 * plan.kv(1 << 23)


@pytest.mark.parametrize(("model", "weight_dtype"), [("qwen3-30b-a3b", None), ("gpt-oss-120b", "mxfp4")])
def test_a_decode_step_copies_no_expert(model, weight_dtype):
    """The kernels that multiply read the weights, dequantized, from where they are; and there is no loop."""
    config = replace(PRESETS[model], dtype="bfloat16", weight_dtype=weight_dtype)
    build = partial(Experts, config, dtype=jnp.dtype("bfloat16"))
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    token = jax.ShapeDtypeStruct((1, 1, config.embed_dim), jnp.bfloat16)
    compiled = compile_for("h200", jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x)), shapes, token)
    assert memory_of(compiled).temporaries < config.embed_dim * config.expert_dim  # Half of a matrix in bfloat16.
    assert " while(" not in compiled.as_text()


@pytest.mark.parametrize("mesh", [MeshSize(tensor=8), MeshSize(tensor=4, sequence=2)], ids=str)
def test_eight_gpus_take_what_is_planned_and_send_nothing_of_the_cache(mesh):
    """Two layers of Llama-3-70B; all 80 were compiled once, see eval/results/aot."""
    config = replace(PRESETS["llama-3-70b"], num_layers=2, dtype="bfloat16")
    plan = Plan(config, any_pattern(config, 0.5), chunk_size=2048, mesh=mesh)
    found = verify(plan, 1 << 22, "h100-80g")
    assert is_close(found), found
    for sizes in found["programs"].values():
        assert sizes["aliased"] >= plan.kv(1 << 22) and sizes["temporaries"] < 0.1 * plan.kv(1 << 22)
        assert sizes["collectives"]["largest"]["nbytes"] < 0.02 * plan.kv(1 << 22)
    # An embedding that is looked up is not gathered: a step sends a token's numbers, and its logits.
    assert found["programs"]["decode"]["collectives"]["bytes_elsewhere"] < 6 * config.vocab_size


@pytest.mark.parametrize("gpu", ["a100-80g", "h200"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("operation", "cache"),
    [
        *((operation, "same") for operation in ("prefill", "decode", "training")),
        *product(("prefill", "short-chunk", "decode"), ("int8", "int4")),
    ],
)
def test_no_kernel_spills_in_bfloat16(operation, cache, head_dim, gpu):
    function, shapes = program(operation, "triton", head_dim=head_dim, cache=cache)
    kernels = kernels_on(gpu, function, *shapes)
    # Prefill of quantized slots: one over the chunk, one over a segment, or as decode if it is short.
    count = {"prefill": 1 if cache == "same" else 2, "short-chunk": 3, "decode": 2, "training": 6}
    assert len(kernels) == count[operation]
    # Without these 4 bytes, it would have one load in flight instead of two.
    most = 4 if (operation, cache, head_dim, gpu) == ("short-chunk", "int4", 256, "a100-80g") else 0
    assert all(kernel.spill_bytes <= most for kernel in kernels), kernels
    assert all(0 < kernel.shared_memory <= GPUS[gpu].shared_memory_per_core - 1024 for kernel in kernels), kernels
    assert all(kernel.warnings == () for kernel in kernels), kernels
    assert all(kernel.loops is None or kernel.loops or is_merge(kernel) for kernel in kernels), kernels


@pytest.mark.parametrize("cache", ["same", "int4"])
@pytest.mark.parametrize("operation", ["prefill", "decode"])
def test_no_kernel_spills_that_reads_pages(operation, cache):
    function, shapes = program(operation, "triton", cache=cache, page_size=128)
    kernels = kernels_on("h200", function, *shapes)
    assert all(kernel.spill_bytes == 0 and kernel.warnings == () for kernel in kernels), kernels


@pytest.mark.parametrize("gpu", ["a100-80g", "h200"])
@pytest.mark.parametrize("page_size", [None, 128])
@pytest.mark.parametrize("cache", ["same", "int8", "int4"])
def test_one_launch_writes_a_token_to_all_pools_in_place(cache, page_size, gpu):
    function, shapes = program("append", "triton", cache=cache, page_size=page_size)
    (kernel,) = kernels_on(gpu, function, *shapes)
    assert kernel.name == "append_kernel" and kernel.spill_bytes == 0 and kernel.warnings == ()
    pools = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[0]))
    found = memory_of(compile_for(gpu, function, *shapes))
    assert found.aliased == pools and found.temporaries < 1 << 16


@pytest.mark.parametrize(("cache", "whole", "layer"), [(None, 43, 18), ("int4", 59, 23)])
def test_launches_of_a_decode_step(cache, whole, layer, tmp_path):
    """Of Llama-3-8B with two layers, and what a third one adds; see docs/guides/kernels.md."""
    counts = []
    for layers in (2, 3):
        config = replace(PRESETS["llama-3-8b"], num_layers=layers, dtype="bfloat16")
        plan, folder = Plan(config, any_pattern(config, 0.5), kv_dtype=cache), tmp_path / str(layers)
        compile_for("h200", *decode(plan, 1 << 17, "triton"), xla_dump_to=str(folder))
        (sequence,) = folder.glob("*.thunk_sequence.txt")
        counts.append(len(re.findall(r"^\s*\d+: k\w+", sequence.read_text(encoding="utf-8"), flags=re.M)))
    assert counts[0] <= whole and counts[1] - counts[0] <= layer, counts


@pytest.mark.parametrize("page_size", [None, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("operation", ["prefill", "decode"])
def test_no_mosaic_kernel_spills(operation, head_dim, page_size):
    function, shapes = program(operation, "mosaic", head_dim=head_dim, page_size=page_size)
    (kernel,) = (kernel for kernel in kernels_on("h200", function, *shapes) if not is_merge(kernel))
    assert kernel.name.startswith({"prefill": "flash", "decode": "decode"}[operation])
    assert kernel.spill_bytes == 0 and 0 < kernel.registers <= 168
    assert 64 * head_dim * 2 < kernel.shared_memory <= GPUS["h200"].shared_memory_per_core - 1024
    # C75xx: the products of a warpgroup wait for each other.
    assert kernel.warnings == ()
    if kernel.loops is not None:
        tiles = tiles_for("mosaic_flash" if operation == "prefill" else "mosaic_decode", head_dim, 2)
        for loop in kernel.loops:
            # A product reads 16 channels of queries and keys, then 16 values; one wait for each of the two products.
            assert (loop.mma, loop.depbar) == (head_dim // 16 + tiles.block_k // 16, 2)
        # In decode, only the first tile has a mask, and is before the loop.
        *masked, whole = sorted(kernel.loops, key=lambda loop: -loop.instructions)
        # In prefill, tiles of the chunk and of a ring have masks of their own.
        assert whole.sts == 0 and whole.instructions < 520 and len(masked) == (2 if operation == "prefill" else 0)
        assert all(loop.instructions < 1100 for loop in masked)


@pytest.mark.skipif(not is_available(), reason="needs jax 0.11.2 or newer")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_mosaic_s_prefill_on_ampere_does_not_spill(head_dim):
    function, shapes = program("prefill", "mosaic", head_dim=head_dim)
    (kernel,) = kernels_on("a100-80g", function, *shapes)
    assert kernel.spill_bytes == 0 and 0 < kernel.registers <= 255 and kernel.warnings == ()
    # Two programs on a multiprocessor, each with four warps.
    assert 2 * (kernel.shared_memory + 1024) <= GPUS["a100-80g"].shared_memory_per_core
    if kernel.loops is not None:
        # 16 queries and 64 keys of a warp, products of 16 x 8 x 16.
        assert all(loop.mma == head_dim for loop in kernel.loops)
        *masked, own, full = sorted(kernel.loops, key=lambda loop: -loop.instructions)
        # The next tile of a retrieval head's slot is in the slot too; that of the chunk may be.
        assert full.instructions < 540 and own.instructions < 620 and len(masked) == 3


@pytest.mark.parametrize(("operation", "cache"), [("prefill", "same"), ("decode", "same"), ("decode", "int4")])
def test_addresses_survive_pools_of_more_than_2_to_the_31_elements(operation, cache):
    """128 slots of 4.2M tokens: an offset of 32 bits would reach the fourth slot. Compiled, not run."""
    for capacity, bits in ((1024, 32), (1 << 22, 64)):
        function, shapes = program(operation, "triton", capacity=capacity, cache=cache)
        found = kernels_on("h200", function, *shapes)
        assert [kernel.address_bits for kernel in found if not is_merge(kernel)] == [bits]
