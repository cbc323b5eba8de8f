"""Reports of NVIDIA's assembler and disassembler, as text."""

import subprocess
from pathlib import Path

import pytest
from duo_eval.aot import sass
from duo_eval.aot.compile import uses_in
from duo_eval.aot.kernels import _main_loop

REPORT = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of a stage in the function 'slow'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'slow' for 'sm_90a'
ptxas info    : Function properties for slow
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compiling entry function 'fast' for 'sm_90a'
ptxas info    : Function properties for fast
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""

# A loop without a product; one with a product, whose wait is behind the end of the kernel; and around it another.
LISTING = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   EXIT ;
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   STS [R0], R1 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0040*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MUFU.EX2 R5, R6 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/               @P3 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
"""


def test_warnings_belong_to_their_kernel():
    (slow, fast) = uses_in(REPORT.replace("\\\n", ""))
    assert slow[:3] == ("slow", 168, 12) and "serialized" in slow[3][0]
    assert fast == ("fast", 32, 0, ())


def test_a_loop_includes_its_waits_and_no_outer_loop(monkeypatch):
    done = subprocess.CompletedProcess((), 0, stdout=LISTING)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    found = sass.loops_of("nvdisasm", Path("a.cubin"))
    assert found == {"other": (), "kernel": (sass.Loop(instructions=7, mma=1, depbar=1, mufu=1, sts=0),)}


FAR = """
	.section	.text.far,"ax",@progbits
.text.far:
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0010*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div) ;
        /*0020*/              @!P1 CALL.REL.NOINC `(.L_x_1) ;
        /*0030*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_a_far_jump_leads_to_the_next_loop(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess((), 0, stdout=FAR))
    assert [loop.instructions for loop in sass.loops_of("nvdisasm", Path("a.cubin"))["far"]] == [4, 2]


@pytest.mark.parametrize(
    ("name", "counts", "main"),
    [
        # Whole tiles of packed keys, the last one, whole tiles of a ring, the last one.
        ("decode_kernel", (496, 533, 206, 267), 496),
        ("decode_kernel_mosaic_gpu_kernel", (328,), 328),
        # Masks in the chunk, in the ring, none.
        ("flash_kernel__1", (672, 684, 469), 469),
    ],
)
def test_the_main_loop_is_over_tiles_of_retrieval_heads_without_a_mask(name, counts, main):
    kernel = {"name": name, "loops": [{"instructions": count} for count in counts]}
    assert _main_loop(kernel) == {"instructions": main}
