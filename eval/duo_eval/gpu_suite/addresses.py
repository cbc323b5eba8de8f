"""Pools of more than 2^31 elements, read in their last slot; every other slot is NaN."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite import check
from duo_eval.gpu_suite.section import Case
from duo_jax.sizes import nbytes
from pallas_kernels import Heads, Pools, layer
from pallas_kernels.quantized import Quantized, Stored, empty, store


def cases(*, smoke: bool) -> Iterator[Case]:
    """Both operations; 2.4e9 numbers, or words of quantized ones."""
    if smoke:
        yield {"operation": "decode", "cache": "int4", "slots": 3, "capacity": 400, "head_dim": 16}
        return
    for cache, slots in (("bfloat16", 9), ("int4", 33)):
        for operation in ("decode", "prefill"):
            yield {"operation": operation, "cache": cache, "slots": slots, "capacity": 1 << 21, "head_dim": 128}


def measure(case: Case) -> dict[str, Any]:
    """The check; a NaN shows another slot."""
    slots, capacity, head_dim, tokens = case["slots"], case["capacity"], case["head_dim"], 96
    shape = slots, 1, capacity, head_dim
    like = [empty((1, head_dim), case["cache"], values=values) for values in (False, True)]
    pools = [jax.eval_shape(partial(empty, shape, case["cache"], values=values)) for values in (False, True)]
    check.fits(nbytes(pools))
    # The layer's own pools have the tokens of the last slot.
    one = layer.make(heads=(4, 1, head_dim), dtype="bfloat16", streaming=0.0, tokens=tokens, capacity=capacity)
    full_k, full_v = (_last(slots, store(x, kind)) for x, kind in zip(one.pools.full, like, strict=True))
    ring = jnp.zeros((0, 1, layer.WINDOW.size, head_dim), jnp.bfloat16)
    heads = Heads(jnp.ones(1, bool), jnp.full(1, slots - 1, jnp.int32))
    made = layer.Layer(one.q, one.k, one.v, Pools(full_k, full_v, ring, ring), heads)
    del one, full_k, full_v
    elements = max(x.size for x in jax.tree.leaves(made.pools))
    if case["operation"] == "decode":
        made, filled = made._replace(q=made.q[:, :1]), jnp.full(1, capacity, jnp.int32)
        checked = check.check(partial(_decode, case["backend"], filled), made, start=filled)
    else:
        rows = {"start": jnp.full(1, capacity, jnp.int32), "lengths": jnp.full(1, tokens, jnp.int32)}
        checked = check.check(partial(_prefill, case["backend"], rows), made, **rows)
    return {"elements": int(elements)} | checked


def _decode(backend: str, lengths: jax.Array, made: layer.Layer) -> jax.Array:
    return made.decode(lengths=lengths, backend=backend)


def _prefill(backend: str, rows: dict[str, jax.Array], made: layer.Layer) -> jax.Array:
    return made.prefill(**rows, backend=backend)


@partial(jax.jit, static_argnums=0)
def _last(slots: int, slot: Stored) -> Stored:
    """A pool with a slot at its end, and NaN before it."""

    def grown(x: jax.Array, fill: Any) -> jax.Array:
        blank = jnp.full((slots, *x.shape[1:]), fill, x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(blank, x, slots - 1, 0)

    if isinstance(slot, Quantized):
        return Quantized(grown(slot.words, 0), grown(slot.grid, 0x7FC00000), slot.head_dim, slot.bits)
    return grown(slot, jnp.nan)


def line(case: Case, result: dict[str, Any]) -> str:
    """The verdict."""
    about = f"{case['operation']}, {case['cache']} pools of {result['elements']:.1e} elements, {case['backend']}"
    return f"{about}: {check.verdict(result)}"
