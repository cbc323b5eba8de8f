"""Prefill by cuDNN's attention, through jax's public function; streaming heads as in `xla`. Has never run on a GPU.

A retrieval head attends to its slot and, causally, to the chunk, in two calls that are merged by their log-sum-exp. The
merge is tested on a CPU with the XLA implementation of the same function. cuDNN compiles only on a GPU, so three things
are untested: its kernels, whether they skip the unused end of a slot, and calls to them inside a loop.

jax rounds the log-sum-exp to the type of the queries. XLA is free to drop that rounding and, by default, does so on
GPUs (`xla_allow_excess_precision`); if it did not, bfloat16 would add an error of about one percent where slot and
chunk have equal weight. Certification measures it.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import MASKED, merge_splits
from pallas_kernels.types import Backend, Heads, Partial, Pools, Request, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.xla import Slot
from pallas_kernels.xla import prefill as prefill_by_heads

DTYPES = ("bfloat16", "float16")


def refuses(request: Request) -> str | None:
    """The reason why cuDNN cannot run a request, or None."""
    if reason := request.refused_layout() or request.refused_types(DTYPES) or request.refused_gpu():
        return reason
    assert request.capability is not None
    most = 256 if request.capability >= (9, 0) else 128
    if request.head_dim > most or request.head_dim % 8:
        return f"takes head dims up to {most} that are multiples of 8, got {request.head_dim}"
    return None


def prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Partial:
    """See `pallas_kernels.prefill_attention`; `implementation` is that of `jax.nn.dot_product_attention`."""
    attend = partial(_attend, implementation=implementation)
    options: dict[str, Any] = {"start": start, "lengths": lengths, "window": window, "shards": shards}
    return prefill_by_heads(q, k, v, pools, heads, **options, attend=attend)


def _attend(
    q: Float[Array, "B T G H"],
    k: Float[Array, "B T H"],
    v: Float[Array, "B T H"],
    slot: Slot,
    shards: TokenShards | None,
    blank: Partial,
    *,
    start: Int32[Array, "B"],
    longest: Int32[Array, ""],
    implementation: Literal["cudnn", "xla"],
) -> Partial:
    """One retrieval head: its slot, then the chunk."""
    del shards, longest  # Refused; padding is computed, and seen by no query.
    is_filled = jnp.arange(slot.size, dtype=jnp.int32)[None, :] < start[:, None]
    keys, values = slot.load(jnp.int32(0), is_filled, q.dtype)
    call = partial(jax.nn.dot_product_attention, implementation=implementation, return_residual=True)
    # A row without an earlier token is given one, which then does not count: cuDNN need not know empty rows.
    earlier = call(q, keys[:, :, None], values[:, :, None], key_value_seq_lengths=jnp.maximum(start, 1))
    own = call(q, k[:, :, None], v[:, :, None], is_causal=True)
    parts = Partial(*(jnp.stack([x.astype(jnp.float32) for x in pair]) for pair in zip(earlier, own, strict=True)))
    has_earlier = jnp.broadcast_to((start > 0)[:, None, None], q.shape[:3])
    merged = merge_splits(parts, jnp.stack([has_earlier, jnp.ones_like(has_earlier)]), axis=0)
    return Partial(merged.out.astype(blank.out.dtype), jnp.maximum(merged.log_sum, MASKED))


BACKEND = Backend("cudnn", refuses, prefill)
