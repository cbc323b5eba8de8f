"""Meshes: sizes, balance of heads, and plans. `test_mesh_devices.py` runs them."""

import json

import jax
import numpy as np
import pytest
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel
from duo_train.identify import contents
from duo_train.recipes import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from duo_jax import (
    PRESETS,
    HeadPattern,
    KVCache,
    generate,
    load_model,
    make_mesh,
    prefill,
    published_patterns,
    save_model,
)
from duo_jax.cache.spec import CacheSpec
from duo_jax.mesh.balance import balance, query_heads
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.place import place_model
from tests.shapes import TINY
from tests.test_train import DATA


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_device_holds_as_many_retrieval_heads_up_to_one(data):
    """In each layer and in total. Every head is on a device, and slots are numbered without gaps."""
    layers, heads = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    tensor = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 16) if max(n, heads) % min(n, heads) == 0]))
    bits = data.draw(st.lists(st.booleans(), min_size=layers * heads, max_size=layers * heads))
    table = np.asarray(bits).reshape(layers, heads)
    found = balance(table, tensor)
    by_device = np.split(found.is_retrieval, tensor, axis=1)
    in_layers = np.stack([part.sum(1) for part in by_device])
    assert np.ptp(in_layers, axis=0).max() <= 1 and np.ptp(in_layers.sum(1)) <= 1
    assert found.retrieval_slots - in_layers.sum(1).min() <= 1
    copies = max(1, tensor // heads)
    np.testing.assert_array_equal(
        np.sort(found.order, axis=1), np.tile(np.repeat(np.arange(heads), copies), (layers, 1))
    )
    np.testing.assert_array_equal(found.is_retrieval, np.take_along_axis(table, found.order, 1))
    for part, slots in zip(by_device, np.split(found.slot, tensor, axis=1), strict=True):
        np.testing.assert_array_equal(slots[part], np.arange(part.sum()))
        np.testing.assert_array_equal(slots[~part], np.arange((~part).sum()))
        assert (~part).sum() <= found.streaming_slots
    num_heads = 2 * max(heads, tensor)
    for order in found.order:
        queries = query_heads(order, num_heads, heads)
        np.testing.assert_array_equal(np.sort(queries), np.arange(num_heads))
        np.testing.assert_array_equal(queries // (num_heads // heads), np.repeat(order, num_heads // len(order)))


def test_one_device_keeps_the_order_of_heads(half):
    found = balance(half.is_retrieval, 1)
    np.testing.assert_array_equal(found.order, [[0, 1], [0, 1]])


def test_published_patterns_waste_less_than_two_percent_on_eight_devices():
    for name in published_patterns():
        pattern = HeadPattern.load(name, sparsity=0.5)
        if pattern.num_kv_heads % 8 == 0:
            found = balance(pattern.is_retrieval, 8)
            assert found.retrieval_slots * 8 / pattern.num_retrieval < 1.02


def test_bytes_of_a_device(half):
    """Its own slots, rows and tokens of retrieval heads, and whole rings."""
    sizes = MeshSize(tensor=2, sequence=2, data=2)
    one = KVCache.bytes_for(TINY, half, 1, 32)
    row = 2 * 4 * TINY.head_dim
    assert one == row * (2 * 32 + 2 * 11)
    assert KVCache.bytes_for(TINY, half, 2, 64, mesh=sizes) == row * (32 + 11)
    assert KVCache.bytes_for(TINY, half, 2, 63, mesh=sizes) == row * (32 + 11)
    most = CacheSpec(TINY, half, 2, 1, TINY.precision(), sizes).fit(10_000)
    assert KVCache.bytes_for(TINY, half, 2, most, mesh=sizes) <= 10_000
    assert KVCache.bytes_for(TINY, half, 2, most + 1, mesh=sizes) > 10_000


def test_what_no_mesh_can_share_is_refused():
    llama = PRESETS["llama-3-8b"]
    for tensor in (1, 2, 4, 8, 16, 32):
        MeshSize(tensor=tensor).check(llama)
    with pytest.raises(ValueError, match=r"8 KV heads and 32 query heads .* tensor=3 .*tensor may be 1, 2, 4, 8, 16"):
        MeshSize(tensor=3).check(llama)
    with pytest.raises(ValueError, match="tensor=64"):
        MeshSize(tensor=64).check(llama)
    with pytest.raises(ValueError, match=r"MLP of 48 channels .* = 5 devices"):
        MeshSize(sequence=5).check(TINY)
    with pytest.raises(ValueError, match=r"batch_size=3 rows .* data=2"):
        KVCache.bytes_for(TINY, None, 3, 8, mesh=MeshSize(data=2))
    with pytest.raises(ValueError, match="tensor must be at least 1, got 0"):
        MeshSize(tensor=0)
    with pytest.raises(ValueError, match="has 1024 devices, but there are 8"):
        make_mesh(tensor=1024)


def test_a_model_in_slices_has_the_weights_of_one_device(text_model, tmp_path):
    """Each device has an eighth of them, besides norms; saved models load in the same way."""
    mesh = make_mesh(data=2, sequence=4)
    one = load_model(text_model, weight_dtype="int8")
    save_model(one, tmp_path / "saved")
    data = NeedleData(DATA, AutoTokenizer.from_pretrained(text_model))
    for sliced in (
        load_model(text_model, weight_dtype="int8", mesh=mesh, fsdp=True),
        load_model(tmp_path / "saved", mesh=mesh, fsdp=True),
    ):
        assert sliced.is_fsdp and sliced.graphdef == one.graphdef
        for whole, leaf in zip(jax.tree.leaves(one.params), jax.tree.leaves(sliced.params), strict=True):
            np.testing.assert_array_equal(leaf, whole)
            parts = {shard.data.size for shard in leaf.addressable_shards}
            assert parts == {leaf.size // 8 if leaf.ndim == 2 else leaf.size}
        # A run may be resumed on other devices.
        runs = [Run(model, data, GatedModel(), tmp_path) for model in (one, sliced)]
        assert contents(runs[0]) == contents(runs[1])


def test_a_model_in_slices_is_for_training(text_model, tmp_path):
    mesh = make_mesh(sequence=2)
    sliced = load_model(text_model, mesh=mesh, fsdp=True)
    for cache in (None, mesh):
        with pytest.raises(ValueError, match=r"loaded with fsdp=True.* load it without"):
            prefill(sliced, [[1, 2]], KVCache.init(sliced.config, None, 1, 8, mesh=cache))
    with pytest.raises(ValueError, match=r"loaded with fsdp=True.* load it without"):
        generate(sliced, [[1, 2]], max_new_tokens=2)
    with pytest.raises(ValueError, match="save it from one device"):
        save_model(sliced, tmp_path / "model")
    with pytest.raises(ValueError, match="give mesh="):
        load_model(text_model, fsdp=True)
    with pytest.raises(ValueError, match="no pattern="):
        load_model(text_model, mesh=mesh, pattern=HeadPattern.full(sliced.config), fsdp=True)


def test_training_refuses_a_model_whose_devices_share_heads(tiny, half, text_model, tmp_path):
    placed = place_model(tiny, make_mesh(), half)
    data = NeedleData(DATA, AutoTokenizer.from_pretrained(text_model))
    with pytest.raises(ValueError, match=r"order of heads .* load the model with fsdp=True"):
        Run(placed, data, GatedModel(), tmp_path)
    sliced = load_model(text_model, mesh=make_mesh(sequence=2), fsdp=True)
    with pytest.raises(ValueError, match=r"the model is on .*sequence=2, .* the run on .*data=2"):
        Run(sliced, data, GatedModel(), tmp_path, mesh=make_mesh(data=2))
    with pytest.raises(ValueError, match="already on a mesh"):
        place_model(placed, make_mesh(), half)


def test_the_plan_is_of_each_device(duo):
    """Two devices have half of the weights, the cache and the slots each; copies of KV heads are reported."""
    options = ("plan", "--model", "llama-3-8b", "--memory", "80GB", "--sparsity", 0.5, "--json")
    one, two = (json.loads(duo(*options, *more).out) for more in ((), ("--mesh", "tensor=2")))
    assert two["kv_per_token"] * 2 == one["kv_per_token"] and two["max_context"] > 2 * one["max_context"]
    assert one["weights"] / 2 < two["weights"] < 1.001 * one["weights"] / 2
    assert two["devices"]["retrieval_heads"] == [64, 64] and two["devices"]["retrieval_slots"] == 64
    both = json.loads(duo(*options, "--mesh", "tensor=2,sequence=2").out)
    assert both["kv_per_token"] * 4 == one["kv_per_token"]
    result = duo(*options[:-1], "--mesh", "tensor=16")
    assert "Every KV head is on 2 of them" in result.out and "of 16 slots" in result.out
    refused = duo(*options, "--mesh", "tensor=3")
    assert refused.code == 2 and "tensor may be 1, 2, 4, 8" in refused.err


def test_sizes_are_read_as_they_are_written():
    assert MeshSize.parse("tensor=4,sequence=2") == MeshSize(4, 2, 1)
    assert MeshSize.parse("data=3") == MeshSize(data=3)
    for wrong in ("", "tensor", "tensor=x", "model=2", "tensor=2,tensor=2", "tensor=-1"):
        with pytest.raises(ValueError, match="tensor=4,sequence=2"):
            MeshSize.parse(wrong)
