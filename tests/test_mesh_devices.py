"""Eight devices give the results of one."""

import functools
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from duo_eval.aot.collectives import collectives, summary
from duo_eval.aot.compile import memory_of
from duo_eval.aot.programs import decode, prefill_chunk, training_step
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel
from duo_train.metrics import METRICS_FILE
from duo_train.recipes import AttentionProfile, KVzip, PruLong, Run
from jax.sharding import PartitionSpec
from transformers import AutoTokenizer

from duo_jax import (
    HeadPattern,
    KVCache,
    Model,
    decode_step,
    generate,
    load_model,
    make_mesh,
    prefill,
    save_model,
    score,
)
from duo_jax.generation.generation import prepare
from duo_jax.mesh.mesh import MeshSize
from duo_jax.plan import Plan, any_pattern
from pallas_kernels import Heads, Pools, TokenShards, Window, decode_attention, prefill_attention
from pallas_kernels.quantized import empty
from tests.shapes import FAMILIES, GOLDEN, TINY
from tests.stored import read, store
from tests.test_generate import programs_by_phase
from tests.test_train import ATTENTION, DATA, RECIPE
from tests.text_models import make_model

SIZES = [MeshSize(t, s, d) for t, s, d in product((1, 2, 4, 8), repeat=3) if t * s * d <= 8]
CHUNK = 16
LENGTHS = np.array([45, 30, 1, 17, 44, 8, 23, 32])


def mesh_of(size: MeshSize) -> jax.sharding.Mesh:
    return make_mesh(tensor=size.tensor, sequence=size.sequence, data=size.data)


@functools.cache
def prompt(folder: Path) -> np.ndarray:
    """Eight rows of golden text."""
    with np.load(folder / "golden.npz") as arrays:
        return np.tile(arrays["ids"][:, : LENGTHS.max()], (4, 1))


def answer(model: Model, folder: Path, pattern: HeadPattern | None, dtype: str | None, backend: str | None = None):
    """Logits after ragged prompts in chunks and after each of two greedy steps, and the cache."""
    tokens = prompt(folder)
    cache = KVCache.init(model.config, pattern, len(tokens), 50, dtype=dtype, mesh=model.mesh)
    found, cache = prefill(model, tokens, cache, lengths=LENGTHS, chunk_size=CHUNK, backend=backend)
    logits = [np.asarray(found)]
    for _ in range(2):
        found, cache = decode_step(model, logits[-1].argmax(-1), cache, backend=backend)
        logits.append(np.asarray(found))
    np.testing.assert_array_equal(cache.length, LENGTHS + 2)
    return np.stack(logits), cache


def held(cache: KVCache) -> dict[tuple[int, int], np.ndarray]:
    """Keys and values `[2, B, tokens, H]` of each layer's KV heads, from all devices."""
    size = MeshSize.of(cache.mesh)
    pools = [np.asarray(read(pool, np.dtype(np.float32))) for pair in (cache.full, *cache.rings) for pool in pair]
    # Tokens of retrieval heads in their order: one from each of those that share them.
    pools[:2] = [
        x.reshape(*x.shape[:2], size.sequence, -1, x.shape[3]).swapaxes(2, 3).reshape(x.shape) for x in pools[:2]
    ]
    order = (
        np.tile(np.arange(cache.slot.shape[1]), (len(cache.slot), 1))
        if cache.order is None
        else np.asarray(cache.order)
    )
    found = {}
    for (layer, column), head in np.ndenumerate(order):
        ring = 2 + 2 * cache.ring_of_layer[layer]
        of_type = pools[:2] if cache.is_retrieval[layer, column] else pools[ring : ring + 2]
        device = column // (order.shape[1] // size.tensor)
        slot = device * (of_type[0].shape[0] // size.tensor) + int(cache.slot[layer, column])
        keys = np.stack([pool[slot] for pool in of_type])[:, :, :47]
        if (layer, int(head)) in found:  # Devices that hold the same head.
            np.testing.assert_array_equal(keys, found[layer, int(head)])
        found[layer, int(head)] = keys
    return found


@functools.cache
def expected(folder: Path, with_pattern: bool, dtype: str | None):
    pattern = HeadPattern.load(folder / "pattern") if with_pattern else None
    logits, cache = answer(load_model(folder), folder, pattern, dtype)
    return logits, held(cache)


def check(folder: Path, size: MeshSize, *, with_pattern: bool, dtype: str | None, backend: str | None = None) -> None:
    """Logits and tokens are those of one device.

    Where a sum's last bit differs, a number may be rounded to the next step of a quantized cache: rows in which one was
    are left out, and are few.
    """
    wanted, there = expected(folder, with_pattern, dtype)
    pattern = HeadPattern.load(folder / "pattern") if with_pattern else None
    model = load_model(folder, mesh=mesh_of(size), pattern=pattern)
    found, cache = answer(model, folder, pattern, dtype, backend)
    here, same = held(cache), np.ones(len(LENGTHS), bool)
    for head, keys in there.items():
        if dtype is None or keys.shape[2] != 47:  # Rings are not quantized.
            continue
        differs = np.abs(here[head] - keys)
        same &= differs.max((0, 2, 3)) < 1e-4
        assert differs.max() < (0.05 if dtype == "int8" else 0.8), "one step at most"
    assert same.sum() >= 2
    np.testing.assert_allclose(found, wanted, rtol=0, atol={None: 1e-5, "int8": 0.05, "int4": 0.5}[dtype])
    np.testing.assert_allclose(found[:, same], wanted[:, same], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[:, same].argmax(-1), wanted[:, same].argmax(-1))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of a golden checkpoint."""
    return make_model(tmp_path_factory.mktemp("mesh") / "model")


@pytest.mark.parametrize(
    ("size", "with_pattern", "dtype", "backend"),
    [
        (MeshSize(tensor=2, sequence=2, data=2), True, None, None),
        # Each of four KV heads is on two devices.
        pytest.param(MeshSize(tensor=8), False, "int4", None, marks=pytest.mark.full_matrix),
        pytest.param(MeshSize(sequence=4), True, "int8", "reference", marks=pytest.mark.mesh),
    ],
)
def test_logits_of_prefill_and_decode(folder, size, with_pattern, dtype, backend):
    check(folder, size, with_pattern=with_pattern, dtype=dtype, backend=backend)


@pytest.mark.mesh
def test_generate(folder):
    """In one program, with the same tokens."""
    pattern = HeadPattern.load(folder / "pattern")
    options = {"pattern": pattern, "lengths": np.minimum(LENGTHS, CHUNK), "max_new_tokens": 4}
    eight = load_model(folder, mesh=make_mesh(tensor=4, sequence=2), pattern=pattern)
    wanted, found = (generate(model, prompt(folder)[:, :CHUNK], **options) for model in (load_model(folder), eight))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "in_a_layer"),
    [
        # After attention, and after the MLP.
        pytest.param(MeshSize(tensor=4, data=2), {"all-reduce": 2}, marks=pytest.mark.mesh),
        # The projection is shared once more, and partial outputs are merged: their weights, and they.
        (MeshSize(tensor=2, sequence=4), {"all-gather": 1, "all-reduce": 4}),
    ],
)
@pytest.mark.parametrize("program", [decode, prefill_chunk])
@pytest.mark.usefixtures("fresh_programs")
def test_what_devices_send_each_other_does_not_grow_with_the_cache(monkeypatch, program, size, in_a_layer):
    """And pools are written in place."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Arguments are shapes, not arrays.
    config = replace(TINY, num_heads=8, num_kv_heads=4)
    plan = Plan(config, any_pattern(config, 0.5, sink_size=2, recent_size=6), 2, chunk_size=8, mesh=size)
    found, temporaries = {}, {}
    for length in (4096, 16384):  # More than a block of each device.
        function, *shapes = program(plan, length, "xla", mesh_of(size))
        compiled = function.lower(*shapes).compile()
        memory = memory_of(compiled)
        assert memory.aliased >= plan.kv(length) > 0.9 * memory.aliased
        temporaries[length], found[length] = memory.temporaries, collectives(compiled)
    assert temporaries[16384] - temporaries[4096] < 0.01 * (plan.kv(16384) - plan.kv(4096))
    assert found[4096] == found[16384]
    about = summary(found[4096])
    assert about["in_a_layer"] == in_a_layer
    rows, tokens = 2 // size.data, 1 if program is decode else 8
    sums = {"all-reduce": 2 * config.embed_dim}
    if size.sequence > 1:
        heads = config.num_heads // size.tensor
        sums = {"all-reduce": sums["all-reduce"] + heads * (config.head_dim + 2)}
        sums["all-gather"] = (heads + 2 * config.num_kv_heads // size.tensor) * config.head_dim
    assert about["bytes_in_a_layer"] == 4 * rows * tokens * sum(sums.values())
    # Logits, and nothing larger.
    assert about["largest"]["nbytes"] <= max(4 * 2 * config.vocab_size, about["bytes_in_a_layer"])


@pytest.mark.parametrize("dtype", [None, pytest.param("int8", marks=pytest.mark.mesh)])
@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("triton", marks=pytest.mark.mesh)])
def test_attention_over_shards_of_the_tokens_is_that_over_all_tokens(backend, dtype):
    """For retrieval and streaming heads, in rows of different lengths, one of them at its first token."""
    batch, length, capacity, head_dim, window = 3, 24, 64, 16, Window(2, 6)
    shards, random = TokenShards("sequence", 4), np.random.default_rng(0)
    start, counts = jnp.asarray([50, 3, 0], jnp.int32), jnp.asarray([14, 24, 1], jnp.int32)

    def numbers(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    q, k, v = numbers(batch, length, 8, head_dim), *(numbers(batch, length, 4, head_dim) for _ in "kv")
    plain = [numbers(2, batch, capacity, head_dim) for _ in "kv"]
    rings = [numbers(2, batch, 8, head_dim) for _ in "kv"]
    heads = Heads(jnp.asarray([True, False, False, True]), jnp.asarray([1, 0, 1, 0], jnp.int32))
    whole = Pools(*(store(x, empty(x.shape, dtype or "float32")) for x in plain), *rings)
    # Token p on device p % 4, at p // 4.
    order = np.arange(capacity).reshape(-1, 4).T.ravel()
    striped = jax.tree.map(lambda x: x[:, :, order], whole.full)
    mesh = make_mesh(sequence=4)

    def prefilled(shards, retrieval):
        return prefill_attention(
            q,
            k,
            v,
            Pools(*retrieval, *rings),
            heads,
            start=start,
            lengths=counts,
            shards=shards,
            backend=backend,
            window=window,
        )

    def decoded(shards, retrieval):
        pools = Pools(*retrieval, *rings)
        return decode_attention(q[:, 0], pools, heads, lengths=start + 1, shards=shards, backend=backend, window=window)

    for operation in (prefilled, decoded):
        of_device = functools.partial(operation, shards)
        shared = jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=PartitionSpec(None, None, "sequence"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        wanted, found = jax.jit(functools.partial(operation, None))(whole.full), jax.jit(shared)(striped)
        for row, count in enumerate(counts):
            real = slice(None) if operation is decoded else slice(0, int(count))
            np.testing.assert_allclose(found[row][real], wanted[row][real], rtol=0, atol=2e-5)


@pytest.mark.mesh
def test_score(folder):
    one, eight = load_model(folder), load_model(folder, mesh=make_mesh(tensor=2, sequence=2, data=2))
    wanted, found = (
        score(model, prompt(folder), KVCache.init(model.config, None, 8, 48, mesh=model.mesh), lengths=LENGTHS)[0]
        for model in (one, eight)
    )
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            found.logprobs[row, : length - 1], wanted.logprobs[row, : length - 1], rtol=0, atol=1e-5
        )


def test_a_cache_is_marked_rewound_and_forked(folder):
    pattern = HeadPattern.load(folder / "pattern")
    mesh = make_mesh(tensor=2, sequence=4)
    model = load_model(folder, mesh=mesh, pattern=pattern)
    tokens = prompt(folder)[:1, :CHUNK]
    _, cache = prefill(model, tokens, KVCache.init(model.config, pattern, 1, 40, mesh=mesh))
    mark = cache.mark()
    _, cache = prefill(model, tokens[:, ::-1], cache)
    # Chunks overwrite the entries: the mark's tokens are distinguished from others.
    again = cache.rewind(mark).fork()
    assert again.mesh == mesh and np.asarray(again.length) == CHUNK and cache.fork(3).batch_size == 3
    emptied = KVCache.init(model.config, pattern, 1, 40, mesh=mesh)
    _, other = prefill(model, tokens[:, ::-1], emptied)
    with pytest.raises(ValueError, match="no longer in the cache"):
        other.rewind(mark)


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    pattern = HeadPattern.from_gates(np.array([[1.0, 1, 0, 0]] * 2), sink_size=2, recent_size=4)  # Heads 1 and 2 swap.
    mesh, tokens = make_mesh(tensor=2, sequence=4), prompt(folder)[:1, :CHUNK]
    model = load_model(folder, mesh=mesh, pattern=pattern)
    config = model.config
    with pytest.raises(ValueError, match=r"load_model\(..., mesh=mesh, pattern=pattern\)"):
        prefill(model, tokens, KVCache.init(config, None, 1, 40, mesh=mesh))
    with pytest.raises(ValueError, match=r"the cache is on one device, the model on .*tensor=2, sequence=4"):
        prefill(model, tokens, KVCache.init(config, pattern, 1, 40))
    with pytest.raises(ValueError, match="save it from one device"):
        save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be saved"):
        KVCache.init(config, pattern, 1, 40, mesh=mesh).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="has 16 devices, but there are 8"):
        make_mesh(tensor=2, sequence=8)
    with pytest.raises(ValueError, match=r"int4-32 has scales for groups .* several heads of 16"):
        load_model(folder, mesh=mesh, pattern=pattern, weight_dtype="int4-32")


@pytest.mark.mesh
def test_quantized_weights_and_a_saved_model_lie_on_a_mesh(folder, tmp_path):
    """They are the same numbers and scales as on one device, in another order."""
    pattern = HeadPattern.load(folder / "pattern")
    one = load_model(folder, weight_dtype="int8")
    save_model(one, tmp_path / "saved")
    models = [load_model(tmp_path / "saved", mesh=make_mesh(tensor=2), pattern=pattern)]
    models += [load_model(folder, weight_dtype="int8", mesh=make_mesh(tensor=2), pattern=pattern)]
    leaves = [jax.tree.leaves(model.params) for model in (one, *models)]
    for whole, saved, placed in zip(*leaves, strict=True):
        np.testing.assert_array_equal(saved, placed)
        np.testing.assert_array_equal(np.sort(np.ravel(whole)), np.sort(np.ravel(placed)))
    tokens, lengths = prompt(folder)[:2, :CHUNK], LENGTHS[:2] % CHUNK
    wanted, found = (
        prefill(model, tokens, KVCache.init(one.config, pattern, 2, 32, mesh=model.mesh), lengths=lengths)[0]
        for model in (one, models[0])
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "recipe", "changed", "loaded"),
    [
        pytest.param(
            MeshSize(sequence=4, data=2),
            replace(RECIPE, reg_weight=1e-4, accumulate=2),
            {"rematerialize": True},
            {"fsdp": True},
            marks=pytest.mark.mesh,
        ),
        # Each of four KV heads is on two devices, and a kernel runs on each.
        pytest.param(
            MeshSize(sequence=8),
            replace(RECIPE, reg_weight=1e-4),
            {"mixing": "teacher", "backend": "triton"},
            {"fsdp": True},
            marks=pytest.mark.mesh,
        ),
        # What samples are padded to is not a multiple of the devices.
        pytest.param(MeshSize(sequence=2), PruLong(pad_multiple=63), {}, {}, marks=pytest.mark.mesh),
        pytest.param(
            MeshSize(sequence=4, data=2), PruLong(), {}, {"fsdp": True, "weight_dtype": "int8"}, marks=pytest.mark.mesh
        ),
    ],
)
def test_devices_that_share_tokens_find_the_gates_of_one(folder, tmp_path, size, recipe, changed, loaded):
    model, data = (
        load_model(folder, **loaded | {"fsdp": False}),
        NeedleData(DATA, AutoTokenizer.from_pretrained(folder)),
    )
    attention, recipe = replace(ATTENTION, **changed), replace(recipe, steps=4, learning_rate=0.02, batch_size=2)
    gates, losses = [], []
    for mesh in (make_mesh(), mesh_of(size)):
        if gates and loaded:
            model = load_model(folder, mesh=mesh, **loaded)
        run = Run(model, data, attention, tmp_path / str(len(gates)), start=np.full((2, 4), 0.5), mesh=mesh)
        run.folder.mkdir()
        gates.append(recipe.find(run))
        lines = (run.folder / METRICS_FILE).read_text().splitlines()
        losses.append([json.loads(line)[recipe.loss_name] for line in lines])
    np.testing.assert_allclose(gates[1], gates[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3, atol=1e-9)
    assert losses[0][-1] > 1e-4 and np.ptp(gates[0]) > 1e-4  # Ten times the tolerance above.


@pytest.mark.mesh
def test_a_training_step_on_devices_that_share_tokens(monkeypatch, fresh_programs):
    """It takes a fraction of the memory, and exchanges only arrays of attention, never those of all tokens."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Arguments are shapes, not arrays.
    config, length = replace(TINY, num_heads=8, num_kv_heads=4), 4096
    temporaries = {}
    for count in (1, 4):
        attention = GatedModel(sink_size=16, recent_size=64, backend="xla")
        function, *shapes = training_step(config, length, attention, make_mesh(sequence=count), fsdp=False)
        compiled = function.lower(*shapes).compile()
        temporaries[count], found = memory_of(compiled).temporaries, collectives(compiled)
    assert temporaries[4] < 0.35 * temporaries[1]
    exchanged = [one.nbytes for one in found if one.kind == "all-to-all"]
    # A device's part of q or the output; of k and v.
    assert set(exchanged) == {4 * length // 4 * heads * config.head_dim for heads in (8, 4)}
    assert max(one.nbytes for one in found if one.kind != "all-to-all") < 1024 * 4 * config.embed_dim


@pytest.mark.mesh
@pytest.mark.parametrize("rematerialize", [True, False])
def test_a_training_step_gathers_a_layer_at_a_time(monkeypatch, fresh_programs, rematerialize):
    """Each device has an eighth of the weights and, for a while, those of one or two of the layers."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Arguments are shapes, not arrays.
    config = replace(TINY, num_heads=8, num_kv_heads=4, embed_dim=256, mlp_dim=1024, num_layers=4)
    attention = GatedModel(sink_size=16, recent_size=64, backend="xla", rematerialize=rematerialize)
    memory, gathered = {}, {}
    for fsdp in (False, True):
        function, *shapes = training_step(config, 256, attention, make_mesh(sequence=8), fsdp=fsdp)
        # By default, XLA's scheduler for CPUs trades memory for concurrency; that for GPUs does not.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        compiled = function.lower(*shapes).compile(options)
        memory[fsdp] = memory_of(compiled)
        gathered[fsdp] = sum(each.nbytes for each in collectives(compiled) if each.kind == "all-gather")
    table = config.vocab_size * config.embed_dim  # The head is as large, and not used.
    layer = (config.num_parameters - 2 * table) // config.num_layers * 4
    saved = memory[False].arguments - memory[True].arguments
    assert saved == pytest.approx(7 / 8 * 4 * (config.num_parameters - table), rel=0.01)
    assert memory[True].temporaries - memory[False].temporaries < 2 * layer
    # Each layer twice, for the forward and the backward pass, and the embeddings once.
    assert gathered[True] == pytest.approx(2 * config.num_layers * layer + 4 * table, rel=0.02)
    assert gathered[False] < 1024


@pytest.mark.mesh
def test_a_gradient_keeps_no_quantized_weights_that_were_gathered(monkeypatch, fresh_programs):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Arguments are shapes, not arrays.
    attention, sizes = GatedModel(sink_size=16, recent_size=64, backend="xla", rematerialize=False), []
    for layers in (2, 4):
        config = replace(TINY, num_heads=8, num_kv_heads=4, embed_dim=256, mlp_dim=1024, num_layers=layers)
        function, *shapes = training_step(replace(config, weight_dtype="int8"), 256, attention, make_mesh(sequence=8))
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        sizes.append(memory_of(function.lower(*shapes).compile(options)).temporaries)
    # A quarter of what a layer's MLP takes in float32.
    assert (sizes[1] - sizes[0]) / 2 < 4 * 3 * 256 * 1024 / 4


@pytest.mark.mesh
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("recipe", [KVzip(num_samples=1, length=64), AttentionProfile(num_samples=1, length=64)])
def test_recipes_without_training_share_the_weights(folder, tmp_path, recipe, family):
    """Each device computes all tokens, with all experts of a mixture."""
    data, mesh = NeedleData(DATA, AutoTokenizer.from_pretrained(folder)), make_mesh(data=2, sequence=2)
    one, sliced = load_model(GOLDEN / family), load_model(GOLDEN / family, mesh=mesh, fsdp=True)
    wanted = recipe.find(Run(one, data, ATTENTION, tmp_path, mesh=make_mesh()))
    np.testing.assert_allclose(recipe.find(Run(sliced, data, ATTENTION, tmp_path)), wanted, rtol=0, atol=1e-5)


def test_what_devices_cannot_share_in_training_is_refused(folder, tmp_path):
    model, data = load_model(folder), NeedleData(DATA, AutoTokenizer.from_pretrained(folder))
    for mesh, recipe, message in (
        (make_mesh(sequence=3), RECIPE, "4 KV heads and 8 query heads cannot be divided among sequence=3"),
        (make_mesh(tensor=2), RECIPE, "no tensor parallelism, got tensor=2"),
        (make_mesh(data=3), RECIPE, r"a multiple of the 3 devices .*batch_size=1"),
        (make_mesh(data=2), PruLong(), r"a multiple of the 2 devices .*batch_size=1"),
        (make_mesh(sequence=2), KVzip(length=64), "KVzip trains nothing: .* only share its weights"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.find(Run(model, data, ATTENTION, tmp_path, mesh=mesh))


@pytest.mark.meshes
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_and_cache(family, size):
    try:
        size.check(load_model(GOLDEN / family).config)
    except ValueError:
        with pytest.raises(ValueError, match="cannot be divided"):
            load_model(GOLDEN / family, mesh=mesh_of(size))
        return
    # Quantized caches of one family: how numbers are stored knows no model.
    for with_pattern, dtype in (
        (False, None),
        (True, None),
        *([(True, "int8"), (True, "int4")] if family == "llama" else []),
    ):
        check(GOLDEN / family, size, with_pattern=with_pattern, dtype=dtype)
    jax.clear_caches()  # A process has memory maps for the programs of some thirty of these tests.


@pytest.mark.mesh
def test_a_watched_stream_on_a_mesh_compiles_everything_in_its_first_phase(caplog):
    folder, mesh = GOLDEN / FAMILIES[0], make_mesh(tensor=2, sequence=2)
    pattern = HeadPattern.load(folder / "pattern")
    model = load_model(folder, mesh=mesh, pattern=pattern)
    request = prepare(model, prompt(folder)[:1, :10], pattern=pattern, max_new_tokens=3)
    programs = programs_by_phase(request, caplog)
    assert {"jit(extend)", "jit(_choose)", "jit(step)"} <= set(programs["compile"])
    assert programs["prefill"] == programs["decode"] == []
