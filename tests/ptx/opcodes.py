"""The meaning of each form of an instruction: a table with a row for each. Knows no control flow.

An elementwise row computes on whole vectors, one number for each lane. The other rows get the batch, the instruction
and the lanes that execute it. To support another form, add its row, with the meaning from NVIDIA's manual "PTX ISA",
and its golden case in tests/test_ptx_golden.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.memory import Fault

S16, S32, S64 = np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64)
U16, U32, U64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
PRED = np.dtype(bool)
BITS = {16: U16, 32: U32, 64: U64}
WARP = 32


@dataclass(frozen=True)
class Elementwise:
    """A function of vectors: the type of its result, and of each operand."""

    function: Callable[..., np.ndarray]
    result: np.dtype
    sources: tuple[np.dtype, ...]

    def __call__(self, batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        target, *operands = instruction.operands
        if len(operands) != len(self.sources):
            raise Fault(f"takes {len(self.sources)} operands", int(np.argmax(lanes)))
        values = (batch.read(operand, dtype) for operand, dtype in zip(operands, self.sources, strict=True))
        batch.write(target, self.function(*values).astype(self.result, copy=False), lanes)


def row(function: Callable[..., np.ndarray], result: np.dtype, *sources: np.dtype) -> Elementwise:
    return Elementwise(function, result, sources)


def low_bits(batch: Any, operand: Any, dtype: np.dtype) -> np.ndarray:
    """An operand of `st` or `cvt`: its register may be wider than the instruction's type."""
    if isinstance(operand, int):
        return batch.read(operand, dtype)
    return batch.read(operand, batch.dtype(operand)).astype(BITS[8 * dtype.itemsize], copy=False).view(dtype)


@dataclass(frozen=True)
class Conversion(Elementwise):
    """A conversion; a result that is narrower than its register is extended, by its sign or by zeros."""

    def __call__(self, batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        target, *operands = instruction.operands
        values = (low_bits(batch, operand, dtype) for operand, dtype in zip(operands, self.sources, strict=True))
        result = self.function(*values).astype(self.result, copy=False)
        if result.dtype.itemsize < batch.dtype(target).itemsize:
            result = result.astype(S64 if result.dtype.kind == "i" else U64).astype(batch.dtype(target))
        batch.write(target, result, lanes)


def cvt(function: Callable[..., np.ndarray], result: np.dtype, *sources: np.dtype) -> Conversion:
    return Conversion(function, result, sources)


# Fragments of matrices (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k8"): row and column of number i
# of a lane, `[lane, i]`.


def _fragment(numbers: int, place: Callable[[Any, Any, Any], tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """`place` is a function of groupID, threadID_in_group and i."""
    lane, i = np.arange(WARP)[:, None], np.arange(numbers)[None, :]
    rows, columns = place(lane >> 2, lane % 4, i)
    return rows + 0 * (lane + i), columns + 0 * (lane + i)


# Two numbers of 16 bits in a register.
A_16 = _fragment(8, lambda group, thread, i: (group + 8 * (i // 2 % 2), 2 * thread + i % 2 + 8 * (i // 4)))
B_16 = _fragment(4, lambda group, thread, i: (2 * thread + i % 2 + 8 * (i // 2), group))
# TF32: one number in a register.
A_8 = _fragment(4, lambda group, thread, i: (group + 8 * (i % 2), thread + 4 * (i // 2)))
B_8 = _fragment(2, lambda group, thread, i: (thread + 4 * i, group))
# Sums of either.
C = _fragment(4, lambda group, thread, i: (group + 8 * (i // 2), 2 * thread + i % 2))


def _gather(fragment: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """For each place of a matrix, the index of its number among the numbers of all lanes."""
    order = np.full(shape, -1)
    order[fragment] = np.arange(fragment[0].size).reshape(fragment[0].shape)
    assert (order >= 0).all()
    return order


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Words of 16 bits as numbers."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def float16(x: np.ndarray) -> np.ndarray:
    """Words of 16 bits as numbers."""
    return x.view(np.float16).astype(np.float32)


def tf32(x: np.ndarray) -> np.ndarray:
    """Words of 32 bits as numbers: the hardware ignores the last 13 bits."""
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


class Mma:
    """`d = a @ b + c` in each warp; products are exact, sums are rounded in some order."""

    def __init__(self, a: Any, b: Any, depth: int, word: np.dtype, number: Callable[[np.ndarray], np.ndarray]) -> None:
        self.a, self.b = _gather(a, (16, depth)), _gather(b, (depth, 8))
        self.c, self.word, self.number = _gather(C, (16, 8)), word, number

    def __call__(self, batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        batch.need_whole_warps(lanes)
        target, *sources = instruction.operands
        a, b, c = (
            np.stack([batch.read(register, U32) for register in registers], -1).view(dtype).reshape(batch.warps, -1)
            for registers, dtype in zip(sources, (self.word, self.word, F32), strict=True)
        )
        a, b = self.number(a[:, self.a]), self.number(b[:, self.b])
        d = c[:, self.c] + np.matmul(a, b)
        spread = d[:, C[0], C[1]].reshape(-1, 4)
        for i, register in enumerate(target):
            batch.write(register, np.ascontiguousarray(spread[:, i]), lanes)


class LdMatrix:
    """Matrices of 8 x 8 numbers of 16 bits: lanes `8 i .. 8 i + 7` have the addresses of matrix i's rows."""

    def __init__(self, count: int, transposed: bool) -> None:
        self.count, self.transposed = count, transposed

    def __call__(self, batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        batch.need_whole_warps(lanes)
        target, address = instruction.operands
        at = np.flatnonzero(lanes & (np.arange(len(lanes)) % WARP < 8 * self.count))
        rows = np.zeros((len(lanes) // WARP, 8 * self.count, 8), np.uint16)
        rows[at // WARP, at % WARP] = batch.shared.load(batch.address(address)[at], at, 16)
        matrices = rows.reshape(-1, self.count, 8, 8)
        if self.transposed:
            matrices = matrices.swapaxes(2, 3)
        # Lane l gets numbers 2 (l % 4) and the next of row l // 4.
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, self.count, WARP)
        for i, register in enumerate(target):
            batch.write(register, np.ascontiguousarray(words[:, i]).reshape(-1), lanes)


def shuffle(place: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., None]:
    """Read another lane of the same warp, which `place` computes from the lane and the operand."""

    def execute(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        batch.need_whole_warps(lanes)
        target, source, operand, clamp, members = instruction.operands
        if (clamp, members) != (31, -1):
            raise Fault("is supported for whole warps only", int(np.argmax(lanes)))
        lane = np.arange(len(lanes))
        at = (lane & -WARP) | (place(lane % WARP, batch.read(operand, S32)) & (WARP - 1))
        batch.write(target, batch.read(source, U32)[at], lanes)

    return execute


def move(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """Copy a register, split one into several, or join several into one."""
    target, source = instruction.operands
    bits = int("".join(filter(str.isdigit, instruction.opcode))) if instruction.opcode != "mov.pred" else 1
    if isinstance(target, tuple):
        part = BITS[bits // len(target)]
        parts = batch.read(source, BITS[bits]).view(part).reshape(-1, len(target))
        for i, register in enumerate(target):
            if register != "_":
                batch.write(register, np.ascontiguousarray(parts[:, i]), lanes)
    elif isinstance(source, tuple):
        part = BITS[bits // len(source)]
        parts = np.stack([batch.read(register, part) for register in source], -1)
        batch.write(target, parts.view(BITS[bits]).reshape(-1), lanes)
    else:
        batch.write(target, batch.read(source, PRED if bits == 1 else BITS[bits]), lanes)


def _of(operand: Any) -> tuple[Any, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def load(space: str, bits: int, count: int) -> Callable[..., None]:
    """`count` numbers from consecutive places."""

    def execute(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        target, address = instruction.operands
        at, size = np.flatnonzero(lanes), count * bits // 8
        addresses = batch.address(address)[at]
        if space == "shared":
            words = batch.shared.load(addresses, at, size)
        else:
            words = batch.memory.load(addresses, at, size, batch.block[at])
        values = np.zeros((len(lanes), count), BITS[bits])
        values[at] = np.ascontiguousarray(words).view(BITS[bits])
        for i, register in enumerate(_of(target)):
            # A wider register is filled up with zeros.
            batch.write(register, values[:, i].astype(batch.dtype(register)), lanes)

    return execute


def load_signed(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """A number of 32 bits, whose sign fills up a wider register."""
    target, address = instruction.operands
    at = np.flatnonzero(lanes)
    words = batch.memory.load(batch.address(address)[at], at, 4, batch.block[at])
    values = np.zeros(len(lanes), np.int32)
    values[at] = np.ascontiguousarray(words).view(np.int32).reshape(-1)
    batch.write(target, values.astype(batch.dtype(target).str.replace("u", "i")), lanes)


def store(space: str, bits: int, count: int) -> Callable[..., None]:
    """`count` numbers to consecutive places."""

    def execute(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
        address, source = instruction.operands
        at = np.flatnonzero(lanes)
        values = np.stack([low_bits(batch, register, BITS[bits])[at] for register in _of(source)], -1)
        addresses = batch.address(address)[at]
        if space == "shared":
            batch.shared.store(addresses, at, values.view(np.uint16))
        else:
            batch.memory.store(addresses, at, values.view(np.uint16), batch.block[at])

    return execute


def load_parameter(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """The address of an array."""
    target, address = instruction.operands
    batch.write(target, batch.full(batch.parameters[address.base], U64), lanes)


def copy(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """An asynchronous copy from global to shared memory, of zeros where the size is zero or the source ignored."""
    target, source, width, *optional = instruction.operands
    at = np.flatnonzero(lanes)
    copies = np.ones(len(at), bool)
    if optional and batch.is_condition(optional[0]):
        copies = ~batch.read(optional[0], PRED)[at]
    elif optional:
        sizes = batch.read(optional[0], U32)[at]
        copies = sizes == width
        if not (copies | (sizes == 0)).all():
            raise Fault(f"copies a part of {width} bytes: only all or none is supported", batch.first_active())
    values, some = np.zeros((len(at), width // 2), np.uint16), at[copies]
    values[copies] = batch.memory.load(batch.address(source)[some], some, width, batch.block[some])
    batch.shared.copy(batch.address(target)[at], at, values)


def commit(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """End of a group of copies."""
    batch.shared.commit(np.flatnonzero(lanes))


def wait_group(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """Until all groups but the newest have landed."""
    batch.shared.wait(np.flatnonzero(lanes), instruction.operands[0])


def warp_barrier(batch: Any, instruction: Any, lanes: np.ndarray) -> None:
    """A barrier among the lanes of each warp."""
    batch.need_whole_warps(lanes)
    if batch.read(instruction.operands[0], S32)[0] != -1:
        raise Fault("is supported for whole warps only", int(np.argmax(lanes)))
    batch.shared.warp_barrier(np.flatnonzero(lanes))


# Integers.


def _amount(shift: np.ndarray, bits: int) -> np.ndarray:
    """A shift, at most `bits`: larger ones have the same result."""
    return np.minimum(shift, np.uint32(bits)).astype(np.int64)


def shift_left(bits: int) -> Callable[..., np.ndarray]:
    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = _amount(by, bits)
        moved = x.astype(np.uint64) << np.minimum(by, 63).astype(np.uint64)
        return np.where(by >= bits, np.uint64(0), moved).astype(BITS[bits])

    return shift


def shift_right(bits: int, signed: bool) -> Callable[..., np.ndarray]:
    wide = np.int64 if signed else np.uint64

    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = _amount(by, bits)
        moved = x.astype(wide) >> np.minimum(by, 63).astype(wide)
        return moved if signed else np.where(by >= bits, wide(0), moved)

    return shift


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    quotient = x.astype(np.int64) // np.where(y == 0, 1, y).astype(np.int64)
    exact = quotient * y == x
    return quotient + ((quotient < 0) & ~exact)


def remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """With the sign of the dividend."""
    return np.fmod(x.astype(np.int64), np.where(y == 0, 1, y).astype(np.int64))


def bit_field(signed: bool) -> Callable[..., np.ndarray]:
    """`length` bits from bit `start` on, extended by their sign or by zeros."""

    def extract(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(n & 0xFF, 32).astype(np.int64) for n in (start, length))
        bits = (x.astype(np.int64) >> start) & ((np.int64(1) << length) - 1)
        if not signed:
            return bits
        top = np.clip(start + length - 1, 0, 31)
        negative = (((x.astype(np.int64) & 0xFFFFFFFF) >> top) & 1).astype(bool) & (length > 0)
        return np.where(negative, bits | -(np.int64(1) << length), bits)

    return extract


def long_bit_field(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits of 64 from bit `start` on, extended by their sign."""
    start, length = (np.minimum(n & 0xFF, 64).astype(np.int64) for n in (start, length))
    above = 64 - np.minimum(start + length, 64)
    bits = (x << np.minimum(above, 63)) >> np.minimum(above + start, 63)
    return np.where(length > 0, bits, 0)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Any four of the eight bytes of two words; the fourth bit of a selector replicates the byte's sign."""
    pair = np.stack([a, b], -1).view(np.uint8)
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pair, (nibble & 7).astype(np.int64)[:, None], 1)[:, 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0)), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits, by its table."""
    result = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where((table >> np.uint32(i)) & np.uint32(1), term, np.uint32(0))
    return result


# Numbers.


def _to_odd(nearest: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Numbers that are `error` below the exact ones, rounded to odd instead: inexact ones have the last bit set.

    Rounding those once more, to at least two bits less, is as rounding the exact numbers once (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums").
    """
    bits = nearest.view(np.int64 if nearest.dtype == F64 else np.int32)
    is_even = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (nearest > 0)
    step = np.where(away, 1, -1).astype(bits.dtype)
    return np.where(is_even, bits + step, bits).view(nearest.dtype)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`x y + z` of float32 numbers in float64, rounded to odd. The product is exact, the sum may not be."""
    product, z = x.astype(F64) * y, z.astype(F64)
    total = product + z
    part = total - product
    return _to_odd(total, (product - (total - part)) + (z - part))


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Rounded once, to the nearest."""
    return _fma(x, y, z).astype(F32)


def fma_down(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Rounded once, towards minus infinity."""
    exact = _fma(x, y, z)
    nearest = exact.astype(F32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def fma_of_pairs(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Of the two bfloat16 numbers in each word, rounded once."""
    results = []
    for half in (_upper, _lower):
        exact = _fma(*(bfloat16(half(word)) for word in (x, y, z)))
        nearest = exact.astype(F32)
        results.append(_to_odd(nearest, exact - nearest))
    return pair_of(_to_bfloat16)(*results)


def _upper(word: np.ndarray) -> np.ndarray:
    return (word >> np.uint32(16)).astype(np.uint16)


def _lower(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint16)


def saturate(x: np.ndarray) -> np.ndarray:
    """Between 0 and 1, where NaN is 0."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def of_bfloat16(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function of numbers that are bfloat16."""
    return lambda *x: _to_bfloat16(function(*map(bfloat16, x)))


def _to_int32(x: np.ndarray) -> np.ndarray:
    """Towards zero; beyond the range, the nearest integer in it, and 0 for NaN."""
    wide = np.trunc(np.nan_to_num(x, nan=0.0, posinf=2.0**31, neginf=-(2.0**31)).astype(np.float64))
    return np.clip(wide, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _to_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def pair_of(narrow: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Two numbers in a word, the first in its upper half."""
    return lambda high, low: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def flushed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Subnormal numbers are zero."""

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    return lambda *x: flush(function(*map(flush, x)))


def _select(x: np.ndarray, y: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.where(condition, x, y)


def _and_then(compare: Callable[..., np.ndarray], combine: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A comparison, combined with a third operand."""
    return lambda x, y, condition: combine(compare(x, y), condition)


def _wide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    return x.astype(wide) * y.astype(wide)


def _mad(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return x * y + z


def _mad_wide(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _wide(x, y) + z


def _high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide = _wide(x, y)
    return wide >> wide.dtype.type(8 * x.itemsize)


def _same(x: np.ndarray) -> np.ndarray:
    return x


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
# True if a number is NaN.
UNORDERED = {
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
ORDERED = COMPARE | {"ne": lambda x, y: (x < y) | (x > y)}
INTEGERS = {"s32": S32, "u32": U32, "s64": S64, "u64": U64, "s16": S16, "u16": U16}
WORDS = {"b16": U16, "b32": U32, "b64": U64}

TABLE: dict[str, Callable[..., None]] = {
    # Integers.
    **{f"add.{name}": row(np.add, t, t, t) for name, t in INTEGERS.items()},
    **{f"sub.{name}": row(np.subtract, t, t, t) for name, t in INTEGERS.items()},
    **{f"mul.lo.{name}": row(np.multiply, t, t, t) for name, t in INTEGERS.items()},
    **{f"mad.lo.{name}": row(_mad, t, t, t, t) for name, t in INTEGERS.items()},
    **{f"min.{name}": row(np.minimum, t, t, t) for name, t in INTEGERS.items()},
    **{f"max.{name}": row(np.maximum, t, t, t) for name, t in INTEGERS.items()},
    "mul.wide.s16": row(_wide, S32, S16, S16),
    "mul.wide.u16": row(_wide, U32, U16, U16),
    "mul.wide.s32": row(_wide, S64, S32, S32),
    "mul.wide.u32": row(_wide, U64, U32, U32),
    "mad.wide.s32": row(_mad_wide, S64, S32, S32, S64),
    "mad.wide.u32": row(_mad_wide, U64, U32, U32, U64),
    "mul.hi.s16": row(_high, S16, S16, S16),
    "mul.hi.u16": row(_high, U16, U16, U16),
    "mul.hi.s32": row(_high, S32, S32, S32),
    "mul.hi.u32": row(_high, U32, U32, U32),
    "div.s32": row(divide, S32, S32, S32),
    "div.u32": row(divide, U32, U32, U32),
    "rem.s32": row(remainder, S32, S32, S32),
    "rem.u32": row(remainder, U32, U32, U32),
    "neg.s32": row(np.negative, S32, S32),
    "neg.s64": row(np.negative, S64, S64),
    "abs.s32": row(np.abs, S32, S32),
    # Bits.
    **{f"and.{name}": row(np.bitwise_and, t, t, t) for name, t in WORDS.items()},
    **{f"or.{name}": row(np.bitwise_or, t, t, t) for name, t in WORDS.items()},
    **{f"xor.{name}": row(np.bitwise_xor, t, t, t) for name, t in WORDS.items()},
    **{f"not.{name}": row(np.invert, t, t) for name, t in WORDS.items()},
    **{f"shl.{name}": row(shift_left(8 * t.itemsize), t, t, U32) for name, t in WORDS.items()},
    **{f"shr.{name}": row(shift_right(8 * t.itemsize, name[0] == "s"), t, t, U32) for name, t in INTEGERS.items()},
    "bfe.s32": row(bit_field(True), S32, S32, U32, U32),
    "bfe.u32": row(bit_field(False), U32, U32, U32, U32),
    "bfe.s64": row(long_bit_field, S64, S64, U32, U32),
    "popc.b32": row(np.bitwise_count, U32, U32),
    "prmt.b32": row(permute, U32, U32, U32, U32),
    "lop3.b32": row(lookup, U32, U32, U32, U32, U32),
    # Conditions.
    "and.pred": row(np.logical_and, PRED, PRED, PRED),
    "or.pred": row(np.logical_or, PRED, PRED, PRED),
    "xor.pred": row(np.logical_xor, PRED, PRED, PRED),
    "not.pred": row(np.logical_not, PRED, PRED),
    **{f"setp.{c}.{n}": row(f, PRED, t, t) for c, f in COMPARE.items() for n, t in INTEGERS.items()},
    **{
        f"setp.{c}.{name}.{n}": row(_and_then(f, combine), PRED, t, t, PRED)
        for name, combine in (("and", np.logical_and), ("or", np.logical_or))
        for c, f in COMPARE.items()
        for n, t in INTEGERS.items()
    },
    **{f"setp.{c}.{n}": row(COMPARE[c], PRED, t, t) for c in ("eq", "ne") for n, t in WORDS.items()},
    **{f"setp.{c}.f32": row(f, PRED, F32, F32) for c, f in (ORDERED | UNORDERED).items()},
    **{f"selp.{name}": row(_select, t, t, t, PRED) for name, t in (INTEGERS | WORDS | {"f32": F32}).items()},
    # Numbers.
    "add.rn.f32": row(np.add, F32, F32, F32),
    "add.f32": row(np.add, F32, F32, F32),
    "sub.rn.f32": row(np.subtract, F32, F32, F32),
    "sub.f32": row(np.subtract, F32, F32, F32),
    "mul.rn.f32": row(np.multiply, F32, F32, F32),
    "mul.f32": row(np.multiply, F32, F32, F32),
    "fma.rn.f32": row(fma, F32, F32, F32, F32),
    "fma.rm.f32": row(fma_down, F32, F32, F32, F32),
    "fma.rn.bf16x2": row(fma_of_pairs, U32, U32, U32, U32),
    "fma.rn.ftz.f32": row(flushed(fma), F32, F32, F32, F32),
    "div.full.f32": row(np.divide, F32, F32, F32),
    "div.rn.f32": row(np.divide, F32, F32, F32),
    "max.f32": row(np.fmax, F32, F32, F32),
    "min.f32": row(np.fmin, F32, F32, F32),
    "max.bf16": row(of_bfloat16(np.fmax), U16, U16, U16),
    "min.bf16": row(of_bfloat16(np.fmin), U16, U16, U16),
    "max.NaN.f32": row(np.maximum, F32, F32, F32),
    "min.NaN.f32": row(np.minimum, F32, F32, F32),
    "neg.f32": row(np.negative, F32, F32),
    "abs.f32": row(np.abs, F32, F32),
    "ex2.approx.f32": row(np.exp2, F32, F32),
    "ex2.approx.ftz.f32": row(flushed(np.exp2), F32, F32),
    "lg2.approx.f32": row(np.log2, F32, F32),
    "lg2.approx.ftz.f32": row(flushed(np.log2), F32, F32),
    # Conversions.
    "cvta.to.global.u64": row(_same, U64, U64),
    "cvt.u64.u32": cvt(_same, U64, U32),
    "cvt.s64.s32": cvt(_same, S64, S32),
    "cvt.u32.u64": cvt(_same, U32, U64),
    "cvt.s32.s16": cvt(_same, S32, S16),
    "cvt.u32.u16": cvt(_same, U32, U16),
    "cvt.u16.u32": cvt(_same, U16, U32),
    "cvt.rn.f32.s32": cvt(_same, F32, S32),
    "cvt.rn.f32.u32": cvt(_same, F32, U32),
    "cvt.rn.f32.s16": cvt(_same, F32, S16),
    "cvt.rn.f32.u16": cvt(_same, F32, U16),
    "cvt.rni.f32.f32": cvt(np.rint, F32, F32),
    "cvt.rmi.f32.f32": cvt(np.floor, F32, F32),
    "cvt.rzi.s32.f32": cvt(_to_int32, S32, F32),
    "cvt.sat.f32.f32": cvt(saturate, F32, F32),
    "cvt.f32.bf16": cvt(bfloat16, F32, U16),
    "cvt.f32.f16": cvt(float16, F32, U16),
    "cvt.rn.bf16.f32": cvt(_to_bfloat16, U16, F32),
    "cvt.rn.f16.f32": cvt(_to_float16, U16, F32),
    "cvt.rn.bf16x2.f32": cvt(pair_of(_to_bfloat16), U32, F32, F32),
    "cvt.rn.f16x2.f32": cvt(pair_of(_to_float16), U32, F32, F32),
    "cvt.rna.tf32.f32": cvt(round_to_tf32, U32, F32),
    # Moves.
    **{f"mov.{name}": move for name in ("pred", "b16", "b32", "b64", "u16", "u32", "u64", "f32")},
    "ld.param.b64": load_parameter,
    "ld.param::entry.b64": load_parameter,
    "ld.global.s32": load_signed,
    # Without a space, an address of global memory is the same; none of shared memory is expected.
    **{f"{verb}.b32": access("global", 32, 1) for verb, access in (("ld", load), ("st", store))},
    **{f"{verb}.v2.b32": access("global", 32, 2) for verb, access in (("ld", load), ("st", store))},
    **{
        f"{verb}.{space}{f'.v{count}' if count > 1 else ''}.b{bits}": access(space, bits, count)
        for verb, access in (("ld", load), ("st", store))
        for space in ("global", "shared")
        for count in (1, 2, 4)
        for bits in BITS
        if count * bits <= 128
    },
    # Within a warp.
    "shfl.sync.bfly.b32": shuffle(np.bitwise_xor),
    "shfl.sync.idx.b32": shuffle(lambda lane, source: source),
    "bar.warp.sync": warp_barrier,
    **{
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}.shared.b16": LdMatrix(count, trans)
        for count in (1, 2, 4)
        for trans in (False, True)
    },
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": Mma(A_16, B_16, 16, U16, bfloat16),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": Mma(A_16, B_16, 16, U16, float16),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": Mma(A_8, B_8, 8, U32, tf32),
    # Copies.
    "cp.async.cg.shared.global": copy,
    "cp.async.ca.shared.global": copy,
    "cp.async.commit_group": commit,
    "cp.async.wait_group": wait_group,
}
