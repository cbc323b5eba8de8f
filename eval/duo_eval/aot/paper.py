"""`duo eval paper`: decode and prefill at the points of the paper's figures, compiled for its GPU, without that GPU.

Knows the paper's memory and times at these points, and how its models are planned; measures nothing.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from duo_eval.aot.compile import compile_for, compiled_with, memory_of
from duo_eval.aot.context import planned
from duo_eval.aot.programs import decode, prefill_chunk
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from pallas_kernels.gpus import GPUS

# The paper's GPU.
GPU = "a100-80g"
GIB = 1 << 30


@dataclass(frozen=True)
class Point:
    """A point of the paper's figures on efficiency (section 3.4), in bfloat16, for one sequence.

    Attributes:
        phase: the program.
        model: a preset.
        context: tokens of the cache.
        chunk: tokens of a chunk of the prompt; 1 in decoding.
        memory: the paper's, with full attention and with DuoAttention, in units of 2^30 bytes.
        seconds: the paper's, of a step or of the whole prompt.
    """

    phase: Literal["decode", "prefill"]
    model: str
    context: int
    chunk: int
    memory: tuple[int, int]
    seconds: tuple[float, float]


POINTS = (
    Point("decode", "llama-3-8b", 100_000, 1, (27, 21), (0.023, 0.021)),
    Point("decode", "llama-3-8b", 300_000, 1, (52, 34), (0.039, 0.028)),
    Point("decode", "llama-3-8b", 500_000, 1, (76, 46), (0.054, 0.036)),
    Point("decode", "llama-2-7b", 20_000, 1, (22, 17), (0.020, 0.018)),
    Point("decode", "llama-2-7b", 60_000, 1, (42, 22), (0.032, 0.019)),
    Point("decode", "llama-2-7b", 100_000, 1, (61, 26), (0.045, 0.023)),
    Point("prefill", "llama-3-8b", 320_000, 32_000, (58, 38), (152.0, 93.0)),
    Point("prefill", "llama-3-8b", 320_000, 160_000, (72, 52), (154.0, 123.0)),
)


@dataclass(frozen=True)
class PaperTask:
    """Compile decode and prefill for an A100 at the points of the paper's figures, and report the memory they need."""

    backend: str = "triton"
    """Attention backend to compile."""
    out: Path | None = None
    """File to write; a point that it has already is not compiled again."""

    def run(self) -> None:
        """Compile every point that is missing, with full attention and with the pattern; print a line for each."""
        record = Record.open(self.out, {"task": "paper", "gpu": GPU, **asdict(self)})
        jobs = [job_of(point, heads) for point in POINTS for heads in ("full", "duo")]
        missing = record.missing(jobs)
        with record.writing(dtype="bfloat16") as append:
            for point in POINTS:
                for heads in ("full", "duo"):
                    if (job := job_of(point, heads)) in missing:
                        append(job, self._compile(point, heads))
                        total = record.results[-1]["total"]
                        print(f"{point.phase}, {point.model}, {point.context} tokens, {heads}: {total / GIB:.1f} GiB")

    def _compile(self, point: Point, heads: str) -> dict[str, Any]:
        begin = time.perf_counter()
        plan = planned(point.model, "bf16", heads == "duo", point.chunk)
        program = (prefill_chunk if point.phase == "prefill" else decode)(plan, point.context, self.backend)
        return memory_of(compile_for(GPU, *program)).sizes() | {"compile_seconds": time.perf_counter() - begin}


def job_of(point: Point, heads: str) -> dict[str, Any]:
    """The key of a result."""
    return {"phase": point.phase, "model": point.model, "tokens": point.context, "chunk": point.chunk, "heads": heads}


def totals(path: Path) -> dict[Point, tuple[int, int]]:
    """Bytes of each compiled point: full attention's, then the pattern's."""
    by_job = {tuple(result["job"].items()): result["total"] for result in read(path)[1]}
    both = {point: [by_job.get(tuple(job_of(point, heads).items())) for heads in ("full", "duo")] for point in POINTS}
    return {point: (full, duo) for point, (full, duo) in both.items() if full is not None and duo is not None}


def paper_memory_table(path: Path) -> str:
    """The paper's memory and that of our compiled programs, each with the factor saved."""
    rows = []
    for point, compiled in totals(path).items():
        theirs, ours = point.memory, [total / GIB for total in compiled]
        what = point.phase if point.chunk == 1 else f"{point.phase}, chunks of {point.chunk:,}"
        row = [what, point.model, f"{point.context:,}"]
        row += [f"{theirs[0]} → {theirs[1]}", f"{theirs[0] / theirs[1]:.2f}x"]
        rows.append([*row, f"{ours[0]:.1f} → {ours[1]:.1f}", f"{ours[0] / ours[1]:.2f}x"])
    headers = ["program", "model", "tokens", "paper, measured", "smaller", "duo-jax, compiled", "smaller"]
    head = read(path)[0]
    note = (
        f"Full attention → DuoAttention, in GiB (2^30 bytes); one row in bfloat16, backend {head['about']['backend']}, "
        f"compiled for {GPUS[head['about']['gpu']].name}; not run."
    )
    return f"{rows_to_table(rows, headers, 'llr')}\n\n{note} {compiled_with(head)}"


RESULT = ResultType("The paper's points", of_task("paper"), {"Memory": paper_memory_table}, group="Compiled, not run")
