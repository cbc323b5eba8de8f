"""`duo eval efficiency`: prefill time, decode latency and memory of engines side by side, each beside its floor.

Every measurement is a process of its own, so that its memory is its own too; engines take turns at each point, so that
a machine that slows down slows all of them. A floor is the time of what a phase must cost at least
(`duo_eval.speed.roofline`),
at the rates of a large matrix product and of a long read in the same minute (`duo_eval.speed.ceilings`).
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from duo_eval.runner.record import provenance, write
from duo_eval.speed import ceilings
from duo_eval.speed.engines import ENGINES, PEERS, Subject
from duo_eval.speed.engines.memory import available
from duo_eval.speed.roofline import decode_bytes, prefill_flops
from duo_jax import KVCache
from duo_jax.precision import FloatDtype
from pallas_kernels import BACKENDS

# Decode steps that are timed; the median counts.
DECODE_STEPS = 24
# A prefill is repeated until this many seconds have passed, three times at most.
PREFILL_SECONDS = 20.0


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
    def subject(self) -> Subject:
        """The model of it."""
        return Subject(self.model, self.layers, self.dtype)

    def __str__(self) -> str:
        """In words."""
        heads = "" if self.engine != "duo" else " full" if self.sparsity is None else f" {self.sparsity:.0%} streaming"
        chunk = "" if self.chunk_size is None else f", chunks of {self.chunk_size}"
        rows = f"{self.context} tokens, batch {self.batch_size}"
        return f"{self.subject.name}, {self.engine}{heads}: {rows}{chunk}"


@dataclass(frozen=True)
class Efficiency:
    """Time prefill and decode and read their memory, against context length, beside what the device could do."""

    model: tuple[str, ...] = ("llama-3-8b", "llama-2-7b")
    """Checkpoints (folder, .gguf file, packaged model, hub id), or presets (see duo inspect) with random weights."""
    layers: int | None = None
    """Measure the first layers of presets only; nothing is scaled to the whole model."""
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
    """Attention backend; the best one verified on this device by default."""
    peer: bool = True
    """Measure transformers on torch (the `bench` extra) and, on a GPU, cuDNN's attention too, where they are there."""
    out: Path = Path("efficiency.json")
    """File to write; points that it has already are not measured again."""

    def run(self) -> None:
        """Measure what the file lacks, point by point; each is saved as it ends."""
        self._check()
        record = self._record()
        # What did not fit may fit now.
        record["results"] = [result for result in record["results"] if "cannot" not in result]
        done = [result["point"] for result in record["results"]]
        for point in self._points(record["platform"]):
            if asdict(point) in done:
                continue
            print(point, end="", flush=True)
            result = {"point": asdict(point), **_ask("point", point)}
            record["results"].append(result)
            write(self.out, record)
            print(f": {_said(result)}", flush=True)

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
                Subject(model, self.layers).pattern(self.pattern, sparsity, self.sink_size, self.recent_size)

    def _points(self, platform: str) -> Iterator[Point]:
        dtype = self.dtype or ("float32" if platform == "cpu" else "bfloat16")
        chunks = self.chunk_sizes or (None,)
        for model in self.model:
            for batch in self.batch_sizes:
                for context in self.contexts:
                    about: dict[str, Any] = {"model": model, "layers": self.layers, "dtype": dtype}
                    about |= {"context": context, "batch_size": batch}
                    yield from (Point(engine, **about) for engine in self._peers(platform))
                    for chunk in chunks:
                        own = about | {"chunk_size": chunk, "backend": self.backend}
                        yield Point("duo", **own)
                        sizes: dict[str, Any] = {"sink_size": self.sink_size, "recent_size": self.recent_size}
                        for sparsity in self.sparsity:
                            yield Point("duo", **own, **sizes, pattern=self.pattern, sparsity=sparsity)

    def _peers(self, platform: str) -> list[str]:
        """Those that are here; which of them run on what, they say themselves."""
        here = {"transformers": find_spec("torch") is not None, "cudnn": platform == "gpu"}
        return [name for name in PEERS if self.peer and here[name]]

    def _record(self) -> dict[str, Any]:
        """What the file has, or a new record."""
        known = self._known()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        about = provenance() | _ask("device", None)
        if known is None:
            if self.peer and find_spec("torch") is None:
                print("transformers is left out: it needs torch (pip install 'duo-jax[bench]')")
            return about | {"results": []}
        if any(known.get(name) != about[name] for name in ("machine", "device")):
            raise ValueError(f"{self.out} was measured on another machine, versions or commit; choose another --out")
        ours = next(point for point in self._points(about["platform"]) if point.sparsity is not None)
        for result in known["results"]:
            different = _differing(ours, result["point"])
            if different:
                raise ValueError(f"{self.out} was measured with another {', '.join(different)}; choose another --out")
        return known

    def _known(self) -> dict[str, Any] | None:
        if not self.out.exists():
            return None
        try:
            record = json.loads(self.out.read_text(encoding="utf-8"))
            [(record["machine"], result["point"]) for result in record["results"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.out} is not a result of this command; choose another --out") from None
        return record


def _differing(ours: Point, theirs: Mapping[str, Any]) -> list[str]:
    """Settings that all points of a file share, of which these two have different ones."""
    names = [] if theirs["engine"] != "duo" else ["dtype", "backend"]
    names += [] if theirs["sparsity"] is None else ["pattern", "sink_size", "recent_size"]
    return [name.replace("_", " ") for name in names if getattr(ours, name) != theirs.get(name)]


def measure(point: Point) -> dict[str, Any]:
    """Time one point in this process.

    Raises:
        MemoryError: weights and cache alone are larger than the memory that is free.
    """
    subject = point.subject
    config, pattern = subject.config, None
    if point.sparsity is not None:
        pattern = subject.pattern(point.pattern, point.sparsity, point.sink_size, point.recent_size)
    itemsize, room = jnp.dtype(point.dtype).itemsize, DECODE_STEPS + 8
    kv = KVCache.bytes_for(config, pattern, point.batch_size, point.context + room)
    needed, free = config.num_parameters * itemsize + kv, available()
    if free is not None and needed > free:
        raise MemoryError(f"weights and cache take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    options = {"chunk_size": point.chunk_size, "backend": point.backend} if point.engine == "duo" else {}
    engine = ENGINES[point.engine](subject, pattern, room=room, **options)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (point.batch_size, point.context)).astype(np.int32)
    engine.warm_up(tokens)
    prefill_times: list[float] = []
    while not prefill_times or (len(prefill_times) < 3 and sum(prefill_times) < PREFILL_SECONDS):
        prefill_times.append(ceilings.seconds(engine.prefill, tokens))
    prefill_memory = engine.memory()["peak"]
    decode_times = [ceilings.seconds(engine.decode, tokens[:, 0]) for _ in range(DECODE_STEPS + 2)][2:]
    decode_memory = engine.memory()["now"]
    costs: dict[str, Any] = {"batch_size": point.batch_size, "length": point.context}
    found: dict[str, Any] = {
        "prefill_seconds": float(np.median(prefill_times)),
        "prefill_times": prefill_times,
        "prefill_flops": prefill_flops(config, pattern, **costs),
        "decode_ms": 1e3 * float(np.median(decode_times)),
        "decode_times_ms": [1e3 * seconds for seconds in decode_times],
        "decode_bytes": decode_bytes(config, pattern, itemsize=itemsize, **costs),
        "kv_bytes": engine.kv_bytes,
        "compile_seconds": engine.compile_seconds,
        "peak_memory_bytes": prefill_memory,
        "decode_memory_bytes": decode_memory,
    }
    # Last: what these take is not the engine's memory.
    found |= {"flops_per_second": ceilings.flops_per_second(point.dtype)}
    found |= {"bytes_per_second": ceilings.bytes_per_second()}
    found["prefill_floor_seconds"] = found["prefill_flops"] / found["flops_per_second"]
    found["decode_floor_ms"] = 1e3 * found["decode_bytes"] / found["bytes_per_second"]
    return found


def _said(result: dict[str, Any]) -> str:
    if "cannot" in result:
        return result["cannot"]
    prefill, decode = result["prefill_seconds"], result["decode_ms"]
    return (
        f"prefill {prefill:.2f} s ({prefill / result['prefill_floor_seconds']:.1f} times its floor), "
        f"decode {decode:.1f} ms ({decode / result['decode_floor_ms']:.1f} times), "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def _ask(what: Literal["device", "point"], point: Point | None) -> dict[str, Any]:
    """What a process of its own answers; this one never touches the device."""
    # -P keeps modules of the working directory from being imported.
    command = [sys.executable, "-P", "-m", "duo_eval.speed.efficiency", what, json.dumps(point and asdict(point))]
    # In a session of its own, Ctrl-C ends it through this process, without a traceback.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    if done.returncode == -9:
        return {"cannot": "killed, as the system does when memory runs out"}
    if done.returncode:
        raise ValueError(f"the measurement of {point or 'the device'} failed; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(what: str, arguments: Any) -> dict[str, Any]:
    if what == "device":
        return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
    try:
        return measure(Point(**arguments))
    except NotImplementedError as error:
        return {"cannot": f"cannot: {error}"}
    except Exception as error:  # What says that memory ran out is another type in each library.
        words = "RESOURCE_EXHAUSTED", "out of memory", "does not fit into memory"
        if isinstance(error, MemoryError) or any(word.lower() in str(error).lower() for word in words):
            said = (str(error).splitlines() or [type(error).__name__])[0]
            return {"cannot": f"does not fit into memory: {said[:200]}"}
        raise


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1], json.loads(sys.argv[2]))))
