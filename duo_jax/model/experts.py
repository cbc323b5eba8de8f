"""Mixtures of experts as arithmetic: each token has a few of many functions, whose outputs are added. Knows no model.

No token is dropped. Choices are sorted by expert and computed in blocks of one expert each, as many as there are; on a
GPU, those of a few tokens one by one. So an expert's weights are read only if a token has chosen it, and a token's
result depends on no other token. (What `jax.lax.ragged_dot` becomes on CPUs and GPUs multiplies every token with every
expert.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

Weights = TypeVar("Weights")

# Rows of a block: as many as an expert has on average, within these limits. With fewer, weights are read more often and
# matrices are too small; with more, there is more padding, one part of a block for each expert.
LEAST_ROWS, MOST_ROWS = 16, 512
# Numbers of a matrix that XLA multiplies with one row in a kernel of its own on GPUs, less than its limit of 1e7: that
# kernel reads the weights of an expert where they are, others are given a copy.
MOST_WEIGHTS = 9_000_000


class Blocks(NamedTuple):
    """Which choices each block has. A choice is a token and one of its experts; they are numbered token by token."""

    order: Int32[Array, "C"]  # choices, sorted by expert
    expert: Int32[Array, "blocks"]
    first: Int32[Array, "blocks"]  # of a block's choices in `order`
    size: Int32[Array, "blocks"]
    used: Int32[Array, ""]  # blocks that have any


def rows_of_block(tokens: int, per_token: int, experts: int) -> int:
    """Rows of a block: a power of two near the average of an expert, at most all tokens."""
    average = min(max(-(-tokens * per_token // experts), LEAST_ROWS), MOST_ROWS, tokens)
    return 1 << (average - 1).bit_length()


def blocks_of(chosen: Int32[Array, "M k"], experts: int, rows: int) -> Blocks:
    """Sort choices by expert, those of an expert by token, and divide them into blocks of `rows`.

    Args:
        chosen: experts of each token; a number outside of `[0, experts)` is left out.
        experts: their number.
        rows: choices of a block.
    """
    flat = chosen.ravel()
    key = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    numbers = jnp.arange(experts, dtype=jnp.int32)
    begin, end = (jnp.searchsorted(key[order], numbers, side=side).astype(jnp.int32) for side in ("left", "right"))
    each = (end - begin + rows - 1) // rows
    last = jnp.cumsum(each, dtype=jnp.int32)
    block = jnp.arange(min(flat.size, experts + flat.size // rows), dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last, block, side="right").astype(jnp.int32), experts - 1)
    first = begin[expert] + (block - (last - each)[expert]) * rows
    return Blocks(order, expert, first, jnp.clip(end[expert] - first, 0, rows), last[-1])


def sum_of_choices(
    expert: Callable[[Array, Weights], Array],
    x: Float[Array, "M D"],
    shares: Float[Array, "M k"],
    chosen: Int32[Array, "M k"],
    weights: Weights,
) -> Float[Array, "M D"]:
    """As `weighted_sum` over blocks, but every choice by itself and all at once, for few tokens.

    On a GPU, weights are read where they are, once for each choice (`MOST_WEIGHTS`). A block's are copied first, with
    three times the traffic, and blocks are computed one after the other.

    Args:
        expert: one expert, `(x [rows, D], weights) -> [rows, D]`.
        x: the tokens.
        shares: the factor of each choice, in float32.
        chosen: experts of each token, all of which `weights` has.
        weights: a pytree of arrays whose first axis is the expert.
    """
    of_choice = jax.tree.map(lambda leaf: jnp.take(leaf, chosen.ravel(), axis=0, mode="clip"), weights)
    y = jax.vmap(expert)(jnp.repeat(x, chosen.shape[1], axis=0)[:, None], of_choice)
    return jnp.sum(shares[:, :, None] * y.reshape(*chosen.shape, -1).astype(jnp.float32), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_sum(
    expert: Callable[[Array, Weights], Array],
    rows: int,
    x: Float[Array, "M D"],
    shares: Float[Array, "M k"],
    weights: Weights,
    blocks: Blocks,
) -> Float[Array, "M D"]:
    """The outputs of each token's experts times their shares, added in float32 in the order of the experts.

    Differentiable in `x` and `shares`: a gradient computes each block again and keeps nothing but the arguments.

    Args:
        expert: one expert, `(x [rows, D], weights) -> [rows, D]`; static.
        rows: choices of a block; static.
        x: the tokens.
        shares: the factor of each choice, in float32.
        weights: a pytree of arrays whose first axis is the expert. They are frozen: their gradient is zero.
        blocks: the choices, see `blocks_of`.
    """

    def body(number: Array, out: Array) -> Array:
        tokens, choices, of_expert = _block(number, rows, blocks, weights, shares.shape)
        y = expert(_rows(x, tokens), of_expert).astype(jnp.float32)
        return _add(out, tokens, _rows(shares.ravel(), choices)[:, None] * y)

    return jax.lax.fori_loop(0, blocks.used, body, _zeros(x.shape, blocks))


def _forward(expert: Any, rows: int, *args: Any) -> tuple[Array, Any]:
    return weighted_sum(expert, rows, *args), args


def _backward(expert: Any, rows: int, args: Any, slope: Float[Array, "M D"]) -> tuple[Array, Array, None, None]:
    x, shares, weights, blocks = args

    def body(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, choices, of_expert = _block(number, rows, blocks, weights, shares.shape)
        y, pull = jax.vjp(lambda x: expert(x, of_expert), _rows(x, tokens))
        ahead = _rows(slope, tokens)
        (of_rows,) = pull((_rows(shares.ravel(), choices)[:, None] * ahead).astype(y.dtype))
        of_choices = jnp.sum(y.astype(jnp.float32) * ahead, axis=-1)
        return _add(sums[0], tokens, of_rows.astype(jnp.float32)), _add(sums[1], choices, of_choices)

    zeros = _zeros(x.shape, blocks), _zeros((shares.size,), blocks)
    of_x, of_shares = jax.lax.fori_loop(0, blocks.used, body, zeros)
    return of_x.astype(x.dtype), of_shares.reshape(shares.shape), None, None


weighted_sum.defvjp(_forward, _backward)


def _block(
    number: Int32[Array, ""], rows: int, blocks: Blocks, weights: Weights, shape: tuple[int, ...]
) -> tuple[Int32[Array, "rows"], Int32[Array, "rows"], Weights]:
    """A block's tokens, its choices and the weights of its expert; rows of padding have numbers past the end."""
    tokens, per_token = shape
    row = jnp.arange(rows, dtype=jnp.int32)
    choices = jax.lax.dynamic_slice(jnp.pad(blocks.order, (0, rows)), (blocks.first[number],), (rows,))
    is_choice = row < blocks.size[number]
    of_expert = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, blocks.expert[number], 0, False), weights)
    tokens_of = jnp.where(is_choice, choices // per_token, tokens + row)
    return tokens_of, jnp.where(is_choice, choices, tokens * per_token + row), of_expert


def _zeros(shape: tuple[int, ...], blocks: Blocks) -> Array:
    """A sum of nothing, allocated once the blocks are known: otherwise XLA allocates those of all layers at once."""
    return jax.lax.optimization_barrier((jnp.zeros(shape, jnp.float32), blocks.used))[0]


def _rows(x: Array, index: Int32[Array, "rows"]) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _add(out: Array, index: Int32[Array, "rows"], values: Array) -> Array:
    """Add rows; no row of a block has another one's index, since a token chooses an expert once."""
    return out.at[index].add(values, mode="drop", unique_indices=True)
