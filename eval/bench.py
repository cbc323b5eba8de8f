"""`duo bench`: prefill and decode times beside transformers on torch, in one run, as JSON.

Every measurement is a process of its own, so that its peak memory is its own too; engines take turns at each point,
so that a machine that slows down slows all of them.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax import HeadPattern
from duo_jax.checkpoint.load import open_source
from eval.costs import decode_bytes, prefill_flops
from eval.engines import ENGINES, seconds
from eval.record import provenance, write

# Decode steps that are timed; the median counts.
DECODE_STEPS = 24
# A prefill is repeated until this many seconds have passed, three times at most.
PREFILL_SECONDS = 20.0


@dataclass(frozen=True)
class Point:
    """One measurement: an engine at a context length and batch size."""

    engine: str
    model: str
    context: int
    batch_size: int
    pattern: str | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Bench:
    """Time prefill and decode, full attention and a head pattern, beside Hugging Face transformers."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id; a Llama model where transformers takes part."""
    pattern: str = "smollm2-135m-instruct"
    """Head pattern: a published name or a folder."""
    sparsity: tuple[float, ...] = (0.5,)
    """Fractions of KV heads that stream, each measured."""
    contexts: tuple[int, ...] = (2048, 4096, 8192)
    """Prompt lengths in tokens."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Prompts at a time."""
    peer: bool = True
    """Measure transformers on torch too; needs the `bench` extra."""
    out: Path = Path("bench.json")
    """File to write; points that it has already are not measured again."""

    def run(self) -> None:
        """Measure what the file lacks, point by point; each is saved as it ends."""
        for name in ("contexts", "batch_sizes", "sparsity"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} must have at least one value")
        if min(*self.contexts, *self.batch_sizes) < 1:
            raise ValueError(f"contexts and batch sizes must be at least 1, got {self.contexts}, {self.batch_sizes}")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        record = self._record()
        done = [result["point"] for result in record["results"]]
        for point in self._points():
            if asdict(point) in done:
                continue
            print(
                f"{point.engine} {point.sparsity or 'full'}: {point.context} tokens, batch {point.batch_size}", end=""
            )
            result = _in_own_process(point)
            record["results"].append(result)
            write(self.out, record)
            print(f": prefill {result['prefill_seconds']:.2f} s, decode {result['decode_ms']:.1f} ms", flush=True)

    def _points(self) -> list[Point]:
        points = []
        for batch in self.batch_sizes:
            for context in self.contexts:
                peers = [Point("transformers", self.model, context, batch)] if self.peer else []
                duo = [Point("duo", self.model, context, batch, self.pattern, sparsity) for sparsity in self.sparsity]
                points += [*peers, Point("duo", self.model, context, batch), *duo]
        return points

    def _record(self) -> dict[str, Any]:
        about = provenance()
        if not self.out.exists():
            return about | {"results": []}
        try:
            record = json.loads(self.out.read_text(encoding="utf-8"))
            known = record["machine"], record["results"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.out} is not a result of this command; choose another --out") from None
        if known[0] != about["machine"]:
            raise ValueError(f"{self.out} was measured on another machine, versions or commit; choose another --out")
        return record


def measure(point: Point) -> dict[str, Any]:
    """Time one point in this process."""
    pattern = HeadPattern.load(point.pattern, sparsity=point.sparsity) if point.pattern else None
    config = open_source(point.model, weights=False).config
    engine = ENGINES[point.engine](point.model, pattern, room=DECODE_STEPS + 8)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (point.batch_size, point.context)).astype(np.int32)
    engine.warm_up(tokens)
    prefill_times: list[float] = []
    while not prefill_times or (len(prefill_times) < 3 and sum(prefill_times) < PREFILL_SECONDS):
        prefill_times.append(seconds(engine.prefill, tokens))
    decode_times = [seconds(engine.decode, tokens[:, 0]) for _ in range(DECODE_STEPS + 2)][2:]
    costs: dict[str, Any] = {"batch_size": point.batch_size, "length": point.context}
    return {
        "point": asdict(point),
        "prefill_seconds": float(np.median(prefill_times)),
        "prefill_times": prefill_times,
        "prefill_flops": prefill_flops(config, pattern, **costs),
        "decode_ms": 1e3 * float(np.median(decode_times)),
        "decode_times_ms": [1e3 * seconds for seconds in decode_times],
        "decode_bytes": decode_bytes(config, pattern, itemsize=4, **costs),
        "kv_bytes": engine.kv_bytes,
        "compile_seconds": engine.compile_seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _in_own_process(point: Point) -> dict[str, Any]:
    # -P keeps a folder named eval/ in the working directory from being taken for this package.
    command = [sys.executable, "-P", "-m", "eval.bench", json.dumps(asdict(point))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"the measurement of {point} failed; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(Point(**json.loads(sys.argv[1])))))
