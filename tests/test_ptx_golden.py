"""What each row of the executor's table computes, against NVIDIA's manual "PTX ISA"; every row has a case here."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from tests.ptx import opcodes
from tests.ptx.machine import Failure, run
from tests.ptx.parse import parse
from tests.test_ptx import F32, PRODUCT, WARP_BARRIER, execute, kernel

# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "for mma.m16n8k8": in some rows of each
# figure, lane.number of each place.
FIGURES = {
    "A_16": {
        0: "0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1 0.4 0.5 1.4 1.5 2.4 2.5 3.4 3.5",
        1: "4.0 4.1 5.0 5.1 6.0 6.1 7.0 7.1 4.4 4.5 5.4 5.5 6.4 6.5 7.4 7.5",
        8: "0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3 0.6 0.7 1.6 1.7 2.6 2.7 3.6 3.7",
        15: "28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3 28.6 28.7 29.6 29.7 30.6 30.7 31.6 31.7",
    },
    "B_16": {
        0: "0.0 4.0 8.0 12.0 16.0 20.0 24.0 28.0",
        1: "0.1 4.1 8.1 12.1 16.1 20.1 24.1 28.1",
        2: "1.0 5.0 9.0 13.0 17.0 21.0 25.0 29.0",
        8: "0.2 4.2 8.2 12.2 16.2 20.2 24.2 28.2",
        15: "3.3 7.3 11.3 15.3 19.3 23.3 27.3 31.3",
    },
    "A_8": {
        0: "0.0 1.0 2.0 3.0 0.2 1.2 2.2 3.2",
        7: "28.0 29.0 30.0 31.0 28.2 29.2 30.2 31.2",
        8: "0.1 1.1 2.1 3.1 0.3 1.3 2.3 3.3",
        15: "28.1 29.1 30.1 31.1 28.3 29.3 30.3 31.3",
    },
    "B_8": {
        0: "0.0 4.0 8.0 12.0 16.0 20.0 24.0 28.0",
        3: "3.0 7.0 11.0 15.0 19.0 23.0 27.0 31.0",
        4: "0.1 4.1 8.1 12.1 16.1 20.1 24.1 28.1",
        7: "3.1 7.1 11.1 15.1 19.1 23.1 27.1 31.1",
    },
    "C": {
        0: "0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1",
        7: "28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1",
        8: "0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3",
        15: "28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3",
    },
}


@pytest.mark.parametrize("name", FIGURES)
def test_fragments_match_the_manual(name):
    rows, columns = getattr(opcodes, name)
    for row, places in FIGURES[name].items():
        for column, place in enumerate(places.split()):
            lane, number = map(int, place.split("."))
            assert (rows[lane, number], columns[lane, number]) == (row, column)


# Golden cases: the value that a program leaves in %rs9, %r9 or %rd9, from the manual's description of its instructions.
GOLDEN = {
    "mul.wide.s16 %r9, -7, 3;": -21,
    "mul.wide.u16 %r9, -1, 2;": 0x1FFFE,
    "mul.wide.s32 %rd9, -7, 3;": -21,
    "mul.wide.u32 %rd9, -1, 2;": 0x1FFFFFFFE,
    "mad.wide.s32 %rd9, -7, 3, 1;": -20,
    "mad.wide.u32 %rd9, -1, 2, 3;": 0x200000001,
    "mul.hi.s16 %rs9, -1, 2;": -1,
    "mul.hi.u16 %rs9, -1, -1;": 0xFFFE,
    "mul.hi.s32 %r9, -1, 2;": -1,
    "mul.hi.u32 %r9, -1, -1;": 0xFFFFFFFE,
    "div.s32 %r9, -7, 2;": -3,
    "div.u32 %r9, -7, 2;": 0x7FFFFFFC,
    "rem.s32 %r9, -7, 2;": -1,
    "rem.u32 %r9, -7, 10;": 9,
    "neg.s32 %r9, 7;": -7,
    "neg.s64 %rd9, 7;": -7,
    "abs.s32 %r9, -7;": 7,
    "shl.b16 %rs9, 0x4001, 1;": 0x8002,
    "shl.b16 %rs9, 1, 16;": 0,
    "shl.b32 %r9, 0x40000001, 1;": 0x80000002,
    "shl.b32 %r9, 1, 32;": 0,
    "shl.b64 %rd9, 1, 63;": 1 << 63,
    "shl.b64 %rd9, 1, 64;": 0,
    "shr.s16 %rs9, -8, 1;": -4,
    "shr.s16 %rs9, -8, 99;": -1,
    "shr.u16 %rs9, -8, 1;": 0x7FFC,
    "shr.u16 %rs9, -8, 16;": 0,
    "shr.s32 %r9, -8, 1;": -4,
    "shr.s32 %r9, -8, 99;": -1,
    "shr.u32 %r9, -8, 28;": 15,
    "shr.u32 %r9, -8, 32;": 0,
    "shr.s64 %rd9, -8, 1;": -4,
    "shr.s64 %rd9, -8, 99;": -1,
    "shr.u64 %rd9, -8, 60;": 15,
    "shr.u64 %rd9, -8, 64;": 0,
    "bfe.s32 %r9, 0x80, 4, 4;": -8,
    "bfe.s32 %r9, -16, 0, 32;": -16,
    "bfe.u32 %r9, 0x80, 4, 4;": 8,
    "bfe.s64 %rd9, 0x800, 8, 4;": -8,
    "bfe.s64 %rd9, -16, 0, 64;": -16,
    "bfe.s64 %rd9, -16, 62, 9;": -1,
    "bfe.s64 %rd9, -1, 3, 0;": 0,
    "popc.b32 %r9, -2;": 31,
    "prmt.b32 %r9, 0x03020100, 0x07060584, 0xC174;": 0xFF010784,
    "lop3.b32 %r9, 12, 10, 6, 0xCA;": (12 & 10) | (~12 & 6),
    "setp.lt.u32 %p1, -1, 1; not.pred %p2, %p1; selp.b32 %r9, 1, 0, %p2;": 1,
    "setp.eq.b32 %p1, 1, 1; setp.eq.b32 %p2, 1, 2; and.pred %p3, %p1, %p2; selp.b32 %r9, 1, 0, %p3;": 0,
    "setp.eq.b32 %p1, 1, 1; setp.eq.b32 %p2, 1, 2; or.pred %p3, %p1, %p2; selp.b32 %r9, 1, 0, %p3;": 1,
    "setp.eq.b32 %p1, 1, 1; setp.eq.b32 %p2, 1, 1; xor.pred %p3, %p1, %p2; selp.b32 %r9, 1, 0, %p3;": 0,
    "mov.pred %p1, 1; selp.b32 %r9, 5, 6, %p1;": 5,
    "mov.b16 %rs9, 0x8001;": 0x8001,
    "mov.u16 %rs9, 0x8001;": 0x8001,
    "mov.b32 %r9, 0x80000001;": 0x80000001,
    "mov.u32 %r9, 0x80000001;": 0x80000001,
    "mov.f32 %r9, 0f3F800000;": 0x3F800000,
    "mov.b64 %rd9, 0x8000000000000001;": 0x8000000000000001,
    "mov.u64 %rd9, 0x8000000000000001;": 0x8000000000000001,
    "mov.b32 {%rs1, %rs2}, 0x20001; mov.b32 %r9, {%rs2, %rs1};": 0x10002,
    "mov.b64 {%r2, %r3}, 0x200000001; mov.b64 %rd9, {%r3, %r2};": 0x100000002,
    "mov.b32 {%rs1, _}, 0x8001; cvt.s32.s16 %r9, %rs1;": -0x7FFF,
    "mov.b32 {%rs1, _}, 0x8001; cvt.u32.u16 %r9, %rs1;": 0x8001,
    # Numbers. fma rounds once: 24929 * 673 = 2 ** 24 + 1 is halfway between two numbers.
    "add.f32 %r9, 0f3F800000, 0f33800000;": 0x3F800000,  # 1 + 2 ** -24: ties to even
    "add.rn.f32 %r9, 0f3F800001, 0f33800000;": 0x3F800002,  # the same, from an odd number
    "sub.f32 %r9, 0f3F800000, 0f40000000;": 0xBF800000,
    "sub.rn.f32 %r9, 0f3F800000, 0f40000000;": 0xBF800000,
    "mul.f32 %r9, 0f3F800001, 0f3F800001;": 0x3F800002,
    "mul.rn.f32 %r9, 0f3F800001, 0f3F800001;": 0x3F800002,
    "div.full.f32 %r9, 0f3F800000, 0f40400000;": 0x3EAAAAAB,
    "div.rn.f32 %r9, 0f3F800000, 0f40400000;": 0x3EAAAAAB,
    "fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002;": 0x28800000,  # 2 ** -46: the product is exact
    "fma.rn.f32 %r9, 0f46C2C200, 0f44284000, 0f00000000;": 0x4B800000,  # ties to even, 2 ** 24
    "fma.rn.f32 %r9, 0f46C2C200, 0f44284000, 0f2B800000;": 0x4B800001,  # 2 ** -40 above: 2 ** 24 + 2
    "fma.rn.f32 %r9, 0f46C2C200, 0f44284000, 0fAB800000;": 0x4B800000,  # 2 ** -40 below
    "fma.rn.f32 %r9, 0fC6C2C200, 0f44284000, 0fAB800000;": 0xCB800001,  # and negative
    "fma.rn.f32 %r9, 0f7F7FFFFF, 0f40000000, 0f00000000;": 0x7F800000,  # overflow
    "fma.rm.f32 %r9, 0f46C2C200, 0f44284000, 0f2B800000;": 0x4B800000,
    "fma.rm.f32 %r9, 0f3F800000, 0f3F800000, 0f80000001;": 0x3F7FFFFF,  # just below 1
    "fma.rm.f32 %r9, 0fBF800000, 0f3F800000, 0f80000001;": 0xBF800001,
    "fma.rn.ftz.f32 %r9, 0f00000001, 0f3F800000, 0f00000000;": 0,
    "fma.rn.ftz.f32 %r9, 0f3F800000, 0f3F800000, 0f3F800000;": 0x40000000,
    # Two numbers: 1.5 * 1 + 0.5, and (1 + 2 ** -7) ** 2, where 2 ** -14 is lost.
    "fma.rn.bf16x2 %r9, 0x3FC03F81, 0x3F803F81, 0x3F000000;": 0x40003F82,
    # 7 * 37 is halfway between 258 and 260, 9 * 29 between 260 and 262; one is 2 ** -30 below it, one above.
    "fma.rn.bf16x2 %r9, 0x40E04110, 0x421441E8, 0x00000000;": 0x43824382,
    "fma.rn.bf16x2 %r9, 0x40E04110, 0x421441E8, 0xB0803080;": 0x43814383,
    "max.f32 %r9, 0f7FC00000, 0f3F800000;": 0x3F800000,
    "min.f32 %r9, 0f3F800000, 0f7FC00000;": 0x3F800000,
    "max.f32 %r9, 0fBF800000, 0f3F800000;": 0x3F800000,
    "min.f32 %r9, 0fBF800000, 0f3F800000;": 0xBF800000,
    "max.bf16 %rs9, 0xBF80, 0x3F80;": 0x3F80,
    "min.bf16 %rs9, 0x7FC0, 0x3F80;": 0x3F80,
    "max.NaN.f32 %r9, 0f3F800000, 0f7FC00000;": 0x7FC00000,
    "min.NaN.f32 %r9, 0f7FC00000, 0f3F800000;": 0x7FC00000,
    "neg.f32 %r9, 0f00000000;": 0x80000000,
    "abs.f32 %r9, 0fBF800000;": 0x3F800000,
    "ex2.approx.f32 %r9, 0f40400000;": 0x41000000,
    "ex2.approx.f32 %r9, 0fC3010000;": 0x00100000,  # 2 ** -129
    "ex2.approx.ftz.f32 %r9, 0fC3010000;": 0,
    "ex2.approx.ftz.f32 %r9, 0fFF800000;": 0,
    "lg2.approx.f32 %r9, 0f41000000;": 0x40400000,
    "lg2.approx.f32 %r9, 0f00100000;": 0xC3010000,
    "lg2.approx.ftz.f32 %r9, 0f00100000;": 0xFF800000,
    # Conversions.
    "cvta.to.global.u64 %rd9, 5;": 5,
    "mov.b32 %r2, -7; cvt.u64.u32 %rd9, %r2;": 0xFFFFFFF9,
    "mov.b32 %r2, -7; cvt.s64.s32 %rd9, %r2;": -7,
    "mov.b64 %rd2, 0x500000003; cvt.u32.u64 %r9, %rd2;": 3,
    "mov.b32 %r2, 0x50003; cvt.u16.u32 %rs9, %r2;": 3,
    "cvt.rn.f32.s32 %r9, -3;": 0xC0400000,
    "cvt.rn.f32.s32 %r9, 16777217;": 0x4B800000,  # ties to even
    "cvt.rn.f32.u32 %r9, -1;": 0x4F800000,
    "cvt.rn.f32.s16 %r9, -3;": 0xC0400000,
    "cvt.rn.f32.u16 %r9, -1;": 0x477FFF00,
    "cvt.rni.f32.f32 %r9, 0f40200000;": 0x40000000,  # 2.5: ties to even
    "cvt.rni.f32.f32 %r9, 0fC0266666;": 0xC0400000,
    "cvt.rmi.f32.f32 %r9, 0fC0066666;": 0xC0400000,
    "cvt.rzi.s32.f32 %r9, 0fC0266666;": -2,
    "cvt.rzi.s32.f32 %r9, 0f7F800000;": 0x7FFFFFFF,
    "cvt.rzi.s32.f32 %r9, 0f7FC00000;": 0,
    "cvt.sat.f32.f32 %r9, 0f40000000;": 0x3F800000,
    "cvt.sat.f32.f32 %r9, 0f7FC00000;": 0,
    "cvt.f32.bf16 %r9, 0x3F81;": 0x3F810000,
    "cvt.f32.f16 %r9, 0x3C01;": 0x3F802000,
    "cvt.rn.bf16.f32 %rs9, 0f3F808000;": 0x3F80,  # ties to even
    "cvt.rn.bf16.f32 %rs9, 0f3F808001;": 0x3F81,
    "cvt.rn.f16.f32 %rs9, 0f3F801000;": 0x3C00,  # ties to even
    "cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;": 0x3F803F82,
    "cvt.rn.f16x2.f32 %r9, 0f3F801000, 0f3F803000;": 0x3C003C02,
    "cvt.rna.tf32.f32 %r9, 0f3F801000;": 0x3F802000,  # ties away from zero
}

# Instructions that exist for several types: what Python's own integers, booleans and floats give.
INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
WORDS = ("b16", "b32", "b64")
PAIRS = ((-7, 3), (3, -7), (2**62 + 2**30 + 2**14 + 5, 5), (5, 5))
REGISTER = {"16": "%rs9", "32": "%r9", "64": "%rd9"}
OF_INTEGERS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
}
OF_WORDS = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
NUMBERS = {"3F800000": 1.0, "40000000": 2.0, "7FC00000": math.nan}


def as_type(value: int, kind: str) -> int:
    """A number of a type, whose other bits are lost."""
    size = int(kind[1:])
    value &= (1 << size) - 1
    return value - (1 << size) if kind[0] == "s" and value >> (size - 1) else value


def golden_of_types() -> dict[str, int]:
    cases: dict[str, int] = {}
    as_number = "selp.b32 %r9, 1, 0, %p1;"
    for kind in INTEGERS:
        target = REGISTER[kind[1:]]
        for x, y in PAIRS:
            pair = as_type(x, kind), as_type(y, kind)
            cases |= {f"{name}.{kind} {target}, {x}, {y};": f(*pair) for name, f in OF_INTEGERS.items()}
            for c, compare in COMPARISONS.items():
                cases[f"setp.{c}.{kind} %p1, {x}, {y}; {as_number}"] = compare(*pair)
                for other in (0, 1):
                    text = f"{kind} %p1, {x}, {y}, %p2; {as_number}"
                    cases[f"mov.pred %p2, {other}; setp.{c}.and.{text}"] = compare(*pair) and other
                    cases[f"mov.pred %p2, {other}; setp.{c}.or.{text}"] = compare(*pair) or other
            cases[f"mad.lo.{kind} {target}, {x}, {y}, 11;"] = x * y + 11
    for kind in WORDS:
        target = REGISTER[kind[1:]]
        for x, y in PAIRS:
            cases |= {f"{name}.{kind} {target}, {x}, {y};": f(x, y) for name, f in OF_WORDS.items()}
            cases[f"not.{kind} {target}, {x};"] = ~x
            equal = as_type(x, kind) == as_type(y, kind)
            cases[f"setp.eq.{kind} %p1, {x}, {y}; {as_number}"] = equal
            cases[f"setp.ne.{kind} %p1, {x}, {y}; {as_number}"] = not equal
    for kind in (*INTEGERS, *WORDS, "f32"):
        for truth in (0, 1):
            cases[f"mov.pred %p1, {truth}; selp.{kind} {REGISTER[kind[1:]]}, -7, 3, %p1;"] = -7 if truth else 3
    for (x, a), (y, b) in itertools.product(NUMBERS.items(), repeat=2):
        is_nan = math.isnan(a) or math.isnan(b)
        results = {c: not is_nan and f(a, b) for c, f in COMPARISONS.items()}
        results |= {f"{c}u": is_nan or f(a, b) for c, f in COMPARISONS.items()} | {"nan": is_nan, "num": not is_nan}
        cases |= {f"setp.{c}.f32 %p1, 0f{x}, 0f{y}; {as_number}": truth for c, truth in results.items()}
    return cases


@pytest.mark.parametrize("cases", [GOLDEN, golden_of_types()], ids=["golden", "of_types"])
def test_instructions_compute_what_the_manual_says(cases):
    sizes = [next(size for size, name in REGISTER.items() if f"{name}," in text) for text in cases]
    body = "\n".join(
        f"{text} st.global.b{size} [%rd1+{8 * i}], {REGISTER[size]};"
        for i, (text, size) in enumerate(zip(cases, sizes, strict=True))
    )
    outputs = [((len(cases),), np.dtype(np.uint64))]
    numbers = run(parse(kernel(f"{body}\nret;", parameters=1)), (1,), 0, [], outputs).outputs[0]
    for (program, expected), number, size in zip(cases.items(), map(int, numbers), sizes, strict=True):
        number &= (1 << int(size)) - 1
        assert number == as_type(expected, f"u{size}"), f"{program} gives {number:#x}"


# Golden cases of memory and of whole warps. In each, the program is text, so that
# `test_every_row_has_a_golden_case` can see which rows it uses.

# Without a space, addresses of global memory are the same.
ACCESSES = [
    *(
        (space, count, bits)
        for space in ("global", "shared")
        for count in (1, 2, 4)
        for bits in (16, 32, 64)
        if count * bits <= 128
    ),
    ("", 1, 32),
    ("", 2, 32),
]


def access(space: str, count: int, bits: int) -> str:
    """A kernel that copies `count` numbers a lane, by a load of this form to %rd2, by a store of this form to %rd3."""
    letters, size = {16: "%rs", 32: "%r", 64: "%rd"}[bits], bits // 8
    registers = [f"{letters}{4 + i}" for i in range(count)]
    vector = registers[0] if count == 1 else f"{{{', '.join(registers)}}}"
    form = f"{space}{f'.v{count}' if count > 1 else ''}.b{bits}".removeprefix(".")

    def load_each(space: str, base: str, offset: int = 0) -> str:
        return " ".join(f"ld.{space}.b{bits} {name}, [{base}+{offset + size * i}];" for i, name in enumerate(registers))

    def store_each(space: str, base: str) -> str:
        return " ".join(f"st.{space}.b{bits} [{base}+{size * i}], {name};" for i, name in enumerate(registers))

    if space != "shared":
        steps = [f"ld.{form} {vector}, [%rd91];", store_each("global", "%rd92")]
        steps += [load_each("global", "%rd91"), f"st.{form} [%rd93], {vector};"]
    else:
        steps = [load_each("global", "%rd91"), store_each("shared", "%rd94")]
        steps += [f"ld.{form} {vector}, [%rd94];", store_each("global", "%rd92")]
        steps += [f"st.{form} [%rd94+512], {vector};", load_each("shared", "%rd94", 512), store_each("global", "%rd93")]
    lane = f"mul.wide.u32 %rd90, %r1, {count * size}; mov.b64 %rd95, global_smem; add.s64 %rd94, %rd95, %rd90;"
    bases = " ".join(f"add.s64 %rd9{i}, %rd{i}, %rd90;" for i in (1, 2, 3))
    return kernel("\n".join([lane, bases, *steps, "ret;"]), parameters=3)


@pytest.mark.parametrize(("space", "count", "bits"), ACCESSES)
def test_loads_and_stores(space, count, bits):
    numbers = np.random.default_rng(0).integers(0, 1 << 16, (32, count * bits // 16), np.uint16)
    outputs = run(
        parse(access(space, count, bits)), (1,), 1024, [numbers], 2 * [(numbers.shape, numbers.dtype)]
    ).outputs
    for output in outputs:
        np.testing.assert_array_equal(output, numbers)


def ldmatrix(count: int, transposed: bool) -> str:
    """A kernel that stores `count` matrices in shared memory and loads its fragments of them."""
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    form = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    steps = [
        "mov.b64 %rd10, global_smem; add.s64 %rd11, %rd10, %rd9; add.s64 %rd12, %rd1, %rd9; add.s64 %rd13, %rd2, %rd9;"
    ]
    steps += [f"ld.global.b32 %r2, [%rd12+{128 * i}]; st.shared.b32 [%rd11+{128 * i}], %r2;" for i in range(count)]
    steps += [
        f"bar.sync 0; and.b32 %r3, %r1, {8 * count - 1}; mul.wide.u32 %rd14, %r3, 16; add.s64 %rd15, %rd10, %rd14;"
    ]
    steps += [f"cvt.u32.u64 %r4, %rd15; {form} {{{registers}}}, [%r4];"]
    steps += [f"st.global.b32 [%rd13+{128 * i}], %r{10 + i};" for i in range(count)]
    return kernel("\n".join([*steps, "ret;"]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """PTX ISA, "ldmatrix": lane l has the numbers 2 (l % 4) and the next of row l / 4 of each matrix."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    shape = (count, 32, 2)
    (fragments,) = run(parse(ldmatrix(count, transposed)), (1,), 1024, [matrices], [(shape, matrices.dtype)]).outputs
    for i, lane, half in np.ndindex(*shape):
        row, column = lane // 4, 2 * (lane % 4) + half
        assert fragments[i, lane, half] == matrices[(i, column, row) if transposed else (i, row, column)]


# By opcode: fragments of a and b, depth, bits of a number, and its type.
PRODUCTS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("A_16", "B_16", 16, ml_dtypes.bfloat16),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("A_16", "B_16", 16, np.float16),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": ("A_8", "B_8", 8, np.float32),
}


def mma(opcode: str) -> str:
    """A kernel that loads fragments, four, two and four registers a lane, and stores their product."""
    steps, operands = ["mul.wide.u32 %rd10, %r1, 16; mul.wide.u32 %rd11, %r1, 8;"], []
    for pointer, count in ((1, 4), (2, 2), (3, 4)):
        registers = [f"%r{10 * pointer + i}" for i in range(count)]
        operands.append(f"{{{', '.join(registers)}}}")
        steps.append(f"add.s64 %rd12, %rd{pointer}, %rd{10 if count == 4 else 11};")
        steps += [f"ld.global.b32 {register}, [%rd12+{4 * i}];" for i, register in enumerate(registers)]
    target = [f"%r{40 + i}" for i in range(4)]
    steps += [f"{opcode} {{{', '.join(target)}}}, {', '.join(operands)};", "add.s64 %rd12, %rd4, %rd10;"]
    steps += [f"st.global.b32 [%rd12+{4 * i}], {register};" for i, register in enumerate(target)]
    return kernel("\n".join([*steps, "ret;"]), parameters=4)


@pytest.mark.parametrize("opcode", PRODUCTS)
def test_mma(opcode):
    a_fragment, b_fragment, depth, dtype = PRODUCTS[opcode]
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 8, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    a_lanes, b_lanes = (x[getattr(opcodes, name)].astype(dtype) for x, name in ((a, a_fragment), (b, b_fragment)))
    inputs = [a_lanes, b_lanes, c[opcodes.C].astype(np.float32)]
    (product,) = run(parse(mma(opcode)), (1,), 0, inputs, [((32, 4), F32)]).outputs
    np.testing.assert_array_equal(product, (a @ b + c)[opcodes.C])


SHUFFLE = """
	shfl.sync.idx.b32 %r2, %r1, 5, 31, -1;
	shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;
	shl.b32 %r4, %r2, 16;
	or.b32 %r5, %r4, %r3;
	st.global.b32 [%rd90], %r5;
	ret;
"""


def test_shuffles_stay_in_their_warp():
    lane = np.arange(64)
    np.testing.assert_array_equal(execute(SHUFFLE, threads=64), (lane // 32 * 32 + 5) << 16 | lane ^ 3)


ZERO_COPY = """
	setp.lt.u32 %p1, %r1, 8;
	selp.b32 %r2, 4, 0, %p1;
	selp.b64 %rd3, %rd1, 0, %p1;
	mov.b64 %rd4, global_smem;
	add.s64 %rd5, %rd4, %rd9;
	cvt.u32.u64 %r3, %rd5;
	cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r2;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.b32 %r4, [%rd5];
	st.global.b32 [%rd90], %r4;
	ret;
"""


def test_copy_without_a_source_writes_zeros_and_reads_nothing():
    numbers = execute(ZERO_COPY, np.full(1, 7, np.uint32))
    np.testing.assert_array_equal(numbers, np.where(np.arange(32) < 8, 7, 0))
    # The same with a condition of ignoring the source.
    ignored = ZERO_COPY.replace("0x4, %r2;", "0x4, %p2;").replace("selp.b32 %r2, 4, 0, %p1;", "not.pred %p2, %p1;")
    np.testing.assert_array_equal(execute(ignored, np.full(1, 7, np.uint32)), numbers)
    with pytest.raises(Failure, match="only all or none is supported"):
        execute(ZERO_COPY.replace("selp.b32 %r2, 4,", "selp.b32 %r2, 2,"), np.full(1, 7, np.uint32))


SIGNED = """
	add.s64 %rd3, %rd1, %rd9;
	ld.global.s32 %rd4, [%rd3];
	shr.u64 %rd5, %rd4, 32;
	cvt.u32.u64 %r2, %rd5;
	st.global.b32 [%rd90], %r2;
	ret;
"""


def test_a_load_extends_a_number_by_its_sign():
    numbers = np.arange(32, dtype=np.int32) - 16
    np.testing.assert_array_equal(execute(SIGNED, numbers), np.where(numbers < 0, 0xFFFF_FFFF, 0))


def test_every_row_has_a_golden_case():
    """A row that no case above executes would be believed without a proof: write its case, or delete the row."""
    texts = [PRODUCT, *(kernel(body) for body in (SHUFFLE, ZERO_COPY, WARP_BARRIER, SIGNED))]
    texts += [kernel("\n".join(cases)) for cases in (GOLDEN, golden_of_types())]
    texts += [access(*form) for form in ACCESSES] + [mma(opcode) for opcode in PRODUCTS]
    texts += [ldmatrix(count, transposed) for count in (1, 2, 4) for transposed in (False, True)]
    assert {each.opcode for text in texts for each in parse(text).instructions} >= opcodes.TABLE.keys()
