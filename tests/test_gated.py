"""Attention for training gates: against a dense float64 softmax, its gradients, its memory, the golden checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_train.gated import GatedModel
from jax.test_util import check_grads

from duo_jax import load_model
from pallas_kernels import full_attention, gated_attention, ops, tiles, xla_train
from pallas_kernels.tiles import FlashTiles
from pallas_kernels.window import Window
from tests.shapes import ON_CPU, on_each_backend

# Mosaic has no kernel for training.
backends = pytest.mark.parametrize("backend", ON_CPU)
# tokens, query heads, KV heads, head dim, sinks, window
SHAPES = {
    "gqa_3": (37, 6, 2, 16, 3, 9),
    "a_block_and_no_sinks": (16, 4, 4, 16, 0, 1),
    "shorter_than_the_sinks": (5, 4, 2, 8, 7, 3),
    "window_longer_than_the_text": (21, 8, 1, 80, 2, 40),
    "head_dim_256": (19, 2, 2, 256, 4, 6),
}
each_shape = pytest.mark.parametrize(("backend", "shape"), on_each_backend(SHAPES, {"gqa_3", "shorter_than_the_sinks"}))


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    if "default_blocks" not in request.keywords:
        monkeypatch.setattr(xla_train, "BLOCK", 8)
        monkeypatch.setattr(tiles, "_default", lambda *_: FlashTiles(block_q=4, block_k=8, num_warps=4, num_stages=2))


def inputs(shape, seed=0):
    tokens, heads, kv_heads, dim, sinks, window = shape
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, tokens, heads, dim)).astype(np.float32)
    k, v = (rng.normal(size=(2, tokens, kv_heads, dim)).astype(np.float32) for _ in "kv")
    gates = rng.random(kv_heads).astype(np.float32)
    return (*map(jnp.asarray, (q, k, v, gates)), Window(sinks, window))


def dense(q, k, v, keep, sinks=None):
    """Softmax over the kept keys, `keep [T, S]`, and a sink of each query head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.where(keep, np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    total += 0 if sinks is None else np.exp(np.asarray(sinks, np.float64)[:, None, None] - most)
    return np.einsum("bnts,bsnh->btnh", weights / total, v)


def masks(tokens, window):
    query, key = np.indices((tokens, tokens))
    causal = key <= query
    return causal, causal & ((key < window.sink) | (key > query - window.recent))


@each_shape
def test_mixes_the_two_kinds_of_attention(shape, backend):
    q, k, v, gates, window = inputs(shape)
    causal, seen = masks(q.shape[1], window)
    gate = np.repeat(np.asarray(gates, np.float64), q.shape[2] // k.shape[2])[None, None, :, None]
    full, streaming = dense(q, k, v, causal), dense(q, k, v, seen)
    mix = jax.jit(functools.partial(gated_attention, window=window, backend=backend))
    out = mix(q, k, v, gates)
    np.testing.assert_allclose(out, gate * full + (1 - gate) * streaming, atol=2e-6)
    np.testing.assert_allclose(jax.jit(functools.partial(full_attention, backend=backend))(q, k, v), full, atol=2e-6)
    given = jax.random.normal(jax.random.key(0), q.shape)
    out = mix(q, k, v, gates, full=given)
    np.testing.assert_allclose(out, gate * np.asarray(given) + (1 - gate) * streaming, atol=2e-6)


@backends
def test_a_learned_sink_is_one_more_term_of_both_kinds(backend):
    q, k, v, gates, window = inputs(SHAPES["gqa_3"])
    sinks = 3 * jax.random.normal(jax.random.key(2), q.shape[2:3])
    full, streaming = (dense(q, k, v, keep, sinks) for keep in masks(q.shape[1], window))
    gate = np.repeat(np.asarray(gates, np.float64), 3)[None, None, :, None]
    mix = jax.jit(functools.partial(gated_attention, window=window, backend=backend))
    out = mix(q, k, v, gates, sink_logits=sinks)
    np.testing.assert_allclose(out, gate * full + (1 - gate) * streaming, atol=2e-6)


def test_sink_logits_of_another_number_of_heads_raise():
    q, k, v, *_ = inputs((5, 4, 2, 8, 1, 3))
    with pytest.raises(ValueError, match="sink_logits must be one per query head"):
        jax.eval_shape(functools.partial(full_attention.__wrapped__, sink_logits=jnp.ones(3)), q, k, v)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
@pytest.mark.parametrize(
    "shape",
    [
        "gqa_3",
        "shorter_than_the_sinks",
        pytest.param("window_longer_than_the_text", marks=pytest.mark.full_matrix),
        pytest.param("head_dim_256", marks=pytest.mark.full_matrix),
    ],
)
def test_gradients_equal_those_of_the_dense_reference(shape, backend):
    q, k, v, gates, window = inputs(SHAPES[shape])
    weights = jax.random.normal(jax.random.key(1), q.shape)
    sinks = None if shape == "head_dim_256" else jax.random.normal(jax.random.key(2), q.shape[2:3])

    def loss(q, k, v, gates, sinks, backend):
        mixed = gated_attention(q, k, v, gates, sink_logits=sinks, window=window, backend=backend)
        return jnp.sum(weights * mixed)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3) if sinks is None else (0, 1, 2, 3, 4)), static_argnums=5)
    arrays = q, k, v, gates, sinks
    for found, wanted in zip(gradient(*arrays, backend), gradient(*arrays, "reference"), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=2e-5)


def test_gradients_equal_finite_differences():
    q, k, v, gates, window = inputs((11, 2, 1, 4, 2, 3))
    attend = jax.jit(functools.partial(gated_attention, window=window, backend="xla"))
    check_grads(attend, (q, k, v, gates), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    q, k, v, gates, window = inputs((40, 4, 2, 64, 4, 12))
    weights = jax.random.normal(jax.random.key(1), q.shape)

    def loss(*args):
        return jnp.sum(weights * gated_attention(*args, window=window).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))

    exact = gradient(q, k, v, gates)
    rounded = gradient(*(x.astype(jnp.bfloat16) for x in (q, k, v)), gates)
    assert [x.dtype for x in rounded] == [jnp.bfloat16] * 3 + [jnp.float32]
    for found, wanted in zip(rounded, exact, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float32) - wanted) / np.linalg.norm(wanted)
        assert error < 2e-2


@pytest.mark.default_blocks
def test_memory_is_linear_in_the_tokens_forward_and_backward(fresh_programs):
    def compiled(tokens, gradient):
        shape = jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.float32)
        gates = jax.ShapeDtypeStruct((2,), jnp.float32)

        def loss(q, k, v, gates):
            return gated_attention(q, k, v, gates, window=Window(64, 256), backend="xla").sum()

        function = jax.grad(loss, (0, 1, 2, 3)) if gradient else loss
        return jax.jit(function).lower(shape, kv, kv, gates).compile()

    for gradient in (False, True):
        small, large = compiled(4096, gradient), compiled(8192, gradient)
        # Blocks have a fixed size, so that it grows by at most the factor of the tokens.
        sizes = [program.memory_analysis().temp_size_in_bytes for program in (small, large)]
        assert sizes[1] < 2.1 * sizes[0]
        assert "8192,8192" not in large.as_text()


def test_the_gated_model_equals_hugging_face_with_both_mixings(golden):
    with np.load(golden / "golden.npz") as stored:
        arrays = dict(stored)
    if "gates" not in arrays:
        pytest.skip(f"{golden.name} has no hidden states of a gated model")
    model, tokens = load_model(golden), jnp.asarray(arrays["ids"], jnp.int32)
    sizes = {"sink_size": int(arrays["sink_size"]), "recent_size": int(arrays["recent_size"])}
    gated = GatedModel(**sizes)
    run = jax.jit(lambda model, tokens, gates: gated_both(gated, model, tokens, gates))
    if model.config.score_cap is not None:
        with pytest.raises(NotImplementedError, match="caps the scores of attention"):
            gated.teacher(model, tokens)
        return
    gates = jnp.asarray(arrays["gates"][list(model.config.full_layers)], jnp.float32)
    for name, found in run(model, tokens, gates).items():
        np.testing.assert_allclose(found, arrays[name], rtol=0, atol=1e-4, err_msg=name)


def gated_both(gated, model, tokens, gates):
    hidden, full = gated.teacher(model, tokens)
    return {
        "full_hidden": hidden,
        "gated_hidden_self": gated.student(model, tokens, gates),
        "gated_hidden_teacher": gated.student(model, tokens, gates, full),
    }


def test_the_gradient_of_a_model_s_gates_equals_finite_differences(tiny):
    gated = GatedModel(sink_size=2, recent_size=4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 24)), jnp.int32)
    wanted = jax.random.normal(jax.random.key(0), (1, 24, 32))
    loss = jax.jit(lambda gates: jnp.sum(wanted * gated.student(tiny, tokens, gates)))
    gates = jnp.asarray([[0.3, 0.9], [0.5, 0.1]], jnp.float32)
    gradient = jax.grad(loss)(gates)
    for index in np.ndindex(2, 2):
        step = jnp.zeros((2, 2)).at[index].set(1e-2)
        slope = (loss(gates + step) - loss(gates - step)) / 2e-2
        np.testing.assert_allclose(gradient[index], slope, rtol=2e-2, atol=2e-3)


def test_a_gradient_with_rematerialization_is_the_same_and_keeps_less(tiny, fresh_programs):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 64)), jnp.int32)
    wanted = jax.random.normal(jax.random.key(0), (1, 64, 32))
    gates = jnp.full((2, 2), 0.5, jnp.float32)

    def program(rematerialize):
        gated = GatedModel(sink_size=2, recent_size=4, rematerialize=rematerialize)
        loss = lambda gates: jnp.sum(wanted * gated.student(tiny, tokens, gates))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(gates).compile()

    kept, computed = program(False), program(True)
    np.testing.assert_allclose(kept(gates), computed(gates), rtol=1e-4, atol=1e-4)
    assert computed.memory_analysis().temp_size_in_bytes < kept.memory_analysis().temp_size_in_bytes


def test_arguments_that_do_not_fit_raise():
    q, k, v, gates, window = inputs(SHAPES["gqa_3"])
    # The annotations refuse some of these first, where they are executed; without them the checks do.
    gated = getattr(ops.gated_attention, "__wrapped__", ops.gated_attention)
    with pytest.raises(ValueError, match=r"k and v must be \[B, T, K, H\]"):
        gated(q, k[:, :-1], v, gates, window=window)
    with pytest.raises(ValueError, match="gates must be one per KV head"):
        gated(q, k, v, jnp.ones(3), window=window)
    with pytest.raises(ValueError, match="full must have the queries' shape"):
        gated(q, k, v, gates, window=window, full=q[:1])
    with pytest.raises(ValueError, match="unknown attention backend"):
        gated(q, k, v, gates, window=window, backend="cuda")
    with pytest.raises(ValueError, match="recent_size must be at least 1"):
        GatedModel(recent_size=0)
