"""One attention layer with random contents: the arguments of the operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from duo_eval.speed.timing import fastest
from pallas_kernels import Heads, Pools, Window
from pallas_kernels.quantized import Stored, empty, store

SINK_SIZE, RECENT_SIZE = 64, 256
WINDOW = Window(SINK_SIZE, RECENT_SIZE)
# Calls in a row of one program.
CHAIN = 8


class Layer(NamedTuple):
    """Queries, keys and values of a chunk, and the pools before it."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pools: Pools
    heads: Heads


def make(
    *,
    heads: tuple[int, int, int],
    dtype: str,
    streaming: float,
    tokens: int,
    capacity: int,
    batch: int = 1,
    seed: int = 0,
    cache: str | None = None,
) -> Layer:
    """A layer of `heads = (query heads, KV heads, head dim)`, the given fraction of its KV heads streaming.

    `cache` is the data type of retrieval heads in the pools; None: `dtype`.
    """
    num_heads, num_kv_heads, head_dim = heads
    num_streaming = round(streaming * num_kv_heads)
    is_retrieval = jnp.arange(num_kv_heads) >= num_streaming
    order = jax.random.permutation(jax.random.key(seed), num_kv_heads)
    is_retrieval = is_retrieval[order]
    slot = jnp.where(is_retrieval, jnp.cumsum(is_retrieval), jnp.cumsum(~is_retrieval)).astype(jnp.int32) - 1
    keys = iter(jax.random.split(jax.random.key(seed + 1), 7))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.dtype(dtype))

    q, k, v = (normal(batch, tokens, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads))

    def pool(slots: int, tokens: int, kept_as: str) -> Stored:
        return store(normal(slots, batch, tokens, head_dim), empty((1, head_dim), kept_as))

    full = [pool(num_kv_heads - num_streaming, capacity, cache or dtype) for _ in "kv"]
    ring = [pool(num_streaming, WINDOW.size, dtype) for _ in "kv"]
    pools = Pools(full[0], full[1], ring[0], ring[1])
    return Layer(q, k, v, pools, Heads(is_retrieval, slot))


def seconds_of_layer(attend: Callable[..., jax.Array], q: jax.Array, *rest: Any) -> float:
    """Seconds of one call of `attend(q, *rest)`, as a mean over a chain of calls in one program.

    A short kernel ends before the host launches the next one. Each call's queries are the outputs of the one before.
    """

    @jax.jit
    def chain(q: jax.Array, *rest: Any) -> jax.Array:
        return jax.lax.fori_loop(0, CHAIN, lambda _, q: attend(q, *rest), q)

    return fastest(chain, q, *rest, least=0.1) / CHAIN
