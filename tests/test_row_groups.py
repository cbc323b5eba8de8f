"""Rows of a batch that are computed a few at a time: what a row computes does not depend on how many others are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import KVCache, prefill
from duo_jax.model.linear import by_output
from duo_jax.model.model import Model
from duo_jax.model.row_groups import RowGroups
from tests.shapes import TINY

# Where XLA sums in another order if there are eight rows or more.
WIDTH = 576


def normed_product(x, kernel):
    return by_output(x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)), kernel)


@pytest.mark.parametrize("batch", [16, 6])
def test_a_row_has_the_same_bits_whatever_others_are_computed(batch):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32) for rows in (batch, 320))

    @jax.jit
    def product(active, x, kernel):
        return RowGroups.of(active, 4).apply(lambda x: normed_product(x, kernel), x)

    whole = np.asarray(product(np.ones(batch, bool), x, kernel))
    np.testing.assert_allclose(whole, normed_product(x, kernel), rtol=0, atol=1e-4)
    for _ in range(12):
        active = rng.random(batch) < rng.random()
        np.testing.assert_array_equal(np.asarray(product(active, x, kernel))[active], whole[active])
    for row in range(batch):
        np.testing.assert_array_equal(product(np.arange(batch) == row, x, kernel)[row], whole[row])


def test_as_many_groups_are_computed_as_the_active_rows_need():
    active = np.zeros(10, bool)
    for count, groups in ((0, 0), (1, 1), (4, 1), (5, 2), (10, 3)):
        active[::-1][:count] = True
        made = RowGroups.of(jnp.asarray(active), 4)
        assert made.needed == groups and made.rows.shape == (3, 4)
        computed = set(np.asarray(made.rows[:groups]).ravel().tolist()) - {10}
        assert computed >= set(np.flatnonzero(active).tolist()) and len(computed) == min(4 * groups, 10)
        old = jnp.full(10, -1.0)
        new = made.update(old, lambda x: x + 1, jnp.arange(10.0))
        assert new.tolist() == [row + 1 if row in computed else -1 for row in range(10)]
        assert made.apply(lambda x: x + 1, jnp.arange(10.0)).tolist() == [
            row + 1 if row in computed else 0 for row in range(10)
        ]
    assert RowGroups.of(jnp.asarray(active), 10).needed is None


@pytest.mark.parametrize("settings", [{"tied_head": True}, {"tied_head": False, "qkv_bias": True, "mlp_bias": True}])
def test_weights_by_output_are_the_same_model(settings, half):
    model = Model.random(replace(TINY, **settings), seed=1)
    turned = model.by_output()
    assert turned.by_output() is turned
    assert turned.fingerprint == model.fingerprint and turned.nbytes == model.nbytes
    for rows, length in ((1, 1), (3, 5), (2, 24)):  # One row, and products on both sides of the limit.
        tokens = np.random.default_rng(2).integers(0, TINY.vocab_size, (rows, length))
        logits = [prefill(m, tokens, KVCache.init(m.config, half, rows, 32))[0] for m in (model, turned)]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    fingerprint = model.fingerprint
    assert model.by_output(donate=True).fingerprint == fingerprint
    with pytest.raises(RuntimeError, match="deleted"):
        model.fingerprint  # noqa: B018


def test_what_is_not_plain(tiny):
    assert tiny.is_plain
    assert not Model.random(TINY, weight_dtype="int8").is_plain
