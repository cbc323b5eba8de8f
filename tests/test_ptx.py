"""The executor of PTX: its parser, control flow, and the undefined behavior that it refuses.

tests/test_ptx_golden.py has its instructions, tests/test_ptx_kernels.py the kernels that it is for.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.ptx.machine import Failure, Run, run
from tests.ptx.memory import SHARED, Fault, Shared
from tests.ptx.parse import Address, Unreadable, parse

PRODUCT = (Path(__file__).parent / "ptx" / "product.ptx").read_text(encoding="utf-8")
F32 = np.dtype(np.float32)


def kernel(body: str, *, threads: int = 32, parameters: int = 2) -> str:
    """A module whose kernel has pointers %rd1, %rd2, ... and the thread's number %r1."""
    names = [f"k_param_{i}" for i in range(parameters)]
    loads = [f"ld.param::entry.b64 %rd{i}, [{name}];" for i, name in enumerate(names, 1)]
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


def test_parsed_instructions_have_their_lines():
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
def test_invalid_statements_are_refused(body):
    with pytest.raises(Unreadable, match="line"):
        parse(kernel(f"{body}\nret;"))


def test_a_kernel_of_two_warps():
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
    "return_before_a_copy_lands": (
        ("ret;", "bar.sync 0; cp.async.cg.shared.global [ %r6 + 0 ], [ %rd6 + 0 ], 0x10; ret;"),
        "returns before a copy has landed",
    ),
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


def test_two_blocks_may_not_write_one_place():
    with pytest.raises(Failure, match=r"block \(0,\), lane 0, .*writes what another block writes"):
        product(PRODUCT, grid=2)


@pytest.mark.parametrize(
    "edit",
    [("{ %r12, %r13,", "{ %r13, %r12,"), ("{ %r24, %r25 }", "{ %r25, %r24 }"), ("m8n8.x2.", "m8n8.x2.trans.")],
    ids=["a", "b", "transposed"],
)
def test_swapped_fragments_give_wrong_numbers(edit):
    done, wanted = product(changed(PRODUCT, edit))
    assert (done.outputs[0] != wanted).any()


def test_an_instruction_without_a_row_is_an_error():
    with pytest.raises(NotImplementedError, match=r"no row of the table for mma\.sync\.aligned\.m16n8k32\.row"):
        product(PRODUCT.replace("mma.sync.aligned.m16n8k16.row", "mma.sync.aligned.m16n8k32.row"))


def test_diverged_lanes_reconverge():
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


def test_a_barrier_is_one_of_all_lanes_whatever_its_number():
    body = "add.s32 %r2, %r1, 1; shr.u32 %r2, %r2, 8; bar.sync %r2, 64; st.global.b32 [%rd90], %r1; ret;"
    np.testing.assert_array_equal(execute(body, threads=64), np.arange(64))
    with pytest.raises(Failure, match="waits at another barrier"):
        execute(body.replace("%r2, 8;", "%r2, 6;"), threads=64)
    with pytest.raises(Failure, match="only a barrier of all lanes"):
        execute(body.replace("%r2, 64;", "%r2, 32;"), threads=64)


WARP_BARRIER = """
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


def test_warp_barrier_orders_the_lanes_of_one_warp():
    right = WARP_BARRIER.replace("BIT", "1")
    np.testing.assert_array_equal(execute(right, threads=64), np.arange(64) ^ 1)
    for wrong in (WARP_BARRIER.replace("BIT", "32"), right.replace("bar.warp.sync -1;", "")):
        with pytest.raises(Failure, match="without a barrier between"):
            execute(wrong, threads=64)


def test_many_barriers_are_counted():
    lanes = np.arange(32)
    shared, addresses = Shared(64, 32), (SHARED + 2 * lanes).astype(np.uint64)
    shared.store(addresses, lanes, np.zeros((32, 1), np.uint16))
    for _ in range(1 << 16):
        shared.warp_barrier(lanes)
    shared.load(addresses[::-1], lanes, 2)
    shared.store(addresses, lanes, np.ones((32, 1), np.uint16))
    with pytest.raises(Fault, match="without a barrier between"):
        shared.load(addresses[::-1], lanes, 2)
