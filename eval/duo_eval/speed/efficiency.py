"""`duo eval efficiency`: prefill time, decode latency and memory of engines side by side, each next to its floor.

Every measurement runs in a separate process, with its own memory. Engines take turns at each point, so that a slowdown
of the machine affects all of them. A floor is the time of what a phase must cost at least
(`duo_eval.speed.roofline`), at rates measured in the same minute (`duo_eval.speed.ceilings`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from duo_eval.runner.process import KILLED, ProcessError, in_fresh_process
from duo_eval.runner.provenance import machine
from duo_eval.runner.record import Record
from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.ceilings import bytes_per_second, flops_per_second
from duo_eval.speed.device import available
from duo_eval.speed.engines import ENGINES, PEERS
from duo_eval.speed.roofline import decode_bytes, prefill_flops
from duo_jax import HeadPattern, KVCache
from duo_jax.certified import inference
from duo_jax.differences import changes
from duo_jax.model.precision import FloatDtype
from pallas_kernels import BACKENDS
from pallas_kernels.timing import seconds
from pallas_kernels.types import Request

# Decode steps that are timed; the median counts.
DECODE_STEPS = 24
# A prefill is repeated until this many seconds have passed, three times at most.
PREFILL_SECONDS = 20.0
# Libraries raise errors of different types when memory runs out; one of these is in the message.
OUT_OF_MEMORY = "resource_exhausted", "out of memory", "does not fit into memory"


@dataclass(frozen=True)
class Point:
    """One measurement: an engine on a model, at a context length and batch size."""

    engine: str
    model: str
    layers: int | None
    dtype: str
    context: int
    batch_size: int
    pattern: str | None = None
    sparsity: float | None = None
    sink_size: int | None = None
    recent_size: int | None = None
    chunk_size: int | None = None
    backend: str | None = None

    @property
    def bench_model(self) -> BenchModel:
        """The model."""
        return BenchModel(self.model, self.layers, self.dtype)

    def __str__(self) -> str:
        """As progress shows it."""
        heads = "" if self.engine != "duo" else " full" if self.sparsity is None else f" {self.sparsity:.0%} streaming"
        chunk = "" if self.chunk_size is None else f", chunks of {self.chunk_size}"
        return f"{self.bench_model.name}, {self.engine}{heads}: {self.context} tokens, batch {self.batch_size}{chunk}"


@dataclass(frozen=True)
class Efficiency:
    """Time prefill and decode and read their memory, against context length, next to what the device could do."""

    model: tuple[str, ...] = ("llama-3-8b", "llama-2-7b")
    """Checkpoints (folder, .gguf file, packaged model, hub id), or presets (see duo inspect) with random weights."""
    layers: int | None = None
    """Measure only the first layers of presets; nothing is scaled to the whole model."""
    pattern: str | None = None
    """Head pattern: a published name or a folder; random heads by default."""
    sparsity: tuple[float, ...] = (0.5,)
    """Fractions of KV heads that stream, each measured."""
    sink_size: int | None = None
    """First tokens that streaming heads keep; the pattern's own by default, 128 for random heads."""
    recent_size: int | None = None
    """Most recent tokens that streaming heads keep; the pattern's own by default, 256 for random heads."""
    contexts: tuple[int, ...] = (4096, 16384, 65536)
    """Prompt lengths in tokens."""
    batch_sizes: tuple[int, ...] = (1,)
    """Prompts at a time."""
    chunk_sizes: tuple[int, ...] = ()
    """Tokens of a prompt computed at a time, each measured; by default the library chooses by the prompt's length."""
    dtype: FloatDtype | None = None
    """Data type of weights, activations and cache; float32 on a CPU, bfloat16 elsewhere."""
    backend: str | None = None
    """Attention backend; the fastest one that is right on this device by default."""
    peer: bool = True
    """Measure transformers on torch (the `bench` extra) and, on a GPU, cuDNN's attention too, if available."""
    out: Path = Path("efficiency.json")
    """File to write; points that it already contains are not measured again."""

    # In the file.
    task: ClassVar[str] = "efficiency"

    def requests(self) -> list[Request]:
        """The attention that this project's engine runs on a GPU, for certification."""
        found = []
        for source in self.model if self.backend is None else ():
            model = BenchModel(source, self.layers, self.dtype or "bfloat16")
            sizes = self.pattern, self.sink_size, self.recent_size
            patterns = [model.pattern(sizes[0], sparsity, *sizes[1:]) for sparsity in self.sparsity]
            found += inference(model.config, None, *patterns)
        return found

    def run(self) -> None:
        """Measure the missing points one by one; each is saved as it ends."""
        self._check()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.peer and find_spec("torch") is None and not self.out.exists():
            print("transformers is left out: it needs torch (pip install 'duo-jax[bench]')")
        device = in_fresh_process("duo_eval.speed.device:describe")
        record = self._record(device)
        # Points that did not fit may fit now.
        record.results = [result for result in record.results if "cannot" not in result]
        missing = record.missing(self._points(device["platform"]))
        if not missing:
            return
        with record.writing(device=device["device"]) as append:
            for point in missing:
                print(point, end="", flush=True)
                result = measured(point)
                append(point, result)
                print(f": {_describe(result)}", flush=True)

    def _check(self) -> None:
        for name in ("model", "contexts", "batch_sizes", "sparsity"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} must have at least one value")
        if min(*self.contexts, *self.batch_sizes, *self.chunk_sizes) < 1:
            raise ValueError(
                f"contexts, batch sizes and chunk sizes must be at least 1, got {self.contexts}, {self.batch_sizes}, "
                f"{self.chunk_sizes}"
            )
        if self.backend not in (None, *BACKENDS):
            raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        for model in self.model:
            for sparsity in self.sparsity:
                BenchModel(model, self.layers).pattern(self.pattern, sparsity, self.sink_size, self.recent_size)

    def _points(self, platform: str) -> Iterator[Point]:
        dtype = self.dtype or ("float32" if platform == "cpu" else "bfloat16")
        available_peers = {"transformers": find_spec("torch") is not None, "cudnn": platform == "gpu"}
        peers = [name for name in PEERS if self.peer and available_peers[name]]
        sizes: dict[str, Any] = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        for model in self.model:
            for batch in self.batch_sizes:
                for context in self.contexts:
                    shared: dict[str, Any] = {"model": model, "layers": self.layers, "dtype": dtype}
                    shared |= {"context": context, "batch_size": batch}
                    yield from (Point(engine, **shared) for engine in peers)
                    for chunk in self.chunk_sizes or (None,):
                        own = shared | {"chunk_size": chunk, "backend": self.backend}
                        yield Point("duo", **own)
                        for sparsity in self.sparsity:
                            yield Point("duo", **own, **sizes, pattern=self.pattern, sparsity=sparsity)

    def _record(self, device: dict[str, str]) -> Record:
        """The file, which has results of one machine and commit, and of one pattern, data type and backend.

        Raises:
            ValueError: a file of another command, machine or commit, or with points of other settings.
        """
        record = Record.open(self.out, {"task": self.task}, key="point")
        if not all(isinstance(result.get("point"), dict) for result in record.results):
            raise ValueError(f"{self.out} is not a result of this command; choose another --out")
        here = {"machine": machine(), "device": device["device"]}
        if any(run.get(name) != value for run in record.head["runs"] for name, value in here.items()):
            raise ValueError(f"{self.out} was measured on another machine, versions or commit; choose another --out")
        own = next(point for point in self._points(device["platform"]) if point.sparsity is not None)
        for result in record.results:
            if different := _differing(own, result["point"]):
                raise ValueError(f"{self.out} was made with other settings: {different}; choose another --out")
        return record


def _differing(own: Point, other: Mapping[str, Any]) -> str:
    """How two points differ in settings that all points of a file share; empty if they do not."""
    names = ["dtype", "backend"] if other.get("engine") == "duo" else []
    names += [] if other.get("sparsity") is None else ["pattern", "sink_size", "recent_size"]
    return "; ".join(changes({name: other.get(name) for name in names}, {name: getattr(own, name) for name in names}))


def measured(point: Point) -> dict[str, Any]:
    """The result of a point in a process of its own; "cannot" if it has none.

    Raises:
        ValueError: the measurement failed for another reason than memory or an engine that does not support it.
    """
    try:
        return in_fresh_process("duo_eval.speed.efficiency:measure_or_reason", asdict(point))
    except ProcessError as error:
        if error.exit_code == KILLED:
            return {"cannot": "killed, as the system does when memory runs out"}
        raise ValueError(f"the measurement of {point} failed: {error}") from None


def measure_or_reason(**point: Any) -> dict[str, Any]:
    """As `measure`; "cannot" with the reason if the engine does not support the point, or memory runs out."""
    try:
        return measure(Point(**point))
    except NotImplementedError as error:
        return {"cannot": f"cannot: {error}"}
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return {"cannot": f"does not fit into memory: {reason[:200]}"}
        raise


def measure(point: Point) -> dict[str, Any]:
    """Time one point in this process.

    Raises:
        MemoryError: weights and cache are larger than the free memory.
    """
    model = point.bench_model
    config = model.config
    pattern = HeadPattern.full(config)
    if point.sparsity is not None:
        pattern = model.pattern(point.pattern, point.sparsity, point.sink_size, point.recent_size)
    itemsize, room = jnp.dtype(point.dtype).itemsize, DECODE_STEPS + 8
    kv = KVCache.bytes_for(config, pattern, point.batch_size, point.context + room)
    needed, free = config.num_parameters * itemsize + kv, available()
    if free is not None and needed > free:
        raise MemoryError(f"weights and cache take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    options = {"chunk_size": point.chunk_size, "backend": point.backend} if point.engine == "duo" else {}
    engine = ENGINES[point.engine](model, pattern, room=room, **options)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (point.batch_size, point.context)).astype(np.int32)
    engine.warm_up(tokens)
    prefill_times: list[float] = []
    while not prefill_times or (len(prefill_times) < 3 and sum(prefill_times) < PREFILL_SECONDS):
        prefill_times.append(seconds(engine.prefill, tokens))
    prefill_memory = engine.memory()["peak"]
    decode_times = [seconds(engine.decode, tokens[:, 0]) for _ in range(DECODE_STEPS + 2)][2:]
    decode_memory = engine.memory()["now"]
    shape: dict[str, Any] = {"batch_size": point.batch_size, "length": point.context}
    flops = prefill_flops(config, pattern, **shape)
    read = decode_bytes(config, pattern, itemsize=itemsize, **shape)
    # Measured last: their memory is not the engine's.
    flops_rate, read_rate = flops_per_second(point.dtype), bytes_per_second()
    return {
        "prefill_seconds": float(np.median(prefill_times)),
        "prefill_times": prefill_times,
        "prefill_flops": flops,
        "prefill_floor_seconds": flops / flops_rate,
        "decode_ms": 1e3 * float(np.median(decode_times)),
        "decode_times_ms": [1e3 * time for time in decode_times],
        "decode_bytes": read,
        "decode_floor_ms": 1e3 * read / read_rate,
        "kv_bytes": engine.kv_bytes,
        "compile_seconds": engine.compile_seconds,
        "peak_memory_bytes": prefill_memory,
        "decode_memory_bytes": decode_memory,
        "flops_per_second": flops_rate,
        "bytes_per_second": read_rate,
    }


def _describe(result: dict[str, Any]) -> str:
    if "cannot" in result:
        return result["cannot"]
    prefill, decode = result["prefill_seconds"], result["decode_ms"]
    return (
        f"prefill {prefill:.2f} s ({prefill / result['prefill_floor_seconds']:.1f} times its floor), "
        f"decode {decode:.1f} ms ({decode / result['decode_floor_ms']:.1f} times), "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
