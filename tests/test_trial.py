"""A backend that certification finds right, but that does not compile at the size of a program, is passed over."""

import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from duo_jax import KVCache, decode_step, generate, prefill
from duo_jax.certified import inference, training
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.model import Model
from pallas_kernels import backends, ops, trial, xla
from pallas_kernels.append import scatter
from pallas_kernels.certify import verdicts
from pallas_kernels.certify.verdicts import Found, Verdict, key_of
from pallas_kernels.choices import repeating
from pallas_kernels.gpus import Chip
from pallas_kernels.types import OPERATIONS, Backend, Heads, Pools, TokenShards
from pallas_kernels.window import Window
from tests.shapes import TINY

# Of a head dim that no other test has, so that nothing was traced before.
CONFIG = replace(TINY, head_dim=24)
TOKENS = np.arange(3, 45, dtype=np.int32)[None]
GPU = {"kind": "NVIDIA Pretended", "capability": "9.0", "cores": 132, "shared_memory": 232448}
MOST = 64
FAST, SLOW = Verdict(True, "", 1e-3, 1e-4), Verdict(True, "", 1e-3, 1e-2)


def broken(x):
    """The same numbers, through a call that XLA does not know: this traces, and does not compile."""
    return jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.fixture
def picky(monkeypatch, tmp_path):
    """A GPU as far as `ops` can tell, and a fast backend on it that compiles up to `MOST` tokens of a slot or sample.

    Returns the sizes that it was traced for.
    """
    sizes = []

    def at(size, out):
        sizes.append(size)
        return broken(out) if size > MOST else out

    def of_pools(operation, q, *rest, **options):
        part = getattr(xla, operation)(q, *rest, **options)
        return part._replace(out=at(rest[-2].full_k.shape[2], part.out))

    def of_sample(q, k, v, window):
        part = xla.BACKEND.training(q, k, v, window)
        return part._replace(out=at(q.shape[1], part.out))

    def append(pools, heads, k, v, **options):
        new = scatter(pools, heads, k, v, **options)
        return new._replace(full_k=at(new.full_k.shape[2], new.full_k))

    module = ModuleType("pretended.picky")
    parts = {name: partial(of_pools, name) for name in ("prefill", "decode")}
    module.BACKEND = Backend("pretended.picky", lambda request: None, **parts, append=append, training=of_sample)
    monkeypatch.setitem(sys.modules, "pretended", ModuleType("pretended"))
    monkeypatch.setitem(sys.modules, "pretended.picky", module)
    order = dict.fromkeys(OPERATIONS, ("pretended.picky", "xla"))
    monkeypatch.setitem(backends.PREFERENCES, (9, 0), order)
    monkeypatch.setattr(ops, "device_kind", lambda: GPU["kind"])
    monkeypatch.setattr(ops, "chip", lambda: Chip((9, 0), 132, 232448))
    monkeypatch.setattr(verdicts, "device", lambda: GPU)
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("DUO_BACKEND", raising=False)
    verdicts.forget()
    trial.forget_trials()
    known = [*inference(CONFIG, None), *inference(CONFIG, None, mesh=MeshSize(sequence=2)), *training(CONFIG)]
    found = {key_of(each): {"pretended.picky": FAST, "xla": SLOW} for each in known}
    verdicts.agree_on(Found(found, set(found), GPU))
    yield sizes
    verdicts.forget()
    trial.forget_trials()


@pytest.fixture(scope="module")
def model():
    return Model.random(CONFIG, seed=1)


def test_prefill_and_decode_pass_it_over_in_a_cache_that_is_too_large(picky, model):
    expected, _ = prefill(model, TOKENS, KVCache.init(CONFIG, None, 1, 128), backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, cache = prefill(model, TOKENS, KVCache.init(CONFIG, None, 1, 64))
        decode_step(model, np.array([3]), cache)
    assert picky and max(picky) == 64
    with pytest.warns(UserWarning, match=r"picky backend is right here but does not compile .*prefill float32"):
        large, cache = prefill(model, TOKENS, KVCache.init(CONFIG, None, 1, 128))
    with pytest.warns(UserWarning) as told:
        decode_step(model, np.array([3]), cache)
    for operation in ("append", "decode"):
        words = rf"does not compile .*{operation} float32.*no_such_kernel.*the next backend"
        assert any(re.search(words, str(each.message)) for each in told)
    np.testing.assert_allclose(small, expected, atol=1e-5)
    np.testing.assert_allclose(large, expected, atol=1e-5)
    # A backend that is named fails loudly.
    with pytest.raises(Exception, match="no_such_kernel"):
        prefill(model, TOKENS, KVCache.init(CONFIG, None, 1, 128), backend="pretended.picky")


def test_so_does_generation_in_one_program(picky, model):
    with pytest.warns(UserWarning, match="does not compile"):
        found = generate(model, TOKENS, max_new_tokens=3)
    assert picky and found.lengths == 3


def test_so_do_devices_that_share_tokens(picky):
    """It is compiled without their mesh, as one of them computes."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 4, 24), np.float32))
    keys = jnp.asarray(rng.standard_normal((2, 1, 192, 24), np.float32))
    none = jnp.zeros((0, 1, 1, 24))
    heads = Heads(jnp.ones(2, bool), jnp.arange(2, dtype=jnp.int32))

    def attend(keys, shards, **options):
        pools = Pools(keys, keys, none, none)
        rows = {"lengths": jnp.array([190], jnp.int32), "window": Window(0, 0)}
        return ops.decode_attention(q, pools, heads, **rows, shards=shards, **options)

    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("tokens",)), PartitionSpec(None, None, "tokens")
    own = partial(attend, shards=TokenShards("tokens", 2))
    sharded = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False))
    each = jnp.concatenate([keys[:, :, ::2], keys[:, :, 1::2]], axis=2)
    with pytest.warns(UserWarning, match=r"decode float32, .*sharded: .*no_such_kernel"):
        found = sharded(each)
    np.testing.assert_allclose(found, attend(keys, None, backend="xla"), atol=1e-5)


def test_so_does_training_in_both_directions(picky):
    def loss(x, backend):
        return ops.full_attention(jnp.concatenate([x, x], axis=2), x, x, backend=backend).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for length, is_told in ((48, False), (80, True)):
        x = jnp.linspace(0, 1, length * 48, dtype=jnp.float32).reshape(1, length, 2, 24)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = gradient(x, None)
        np.testing.assert_allclose(found, gradient(x, "xla"), rtol=1e-4)
        assert any("does not compile" in str(each.message) for each in told) == is_told
    assert set(picky) == {48, 80}


def test_a_run_that_repeats_it_continues_with_the_next(picky):
    request = replace(training(CONFIG)[0], device=GPU["kind"], capability=(9, 0))
    arrays = tuple(jax.ShapeDtypeStruct((1, size, 2, 24), jnp.float32) for size in (80, 80, 80))
    with repeating({"training": {"backend": "pretended.picky", "tiles": {}}}):
        assert ops.choose(request).name == "pretended.picky"
        with pytest.warns(UserWarning, match="does not compile"):
            assert ops.choose(request, operands=trial.Operands(arrays)).name == "xla"
        # It is reported once for each operation.
        larger = tuple(jax.ShapeDtypeStruct((1, 96, 2, 24), jnp.float32) for _ in range(3))
        assert ops.choose(request, operands=trial.Operands(larger)).name == "xla"


def test_memory_that_is_taken_is_for_the_program_to_report(picky, monkeypatch):
    def exhaust(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    taken = Backend("taken", lambda request: None, training=exhaust)
    assert trial.compiles(taken, training(CONFIG)[0], trial.Operands((jnp.ones(2),)))
