"""Products with quantized keys and values as they are packed: `pallas_kernels.triton.packed`, in Triton's own language.

A word of 16 bits has four planes of four bits. A number of 4 bits is one of them; a number of 8 bits is two, the second
one times 16. A key has four groups of channels, a value has one.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.jax_triton.tile import load_rows, place
from pallas_kernels.quantized import FINE, KEY_GROUPS

# Columns of a product with a plane of values: of less than 32, every warp would compute all.
MIN_COLUMNS = 32
GROUPS = tl.constexpr(KEY_GROUPS)
STEP = tl.constexpr(1 / FINE)
# `quantized.scale_and_shifted` adds it to an offset; in units of the scale.
SHIFTED_BY = tl.constexpr((2.0**23 + 2.0**15) / FINE)
# The interpreter has no assembly.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
@no_type_check
def exponent_of(dtype):
    """Bits of the number `base_of` in a data type of 16 bits; its mantissa has room for four bits."""
    return 0x4300 if dtype == tl.bfloat16 else 0x6400


@triton.constexpr_function
@no_type_check
def base_of(dtype):
    """What `integers` adds to each integer: products are too large by it times a sum over the other factor."""
    return 0.0 if dtype == tl.float32 else 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.constexpr_function
@no_type_check
def assembly_of(plane, exponent):
    """PTX for two words at a time: `((words >> 4 * plane) & 0xF) | exponent`."""
    shift = f"shr.u32 $0, $1, {4 * plane}; " if plane else "mov.b32 $0, $1; "
    return f"{shift}lop3.b32 $0, $0, 0xF000F, {exponent * 0x10001:#x}, 0xEA;"


@triton.jit
@no_type_check
def integers(words, plane: tl.constexpr, like):
    """The integers of a plane in the data type of `like`, each greater by `base_of` that."""
    exponent: tl.constexpr = exponent_of(like.dtype)
    if like.dtype == tl.float32:
        return ((words >> (4 * plane)) & 0xF).to(tl.float32)
    if IS_INTERPRETED:
        return (((words >> (4 * plane)) & 0xF) | exponent).to(like.dtype, bitcast=True)
    return tl.inline_asm_elementwise(
        assembly_of(plane, exponent), "=r,r", [words], dtype=like.dtype, is_pure=True, pack=2
    )


@triton.jit
@no_type_check
def load_grid(
    ptr,  # of the first row
    exists,  # [S]
    is_whole: tl.constexpr,
    group: tl.constexpr,
    groups: tl.constexpr,
    excess: tl.constexpr,
    block_k: tl.constexpr,
):
    """Scale of a group of some rows, `[S]`, and its offset in units of the scale less `excess`."""
    at = ptr + tl.arange(0, block_k) * groups + group
    grid = tl.load(at) if is_whole else tl.load(at, mask=exists, other=0)
    scale = (grid & 0xFFFF0000).to(tl.float32, bitcast=True)
    shifted = ((grid & 0xFFFF) ^ 0x4B008000).to(tl.float32, bitcast=True)
    return scale, shifted * STEP - (SHIFTED_BY + excess)


@triton.jit
@no_type_check
def group_product(words, q, q_sums, group: tl.constexpr, part: tl.constexpr, bits: tl.constexpr):
    """Products `[M, S]` of a group's channels and a part of some words, and the sums of these channels."""
    plane: tl.constexpr = part * (bits // 4)
    found = tl.dot(q[group], tl.trans(integers(words, plane, q[group])), input_precision="tf32x3")
    if bits == 8:
        high = tl.dot(q[group], tl.trans(integers(words, plane + 1, q[group])), input_precision="tf32x3")
        found += high * 16.0
    return found, q_sums[group]


@triton.jit
@no_type_check
def scores_of(
    q,  # four parts [M, size]
    q_sums,  # [M] of each
    k_ptr,  # words of the first row
    grid_ptr,
    exists,  # [S]
    is_whole: tl.constexpr,
    bits: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    block_k: tl.constexpr,
    excess: tl.constexpr,
):
    """Scores `[M, S]` of some rows of keys; a group's scale and offset are applied to its part of them."""
    parts: tl.constexpr = 16 // bits
    slices: tl.constexpr = GROUPS // parts
    words_of_row: tl.constexpr = head_dim // parts
    size: tl.constexpr = head_dim // GROUPS
    scores = tl.zeros((rows, block_k), tl.float32)
    for piece in tl.static_range(slices):
        words = load_rows(k_ptr + piece * size, words_of_row, exists, is_whole, block_k, size, q[0].shape[1])
        for part in tl.static_range(parts):
            found, group_sums = group_product(words, q, q_sums, part * slices + piece, part, bits)
            # A group is a part of the words of a slice.
            scale, offset = load_grid(grid_ptr, exists, is_whole, part * slices + piece, GROUPS, excess, block_k)
            scores += found * scale[None, :]
            scores += (scale * offset)[None, :] * group_sums[:, None]
    return scores


@triton.jit
@no_type_check
def add_tile(
    state,  # sums of each plane [M, W], their offsets [M, S], the maximum [M], the weights' sum [M, S]
    q,
    q_sums,
    first,  # token of the row
    end,
    k_ptr,  # words of the slot
    v_ptr,
    k_grid_ptr,
    v_grid_ptr,
    row,  # of the batch
    pages_ptr,
    is_whole: tl.constexpr,
    is_paged: tl.constexpr,
    tokens: tl.constexpr,
    bits: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    block_k: tl.constexpr,
    columns: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """Add a tile of keys; sums over its keys are made in the end, since each warp has other keys."""
    one, two, three, four, offsets, maximum, total = state
    words_of_row: tl.constexpr = head_dim * bits // 16
    excess: tl.constexpr = base_of(q[0].dtype) * (17 if bits == 8 else 1)
    exists = first + tl.arange(0, block_k) < end
    at = place(row, first, pages_ptr, is_paged, tokens)
    scores = scores_of(
        q, q_sums, k_ptr + at * words_of_row, k_grid_ptr + at * GROUPS, exists, is_whole, bits, rows, head_dim, block_k,
        excess,
    )  # fmt: skip
    if not is_whole:
        scores = tl.where(exists[None, :], scores, masked)
    newest = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - newest[:, None])
    decay = tl.exp2(maximum - newest)[:, None]
    v_scale, v_offset = load_grid(v_grid_ptr + at, exists, is_whole, 0, 1, excess, block_k)
    narrow = (weights * v_scale[None, :]).to(q[0].dtype)
    # Of the rounded weights: the integers' base is multiplied with those.
    offsets = offsets * decay + narrow.to(tl.float32) * v_offset[None, :]
    words = load_rows(v_ptr + at * words_of_row, words_of_row, exists, is_whole, block_k, words_of_row, columns)
    one = tl.dot(narrow, integers(words, 0, narrow), one * decay, input_precision="tf32x3")
    two = tl.dot(narrow, integers(words, 1, narrow), two * decay, input_precision="tf32x3")
    three = tl.dot(narrow, integers(words, 2, narrow), three * decay, input_precision="tf32x3")
    four = tl.dot(narrow, integers(words, 3, narrow), four * decay, input_precision="tf32x3")
    return one, two, three, four, offsets, newest, total * decay + weights


@triton.jit
@no_type_check
def over_packed(
    q_ptr,  # [G, H]
    k_ptr,  # words of the slot
    v_ptr,
    k_grid_ptr,
    v_grid_ptr,
    row,  # of the batch
    begin,
    end,
    pages_ptr,  # [n], of the row
    is_paged: tl.constexpr,
    tokens: tl.constexpr,  # of a slot of a row, or of a page
    group: tl.constexpr,
    bits: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    block_k: tl.constexpr,
    columns: tl.constexpr,
    part_width: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """Sums of the packed values of the keys from `begin` to `end`: those of each part of the words, and the softmax."""
    size: tl.constexpr = head_dim // GROUPS
    in_group = tl.arange(0, rows) < group
    q0 = load_rows(q_ptr, head_dim, in_group, False, rows, size, part_width)
    q1 = load_rows(q_ptr + size, head_dim, in_group, False, rows, size, part_width)
    q2 = load_rows(q_ptr + 2 * size, head_dim, in_group, False, rows, size, part_width)
    q3 = load_rows(q_ptr + 3 * size, head_dim, in_group, False, rows, size, part_width)
    q = q0, q1, q2, q3
    q_sums = (
        tl.sum(q0.to(tl.float32), axis=1),
        tl.sum(q1.to(tl.float32), axis=1),
        tl.sum(q2.to(tl.float32), axis=1),
        tl.sum(q3.to(tl.float32), axis=1),
    )
    none = tl.zeros((rows, columns), tl.float32)
    zeros = tl.zeros((rows, block_k), tl.float32)
    state = none, none, none, none, zeros, tl.full((rows,), masked, tl.float32), zeros
    whole = begin + tl.maximum(end - begin, 0) // block_k * block_k
    if whole < end:  # The last tile is not whole.
        state = add_tile(
            state, q, q_sums, whole, end, k_ptr, v_ptr, k_grid_ptr, v_grid_ptr, row, pages_ptr, False, is_paged, tokens,
            bits, rows, head_dim, block_k, columns, scale, masked,
        )  # fmt: skip
    for first in range(begin, whole, block_k):
        state = add_tile(
            state, q, q_sums, first, end, k_ptr, v_ptr, k_grid_ptr, v_grid_ptr, row, pages_ptr, True, is_paged, tokens,
            bits, rows, head_dim, block_k, columns, scale, masked,
        )  # fmt: skip
    one, two, three, four, offsets, maximum, total = state
    offset = tl.sum(offsets, axis=1)[:, None]
    if bits == 8:
        parts = (one + two * 16.0 + offset, three + four * 16.0 + offset)
    else:
        parts = (one + offset, two + offset, three + offset, four + offset)
    return parts, maximum, tl.sum(total, axis=1)
