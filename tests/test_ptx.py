"""The executor of PTX by itself: its parser, the layouts of fragments, what instructions mean, and what it refuses.

The kernels that it is for are in tests/test_ptx_kernels.py.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.ptx import opcodes
from tests.ptx.machine import Failure, Run, run
from tests.ptx.parse import Address, Unreadable, parse

PRODUCT = (Path(__file__).parent / "ptx" / "product.ptx").read_text(encoding="utf-8")
F32 = np.dtype(np.float32)


def kernel(body: str, *, threads: int = 32, parameters: int = 2) -> str:
    """A module whose kernel has pointers %rd1, %rd2, ... and the thread's number %r1."""
    names = [f"k_param_{i}" for i in range(parameters)]
    loads = [f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names, 1)]
    return f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({", ".join(f".param .u64 .ptr .align 16 {name}" for name in names)})
.reqntid {threads}, 1, 1
{{
	.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
	{" ".join(loads)}
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd9, %r1, 4;
	{body}
}}
"""


def execute(body: str, *inputs: np.ndarray, threads: int = 32, grid: int = 1) -> np.ndarray:
    """What a kernel with `st.global.b32 [%rd90], ...` writes to the place of its thread."""
    text = kernel(body, threads=threads, parameters=len(inputs) + 1)
    text = text.replace("%r1, 4;", f"%r1, 4; add.s64 %rd90, %rd{len(inputs) + 1}, %rd9;", 1)
    outputs = [((threads,), np.dtype(np.uint32))]
    return run(parse(text), (grid,), 1024, list(inputs), outputs).outputs[0]


def product(text: str, *, grid: int = 1, transposed: bool = False) -> tuple[Run, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, size=(16, 16)).astype(ml_dtypes.bfloat16) for _ in "ab")
    done = run(parse(text), (grid,), 1024, [a, b], [((16, 16), F32)])
    b = b.astype(np.float32)
    return done, a.astype(np.float32) @ (b if transposed else b.T)


def changed(text: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_instructions_are_parsed_with_their_lines():
    parsed = parse(PRODUCT)
    assert (parsed.name, parsed.threads, parsed.alignments, parsed.shared) == (
        "product",
        64,
        (16,) * 3,
        ("global_smem",),
    )
    copy = next(each for each in parsed.instructions if each.opcode.startswith("cp.async.cg"))
    assert copy.operands == (Address("%r6", 0), Address("%rd6", 0), 16)
    assert PRODUCT.splitlines()[copy.line - 1].strip() == f"{copy.text};"
    product_ = next(each for each in parsed.instructions if each.opcode.startswith("mma"))
    assert product_.operands[2:] == (("%r24", "%r25"), ("%r26",) * 4)
    several = parse(
        kernel(
            "$L__1: @!%p1 bra $L__1; mov.u32 %r2, -0x10; { mov.b32 %r3, 0f3F800000; } ret;".replace("{ ", "").replace(
                " }", ""
            )
        )
    )
    jump, minus, one, _ = several.instructions[-4:]
    assert (jump.predicate, jump.is_negated, several.labels["$L__1"]) == ("%p1", True, len(several.instructions) - 4)
    assert (minus.operands[1], one.operands[1]) == (-16, 0x3F800000)


@pytest.mark.parametrize("body", ["mov.u32 %r2, 1", "mov.u32 %r2, <1>;", "ld.global.b32 %r2, [%rd1, %r1];"])
def test_what_is_no_instruction_is_refused(body):
    with pytest.raises(Unreadable, match="line"):
        parse(kernel(f"{body}\nret;"))


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
def test_fragments_are_those_of_the_manual(name):
    rows, columns = getattr(opcodes, name)
    for row, places in FIGURES[name].items():
        for column, place in enumerate(places.split()):
            lane, number = map(int, place.split("."))
            assert (rows[lane, number], columns[lane, number]) == (row, column)


def test_ldmatrix_and_a_product():
    done, wanted = product(PRODUCT)
    np.testing.assert_array_equal(done.outputs[0], wanted)
    assert (done.count("mma"), done.count()) == (2, 2 * len(parse(PRODUCT).instructions))
    # Lanes 8 to 15 have the rows of the second matrix, eight further down; each warp has eight columns of them.
    trans = changed(
        PRODUCT,
        ("m8n8.x2.", "m8n8.x2.trans."),
        ("%r18, %r3, 8;", "%r18, %r3, 4;"),
        ("%r20, %r17, 1;", "%r20, %r17, 5;"),
    )
    done, wanted = product(trans, transposed=True)
    np.testing.assert_array_equal(done.outputs[0], wanted)


MUTANTS = {
    "no_wait": (("cp.async.wait_group 0;", ""), "reads what a copy is still writing"),
    "wait_for_an_earlier_group": (("wait_group 0;", "wait_group 1;"), "reads what a copy is still writing"),
    "no_commit": (("cp.async.commit_group;", ""), "reads what a copy is still writing"),
    "no_barrier": (("bar.sync \t0;", ""), "wrote, without a barrier between"),
    "barrier_of_some_lanes": (("bar.sync", "@%p2 bar.sync"), "needs all lanes of a warp"),
    "one_warp_copies": (("cp.async.cg", "@%p1 cp.async.cg"), "reads shared memory that was never written"),
    "write_before_the_barrier": (("bar.sync \t0;", "bar.sync 0; st.shared.b32 [%r4], %r1;"), "as another lane"),
    "copy_after_the_reads": (
        ("mov.b32 \t%r26", "cp.async.cg.shared.global [ %r6 + 0 ], [ %rd6 + 0 ], 0x10; mov.b32 %r26"),
        "read, without a barrier between",
    ),
    "misaligned": (("[%r23+512]", "[%r23+520]"), "16 bytes that is not aligned"),
    "beyond_shared_memory": (("[%r23+512]", "[%r23+1024]"), "outside of the block's 1024 bytes"),
    "over_the_end_of_an_array": (("[%rd9+512]", "[%rd9+528]"), "(outside of every|over the end of an) array"),
    "truncated_address": (("%rd9, %rd3, %rd8;", "%rd9, %rd8, 4096;"), "outside of every array"),
    "over_an_input": (("%rd9, %rd3, %rd8;", "%rd9, %rd1, %rd8;"), "writes to an input"),
    "two_warps_write_the_same": (("%r37, %r36, %r35;", "%r37, %r36, 0;"), "writes another number to the same place"),
    "no_value": (("mov.b32 \t%r26, 0f00000000;", ""), "reads %r26, which has no value"),
    "wrong_width": (("cvt.u64.u32 \t%rd8, %r37;", "mov.b64 %rd8, %r37;"), "which has 4 bytes"),
    "some_lanes_multiply": (("mma.sync", "@%p2 mma.sync"), "needs all lanes of a warp"),
    "endless": (("ret;", "$L__0: bra $L__0;"), "a loop without an end"),
}


@pytest.mark.parametrize(("edit", "reason"), MUTANTS.values(), ids=MUTANTS)
def test_undefined_behaviour_is_an_error(edit, reason, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.MOST_STEPS", 1000)
    with pytest.raises(Failure, match=r"product, block \(0,\), lane \d+, line \d+: .*") as failure:
        product(changed(PRODUCT, edit))
    assert failure.match(reason)


def test_programs_that_write_to_one_place_are_an_error():
    with pytest.raises(Failure, match=r"block \(0,\), lane 0, .*writes what another block writes"):
        product(PRODUCT, grid=2)


@pytest.mark.parametrize(
    "edit",
    [("{ %r12, %r13,", "{ %r13, %r12,"), ("{ %r24, %r25 }", "{ %r25, %r24 }"), ("m8n8.x2.", "m8n8.x2.trans.")],
    ids=["a", "b", "transposed"],
)
def test_swapped_fragments_give_other_numbers(edit):
    done, wanted = product(changed(PRODUCT, edit))
    assert (done.outputs[0] != wanted).any()


def test_an_instruction_without_a_row_is_an_error():
    with pytest.raises(NotImplementedError, match=r"no row of the table for mma\.sync\.aligned\.m16n8k32\.row"):
        product(PRODUCT.replace("mma.sync.aligned.m16n8k16.row", "mma.sync.aligned.m16n8k32.row"))


def test_lanes_diverge_and_meet_again():
    """Each lane adds numbers up to its own, in a loop; then a shuffle, which needs whole warps."""
    body = """
	mov.b32 %r2, 0; mov.b32 %r3, 0;
$L__1:
	setp.ge.s32 %p1, %r2, %r1;
	@%p1 bra $L__2;
	add.s32 %r2, %r2, 1;
	add.s32 %r3, %r3, %r2;
	bra.uni $L__1;
$L__2:
	bar.sync 0;
	shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
	st.global.b32 [%rd90], %r4;
	ret;
"""
    lane = np.arange(64)
    sums = lane * (lane + 1) // 2
    np.testing.assert_array_equal(execute(body, threads=64), sums[lane ^ 1])
    with pytest.raises(Failure, match="needs all lanes of a warp"):
        execute(body.replace("bra.uni", "bar.sync 0; bra.uni"), threads=64)


# Instructions whose meaning is easy to get wrong: operands, result.
BITS = {
    "shl.b32 %r9, 1, 32;": 0,
    "shr.s32 %r9, -8, 99;": -1,
    "shr.u32 %r9, -8, 32;": 0,
    "shr.u32 %r9, -8, 28;": 15,
    "div.s32 %r9, -7, 2;": -3,
    "rem.s32 %r9, -7, 2;": -1,
    "div.u32 %r9, -7, 2;": 0x7FFFFFFC,
    "mul.lo.s32 %r9, 0x10001, 0x10001;": 0x20001,
    "mul.hi.u32 %r9, -1, -1;": 0xFFFFFFFE,
    "bfe.s32 %r9, 0x80, 4, 4;": -8,
    "bfe.u32 %r9, 0x80, 4, 4;": 8,
    "bfe.s32 %r9, -16, 0, 32;": -16,
    "prmt.b32 %r9, 0x03020100, 0x07060584, 0xC174;": 0xFF010784,
    "lop3.b32 %r9, 12, 10, 6, 0xCA;": (12 & 10) | (~12 & 6),
    "mov.b32 {%rs1, %rs2}, 0x20001; mov.b32 %r9, {%rs2, %rs1};": 0x10002,
    "mov.b32 {%rs1, _}, 0x8001; cvt.s32.s16 %r9, %rs1;": -0x7FFF,
    "mov.b32 {%rs1, _}, 0x8001; cvt.u32.u16 %r9, %rs1;": 0x8001,
    "cvt.rn.f32.s32 %r9, -3;": 0xC0400000,
    "cvt.rn.f32.s32 %r9, 16777217;": 0x4B800000,  # ties to even
    "cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;": 0x3F803F82,  # ties to even
    "cvt.rna.tf32.f32 %r9, 0f3F801000;": 0x3F802000,  # ties away from zero
    "max.f32 %r9, 0f7FC00000, 0f3F800000;": 0x3F800000,
    "max.NaN.f32 %r9, 0f3F800000, 0f7FC00000;": 0x7FC00000,
    "fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002;": 0x28800000,  # 2 ** -46: the product is exact
    "ex2.approx.ftz.f32 %r9, 0fC3010000;": 0,  # 2 ** -129
    "ex2.approx.f32 %r9, 0fC3010000;": 0x00100000,
    "setp.gt.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 0, %p1;": 0,
    "setp.gtu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 0, %p1;": 1,
    "setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r9, 1, 0, %p1;": 1,
    "setp.lt.u32 %p1, -1, 1; not.pred %p2, %p1; selp.b32 %r9, 1, 0, %p2;": 1,
}


def test_instructions_mean_what_the_manual_says():
    """All in one kernel, each its own register."""
    body = "".join(
        f"{text.replace('%r9', f'%r{i}')} st.global.b32 [%rd1+{4 * i - 40}], %r{i};\n"
        for i, text in enumerate(BITS, 10)
    )
    outputs = [((len(BITS),), np.dtype(np.uint32))]
    found = run(parse(kernel(body + "ret;", parameters=1)), (1,), 0, [], outputs).outputs[0]
    for text, given, wanted in zip(BITS, found, BITS.values(), strict=True):
        assert given == wanted & 0xFFFFFFFF, f"{text} gives {given:#x}"


def test_a_copy_of_no_bytes_is_zeros_and_reads_nothing():
    body = """
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
    found = execute(body, np.full(1, 7, np.uint32))
    np.testing.assert_array_equal(found, np.where(np.arange(32) < 8, 7, 0))


def test_a_warp_s_own_barrier_orders_its_lanes():
    body = """
	mov.b64 %rd4, global_smem;
	add.s64 %rd5, %rd4, %rd9;
	st.shared.b32 [%rd5], %r1;
	bar.warp.sync -1;
	xor.b32 %r2, %r1, BIT;
	mul.wide.u32 %rd6, %r2, 4;
	add.s64 %rd7, %rd4, %rd6;
	ld.shared.b32 %r3, [%rd7];
	st.global.b32 [%rd90], %r3;
	ret;
"""
    np.testing.assert_array_equal(execute(body.replace("BIT", "1"), threads=64), np.arange(64) ^ 1)
    for wrong in (body.replace("BIT", "32"), body.replace("BIT", "1").replace("bar.warp.sync -1;", "")):
        with pytest.raises(Failure, match="without a barrier between"):
            execute(wrong, threads=64)
