"""The gradients of attention over a sequence's own keys: `pallas_kernels.triton.training`, in Triton's own language."""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.differentiable import NO_WINDOW, Arrays, training_by
from pallas_kernels.jax_triton.flash_kernel import flash_attention
from pallas_kernels.jax_triton.launch import launch
from pallas_kernels.jax_triton.tile import load_rows, store_rows, width
from pallas_kernels.merge import LOG2_E
from pallas_kernels.schedule import Sizes, last_tile_of_queries, steps_of
from pallas_kernels.tiles import FlashTiles
from pallas_kernels.window import Window


def gradients(arrays: Arrays, window: Window | None, tiles: FlashTiles) -> tuple[Array, Array, Array]:
    """Of queries, keys and values."""
    q, k, v = arrays[:3]
    batch, length, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    steps, is_retrieval = Sizes(length, tiles.block_q, tiles.block_k, window or NO_WINDOW), jnp.bool_(window is None)
    query_tiles, key_tiles = -(-length // tiles.block_q), -(-length // tiles.block_k)

    def of_queries(first: Array) -> Array:
        seen = steps_of(first, jnp.int32(0), is_retrieval, steps)
        return jnp.stack([seen.sinks, seen.left, seen.end])

    first_query = jnp.arange(query_tiles, dtype=jnp.int32) * tiles.block_q
    first_key = jnp.arange(key_tiles, dtype=jnp.int32) * tiles.block_k
    settings: dict[str, Any] = {"warps": tiles.num_warps, "stages": tiles.num_stages}
    settings["sizes"] = sizes_of(q.shape, num_kv_heads, window, tiles)
    (d_q,) = launch(
        query_gradient_kernel,
        (*arrays, jax.vmap(of_queries)(first_query)),
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=(query_tiles, num_heads, batch),
        **settings,
    )
    d_k, d_v = launch(
        key_gradient_kernel,
        (*arrays, jax.vmap(lambda first: last_tile_of_queries(first, is_retrieval, steps))(first_key)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        grid=(key_tiles, num_kv_heads, batch),
        **settings,
    )
    return d_q, d_k, d_v


training = training_by(flash_attention, gradients)


def sizes_of(q: tuple[int, ...], num_kv_heads: int, window: Window | None, tiles: FlashTiles) -> dict[str, int | float]:
    """The constants that the kernels are compiled with, by the shape of the queries."""
    seen = window or NO_WINDOW
    return {
        "tokens": q[1],
        "num_heads": q[2],
        "num_kv_heads": num_kv_heads,
        "head_dim": q[3],
        "width": width(q[3]),
        "is_retrieval": window is None,
        "sink": seen.sink,
        "recent": seen.recent,
        "block_q": tiles.block_q,
        "block_k": tiles.block_k,
        "scale": q[3] ** -0.5,
        "log2_e": LOG2_E,
    }


@triton.jit
@no_type_check
def of_scores(
    q,  # [Q, H]
    grad,  # [Q, H]
    log_sum,  # [Q]
    delta,  # [Q]
    k,  # [S, H]
    v,  # [S, H]
    q_index,  # [Q]
    k_index,  # [S]
    tokens: tl.constexpr,
    is_retrieval: tl.constexpr,
    sink: tl.constexpr,
    recent: tl.constexpr,
    scale: tl.constexpr,
    log2_e: tl.constexpr,
):
    """Weights and the gradient of the scores, `[Q, S]`."""
    i = q_index[:, None]
    j = k_index[None, :]
    keep = (i < tokens) & (j <= i)
    if not is_retrieval:
        keep = keep & ((j < sink) | (j > i - recent))
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    weights = tl.where(keep, tl.exp2(scores * (scale * log2_e) - (log_sum * log2_e)[:, None]), 0.0)
    d_weights = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
    return weights, weights * (d_weights - delta[:, None]) * scale


@triton.jit
@no_type_check
def query_gradient_kernel(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    grad_ptr,  # [B, T, N, H]
    log_ptr,  # [B, N, T]
    delta_ptr,  # [B, N, T]
    steps_ptr,  # [tiles, 3]: tiles of sinks, begin and end of the other ones
    out_ptr,  # [B, T, N, H]
    tokens: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    is_retrieval: tl.constexpr,
    sink: tl.constexpr,
    recent: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    log2_e: tl.constexpr,
):
    """The gradient of one tile of queries of one head."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # Late tiles, which see more, come first.
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = number * block_q
    q_index = first + tl.arange(0, block_q)
    exists = q_index < tokens
    at_q = ((row * tokens + first) * num_heads + head) * head_dim
    q = load_rows(q_ptr + at_q, num_heads * head_dim, exists, False, block_q, head_dim, width)
    grad = load_rows(grad_ptr + at_q, num_heads * head_dim, exists, False, block_q, head_dim, width)
    of_row = (row * num_heads + head) * tokens
    log_sum = tl.load(log_ptr + of_row + q_index, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + of_row + q_index, mask=exists, other=0.0)
    kv_head = head // (num_heads // num_kv_heads)
    sinks = tl.load(steps_ptr + number * 3)
    left = tl.load(steps_ptr + number * 3 + 1)
    end = tl.load(steps_ptr + number * 3 + 2)
    d_q = tl.zeros((block_q, width), tl.float32)
    for step in range(sinks + end - left):
        first_key = tl.where(step < sinks, step, step - sinks + left) * block_k
        k_index = first_key + tl.arange(0, block_k)
        at = ((row * tokens + first_key) * num_kv_heads + kv_head) * head_dim
        k = load_rows(k_ptr + at, num_kv_heads * head_dim, k_index < tokens, False, block_k, head_dim, width)
        v = load_rows(v_ptr + at, num_kv_heads * head_dim, k_index < tokens, False, block_k, head_dim, width)
        _, d_scores = of_scores(
            q, grad, log_sum, delta, k, v, q_index, k_index, tokens, is_retrieval, sink, recent, scale, log2_e
        )
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="tf32x3")
    store_rows(out_ptr + at_q, num_heads * head_dim, d_q, exists, block_q, head_dim, width)


@triton.jit
@no_type_check
def key_gradient_kernel(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    grad_ptr,  # [B, T, N, H]
    log_ptr,  # [B, N, T]
    delta_ptr,  # [B, N, T]
    end_ptr,  # [tiles], number after the last tile of queries
    d_k_ptr,  # [B, T, K, H]
    d_v_ptr,
    tokens: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    is_retrieval: tl.constexpr,
    sink: tl.constexpr,
    recent: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    log2_e: tl.constexpr,
):
    """The gradients of one tile of keys and values of one KV head, from all query heads of its group."""
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * block_k  # Early tiles, which more queries see, come first.
    group: tl.constexpr = num_heads // num_kv_heads
    k_index = first + tl.arange(0, block_k)
    at = ((row * tokens + first) * num_kv_heads + kv_head) * head_dim
    k = load_rows(k_ptr + at, num_kv_heads * head_dim, k_index < tokens, False, block_k, head_dim, width)
    v = load_rows(v_ptr + at, num_kv_heads * head_dim, k_index < tokens, False, block_k, head_dim, width)
    begin = first // block_q
    end = tl.load(end_ptr + tl.program_id(0))
    d_k = tl.zeros((block_k, width), tl.float32)
    d_v = tl.zeros((block_k, width), tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        of_row = (row * num_heads + head) * tokens
        for number in range(begin, end):
            q_index = number * block_q + tl.arange(0, block_q)
            exists = q_index < tokens
            at_q = ((row * tokens + number * block_q) * num_heads + head) * head_dim
            q = load_rows(q_ptr + at_q, num_heads * head_dim, exists, False, block_q, head_dim, width)
            grad = load_rows(grad_ptr + at_q, num_heads * head_dim, exists, False, block_q, head_dim, width)
            log_sum = tl.load(log_ptr + of_row + q_index, mask=exists, other=0.0)
            delta = tl.load(delta_ptr + of_row + q_index, mask=exists, other=0.0)
            weights, d_scores = of_scores(
                q, grad, log_sum, delta, k, v, q_index, k_index, tokens, is_retrieval, sink, recent, scale, log2_e
            )
            d_k += tl.dot(tl.trans(d_scores).to(q.dtype), q, input_precision="tf32x3")
            d_v += tl.dot(tl.trans(weights).to(grad.dtype), grad, input_precision="tf32x3")
    store_rows(d_k_ptr + at, num_kv_heads * head_dim, d_k, k_index < tokens, block_k, head_dim, width)
    store_rows(d_v_ptr + at, num_kv_heads * head_dim, d_v, k_index < tokens, block_k, head_dim, width)
