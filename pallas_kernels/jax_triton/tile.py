"""Shared by the kernels in Triton's own language: loads that end with the array, and a step of the softmax."""

from typing import no_type_check

import triton
import triton.language as tl

# Least rows and columns of a matrix product.
MIN_ROWS = 16


def width(head_dim: int) -> int:
    """Columns of a tile: Triton's have a power of two, at least 16."""
    return max(MIN_ROWS, triton.next_power_of_2(head_dim))


# Triton reads the functions themselves, which no check of annotations may wrap.


@triton.jit
@no_type_check
def load_rows(
    ptr,  # of the first row
    stride,  # numbers from a row to the next one
    exists,  # [M]
    is_whole: tl.constexpr,  # all rows exist
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
):
    """Some rows of a matrix, zero where they do not exist and beyond the head dim."""
    column = tl.arange(0, width)
    at = ptr + tl.arange(0, rows)[:, None] * stride + column[None, :]
    if is_whole and head_dim == width:
        return tl.load(at)
    if is_whole:
        return tl.load(at, mask=tl.broadcast_to((column < head_dim)[None, :], at.shape), other=0.0)
    return tl.load(at, mask=exists[:, None] & (column < head_dim)[None, :], other=0.0)


@triton.jit
@no_type_check
def store_rows(
    ptr,  # of the first row
    stride,  # numbers from a row to the next one
    values,  # [M, width]
    exists,  # [M]
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
):
    """Write the rows of a matrix that exist."""
    column = tl.arange(0, width)
    at = ptr + tl.arange(0, rows)[:, None] * stride + column[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=exists[:, None] & (column < head_dim)[None, :])


@triton.jit
@no_type_check
def place(
    row,  # of the batch
    first,  # token of the row, the first one of a tile
    pages_ptr,  # [n], of the row
    is_paged: tl.constexpr,
    tokens: tl.constexpr,  # of a slot of a row, or of a page
):
    """The row of a retrieval head's slot that has a token; see `pallas_kernels.pages`."""
    if is_paged:
        page = tl.maximum(tl.load(pages_ptr + first // tokens), 0)
        return page.to(tl.int64) * tokens + first % tokens
    return row.to(tl.int64) * tokens + first


@triton.jit
@no_type_check
def empty(rows: tl.constexpr, width: tl.constexpr, masked: tl.constexpr):
    """A softmax over no key yet: the weighted values, the maximum and the weights' sum."""
    return (
        tl.zeros((rows, width), tl.float32),
        tl.full((rows,), masked, tl.float32),
        tl.zeros((rows,), tl.float32),
    )


@triton.jit
@no_type_check
def accumulate(
    values,  # [M, H]
    maximum,  # [M]
    total,  # [M], or [M, S]: summed in the end
    q,  # [M, H]
    k,  # [S, H]
    v,  # [S, H]
    keep,  # [M, S] or [1, S]
    is_masked: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """Add a tile of keys, to base two, as `pallas_kernels.merge.add`; `keep` are the keys that each query sees."""
    # "tf32x3": float32 is not rounded to TF32, but split into two such numbers.
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if is_masked:
        scores = tl.where(keep, scores, masked)
    newest = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - newest[:, None])
    decay = tl.exp2(maximum - newest)
    values = tl.dot(weights.to(v.dtype), v, values * decay[:, None], input_precision="tf32x3")
    total = total * decay + tl.sum(weights, axis=1) if len(total.shape) == 1 else total * decay[:, None] + weights
    return values, newest, total


@triton.jit
@no_type_check
def finish(values, maximum, total, ln_2: tl.constexpr):
    """The weighted mean of the values, zero without a key, and the natural logarithm of the sum of the weights."""
    total = tl.maximum(total, 1e-30)
    return values / total[:, None], (maximum + tl.log2(total)) * ln_2
