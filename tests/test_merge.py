"""The merge of results over parts of the keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge
from pallas_kernels.triton.combine import combine
from pallas_kernels.types import Partial


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merged", [merge.combine, combine], ids=["xla", "triton"])
@pytest.mark.parametrize(("tokens", "padding"), [(1, 0), (5, 3)])
def test_parts_are_one_softmax(merged, tokens, padding, dtype):
    """Rows have from no part to 20; parts that were not written, and padding, are NaN."""
    kv_heads, group, most, head_dim = 3, 2, 20, 16
    counts = np.array([[0, 1, 3, 1], [20, 0, 7, 17]])  # of streaming, and of retrieval heads of each row
    is_retrieval = np.array([1, 0, 1])
    rng = np.random.default_rng(0)
    shape = counts.shape[1], kv_heads, most, tokens * group + padding
    out, log_sum = rng.normal(size=(*shape, head_dim)).astype(dtype), rng.normal(0, 5, shape).astype(np.float32)
    used = np.arange(most)[None, None, :] < counts[is_retrieval].T[:, :, None]
    used = used[..., None] & (np.arange(shape[3]) < tokens * group)
    weights = np.where(used, np.exp(log_sum.astype(np.float64)), 0)
    total = weights.sum(2)
    expected = (weights[..., None] * out.astype(np.float64)).sum(2) / np.maximum(total, 1e-300)[..., None]

    parts = Partial(
        jnp.asarray(np.where(used[..., None], out, np.nan).astype(dtype)), jnp.asarray(np.where(used, log_sum, np.nan))
    )
    ends = jnp.asarray(counts.cumsum(1).astype(np.int32))
    sizes = shape[0], tokens, kv_heads * group
    found = merged(parts, jnp.asarray(is_retrieval.astype(np.int32)), ends, sizes, jnp.float32)

    def by_token(x):
        x = x[:, :, : tokens * group].reshape(shape[0], kv_heads, tokens, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(*sizes, *x.shape[4:])

    assert found.out.dtype == jnp.float32
    np.testing.assert_allclose(found.out, by_token(expected), atol=1e-5)
    has_keys = by_token(total) > 0
    assert has_keys.any() and not has_keys.all()
    np.testing.assert_allclose(found.log_sum[has_keys], np.log(by_token(total)[has_keys]), atol=1e-5)
    assert (np.asarray(found.log_sum)[~has_keys] < -1e29).all()
