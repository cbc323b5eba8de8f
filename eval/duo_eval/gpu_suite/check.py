"""A measured call is checked in the same case: against dense attention in float32, and for equal bits in every run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from duo_eval.gpu_suite import numerics
from duo_eval.speed.device import available
from pallas_kernels import Pools, Unsupported, layer
from pallas_kernels.certify.cases import TOLERANCE, poisoned, worst
from pallas_kernels.certify.examine import RUNS
from pallas_kernels.quantized import Quantized, Stored, hadamard, read, store
from pallas_kernels.window import Window, consecutive

# Queries of a chunk that are compared, and the most scores of one KV head at a time.
QUERIES, SCORES = 64, 1 << 26


def check(
    attend: Callable[[layer.Layer], jax.Array],
    made: layer.Layer,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"] | None = None,
) -> dict[str, Any]:
    """Error of some queries, and how many of `RUNS` runs differ from the first.

    Args:
        attend: the operation, `[B, T, N, H]`.
        made: its inputs; of decode, the queries are one token, which the pools contain.
        start: tokens in the pools.
        lengths: tokens of the chunk in prefill; None: decode.
    """
    program = jax.jit(attend).lower(made).compile()
    numerics.poison()
    out = program(made)
    count = min(QUERIES, made.q.shape[1], max(1, SCORES // (made.pools.capacity * made.q.shape[2] * len(start))))
    rows = np.unique(np.linspace(0, made.q.shape[1] - 1, count).astype(int))
    exact = dense(made, rows, start=start, lengths=lengths)
    tokens = np.ones(len(start)) if lengths is None else np.asarray(lengths)
    keep = (rows[None, :] < tokens[:, None])[:, :, None, None]
    pair = (np.where(keep, np.asarray(x, np.float64), 0.0) for x in (out[:, rows].astype(jnp.float32), exact))
    error = worst(*pair)
    differs = sum(bool(_differ(program(made), out)) for _ in range(RUNS))
    is_right = error < TOLERANCE[made.q.dtype.name] and not differs
    return {"error": error, "runs": RUNS, "differing_runs": differs, "is_right": is_right}


def dense(
    made: layer.Layer,
    rows: np.ndarray,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"] | None = None,
) -> Float[np.ndarray, "B M N H"]:
    """Attention of the queries `rows` of a chunk, as `check` has them, one KV head after the other."""
    num_kv_heads, group = made.k.shape[2], made.q.shape[2] // made.k.shape[2]
    # A decode step's own token is the last one in the pools.
    q_pos = start[:, None] + (jnp.asarray(rows, jnp.int32)[None, :] if lengths is not None else -1)
    own_pos = consecutive(start, made.k.shape[1])
    if lengths is None:
        own_pos = jnp.full_like(own_pos, -1)
    else:
        own_pos = jnp.where(own_pos < (start + lengths)[:, None], own_pos, -1)
    index = jnp.arange(made.pools.full_k.shape[2], dtype=jnp.int32)[None, :]
    stored_pos = {True: jnp.where(index < start[:, None], index, -1), False: layer.WINDOW.positions(start)}
    out = []
    for head in range(num_kv_heads):
        kind = bool(made.heads.is_retrieval[head])
        pair = made.pools.full if kind else made.pools.ring
        slot = [jax.tree.map(lambda x, head=head: x[made.heads.slot[head]], pool) for pool in pair]
        own = [store(x[:, :, head], pool) for x, pool in zip((made.k, made.v), pair, strict=True)]
        q = made.q[:, rows, head * group : (head + 1) * group]
        out.append(_attend(q, slot, own, q_pos, stored_pos[kind], own_pos, None if kind else layer.WINDOW))
    return np.concatenate([np.asarray(x) for x in out], axis=2)


@partial(jax.jit, static_argnames="window")
def _attend(
    q: Float[Array, "B M G H"],
    slot: list[Stored],
    own: list[Stored],
    q_pos: Int32[Array, "B M"],
    slot_pos: Int32[Array, "B S"],
    own_pos: Int32[Array, "B T"],
    window: Window | None,
) -> Float[Array, "B M G H"]:
    k, v = (jnp.concatenate([_plain(x), _plain(y)], axis=1) for x, y in zip(slot, own, strict=True))
    k_pos = jnp.concatenate([slot_pos, own_pos], axis=1)
    v = jnp.where((k_pos >= 0)[:, :, None], v, 0.0)  # Memory without a token has NaN.
    q_pos, k_pos = q_pos[:, :, None], k_pos[:, None, :]
    seen = (k_pos >= 0) & (k_pos <= q_pos if window is None else window.visible(q_pos, k_pos))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bmgh,bsh->bmgs", q.astype(jnp.float32), k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[:, :, None, :], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bmgs,bsh->bmgh", weights, v)


def _plain(stored: Stored) -> Float[Array, "*rows H"]:
    found = read(stored, jnp.dtype(jnp.float32)).astype(jnp.float32)
    return hadamard(found) if isinstance(stored, Quantized) else found


@jax.jit
def _differ(x: jax.Array, y: jax.Array) -> Bool[Array, ""]:
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return (jax.lax.bitcast_convert_type(x, bits) != jax.lax.bitcast_convert_type(y, bits)).any()


@partial(jax.jit, donate_argnums=0)
def hide(made: layer.Layer, counts: Int32[Array, "B"]) -> layer.Layer:
    """NaN in the pools from `counts` tokens of a row on."""
    full_k, full_v, ring_k, ring_v = (poisoned(pool, _beyond(pool, counts)) for pool in made.pools.stored)
    return made._replace(pools=Pools(full_k, full_v, ring_k, ring_v))


def _beyond(pool: Stored, counts: Int32[Array, "B"]) -> Bool[Array, "1 B S 1"]:
    index = jnp.arange(pool.shape[2], dtype=jnp.int32)[None, None, :, None]
    return index >= counts[None, :, None, None]


def verdict(result: dict[str, Any]) -> str:
    """The check in words."""
    if result["is_right"]:
        return f"right, error {result['error']:.1e}"
    return f"WRONG, error {result['error']:.1e}, {result['differing_runs']} of {result['runs']} runs differ"


def fits(nbytes: int) -> None:
    """Whether the device has room for arrays of this size, and as much again for copies of parts of them.

    Raises:
        Unsupported: it has not.
    """
    room = available()
    if room is not None and 1.5 * nbytes > room:
        raise Unsupported(f"needs {1.5 * nbytes / 1e9:.3g} GB of memory, {room / 1e9:.3g} GB are free")
