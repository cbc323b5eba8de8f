"""One attention layer with random contents: the operations on it, and their time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import Heads, Pools, Window, append_token, decode_attention, gated_attention, prefill_attention
from pallas_kernels.quantized import Stored, empty, store
from pallas_kernels.timing import fastest

SINK_SIZE, RECENT_SIZE = 64, 256
WINDOW = Window(SINK_SIZE, RECENT_SIZE)
# Calls in a row of one program.
CHAIN = 8


class Layer(NamedTuple):
    """Queries, keys and values of a chunk, and the pools before it."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    pools: Pools
    heads: Heads

    def prefill(self, *, start: Int32[Array, "B"], lengths: Int32[Array, "B"], backend: str) -> Float[Array, "B T N H"]:
        """Attention of the chunk."""
        own = self.q, self.k, self.v
        return prefill_attention(
            *own, self.pools, self.heads, start=start, lengths=lengths, window=WINDOW, backend=backend
        )

    def decode(self, *, lengths: Int32[Array, "B"], backend: str) -> Float[Array, "B 1 N H"]:
        """Attention of the chunk's first query, as a decode step."""
        q = self.q[:, 0]
        return decode_attention(q, self.pools, self.heads, lengths=lengths, window=WINDOW, backend=backend)[:, None]

    def append(self, *, start: Int32[Array, "B"], backend: str) -> Pools:
        """The pools with the chunk's first token, as a decode step writes it."""
        k, v, active = self.k[:, 0], self.v[:, 0], jnp.ones(self.k.shape[0], bool)
        return append_token(self.pools, self.heads, k, v, start=start, active=active, window=WINDOW, backend=backend)

    def gated(self, gates: Float32[Array, "K"], *, backend: str) -> Float[Array, "B T N H"]:
        """Attention of the chunk by itself, as in training."""
        return gated_attention(self.q, self.k, self.v, gates, window=WINDOW, backend=backend)


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

    def pool(slots: int, tokens: int, kept_as: str, values: bool) -> Stored:
        return store(normal(slots, batch, tokens, head_dim), empty((1, head_dim), kept_as, values=values))

    full = [pool(num_kv_heads - num_streaming, capacity, cache or dtype, values) for values in (False, True)]
    ring = [pool(num_streaming, WINDOW.size, dtype, values) for values in (False, True)]
    pools = Pools(full[0], full[1], ring[0], ring[1])
    return Layer(q, k, v, pools, Heads(is_retrieval, slot))


def seconds_of(attend: Callable[[Layer], jax.Array], layer: Layer) -> float:
    """Seconds of one call of `attend`, whose output has the shape of the queries.

    The mean over a chain of calls in one program, in which each call's queries are the outputs of the one before: a
    short kernel ends before the host launches the next one.
    """

    @jax.jit
    def chain(layer: Layer) -> jax.Array:
        return jax.lax.fori_loop(0, CHAIN, lambda _, q: attend(layer._replace(q=q)), layer.q)

    return fastest(chain, layer, least=0.1) / CHAIN
