"""`duo eval kernels`: registers, spills and shared memory of the GPU kernels, from the compiler; no GPU is needed."""

import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from duo_eval.aot.compile import Kernel, compiled_with, kernels_on
from duo_eval.gpu_suite import layer
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from pallas_kernels import Unsupported
from pallas_kernels.gpus import GPUS

OPERATIONS = ("prefill", "decode", "training")
# Slots of each pool, of half the KV heads of all layers.
SLOTS = 128


@dataclass(frozen=True)
class Kernels:
    """Compile every GPU kernel ahead of time and report the resources of a multiprocessor that it needs."""

    gpus: tuple[str, ...] = ("a100-80g", "h200")
    """a100-80g, h100-80g or h200."""
    backends: tuple[Literal["triton", "mosaic"], ...] = ("triton", "mosaic")
    """Backends; a case that a backend or a GPU does not support is left out."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dims."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Data types of queries, keys and values."""
    caches: tuple[Literal["same", "int8", "int4"], ...] = ("same", "int8", "int4")
    """Data types of retrieval heads' cached keys and values; same: the data type of the queries."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Compile every configuration, print a line for each kernel."""
        for name, values, known in (
            ("gpus", self.gpus, GPUS),
            ("dtypes", self.dtypes, ("bfloat16", "float16", "float32")),
        ):
            if set(values) - set(known):
                raise ValueError(f"{name} are among {', '.join(known)}, got {', '.join(values)}")
        record = Record.open(self.out, {"task": "kernels", **asdict(self)}, again=True)
        names = "backend", "gpu", "dtype", "head_dim", "operation", "cache"
        with record.writing() as append:
            for case in product(self.backends, self.gpus, self.dtypes, self.head_dims, OPERATIONS, self.caches):
                about: dict[str, Any] = dict(zip(names, case, strict=True))
                if about["operation"] == "training" and about["cache"] != "same":
                    continue  # Training has no cache.
                label = ", ".join(map(str, case))
                begin = time.perf_counter()
                try:
                    kernels = self._kernels(**about)
                except Unsupported as error:
                    print(f"{label}: {error}", flush=True)
                    continue
                seconds = time.perf_counter() - begin
                append(None, about | {"compile_seconds": seconds, "kernels": [asdict(kernel) for kernel in kernels]})
                for kernel in kernels:
                    print(
                        f"{label}: {kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
                        f"{kernel.shared_memory / 1024:.0f} KiB shared memory",
                        flush=True,
                    )
        if not record.results:
            raise ValueError("nothing could be compiled")

    def _kernels(self, *, gpu: str, operation: str, backend: str, **settings: Any) -> list[Kernel]:
        function, shapes = program(operation, backend, **settings)
        return kernels_on(gpu, function, *shapes)


def program(
    operation: str,
    backend: str,
    *,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    cache: str = "same",
    tokens: int = 2048,
    capacity: int = 65536,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """An operation, jitted, and the shapes of its arguments: one row, heads and slots as in Llama-3-8B.

    `cache` is one of `Kernels.caches`.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    sizes: dict[str, Any] = {"heads": (32, 8, head_dim), "dtype": dtype, "streaming": 0.5, "capacity": capacity}
    sizes |= {"tokens": 1 if operation == "decode" else tokens, "cache": None if cache == "same" else cache}
    one = jax.eval_shape(lambda: layer.make(**sizes))
    pools = jax.tree.map(lambda x: jax.ShapeDtypeStruct((SLOTS, *x.shape[1:]), x.dtype), one.pools)
    shapes = one._replace(pools=pools), jax.ShapeDtypeStruct((1,), jnp.int32)

    def loss(q: Any, k: Any, v: Any, gates: Any) -> Any:
        made = layer.Layer(q, k, v, pools, one.heads)
        return made.gated(gates, backend=backend).astype(jnp.float32).sum()

    if operation == "prefill":
        return jax.jit(lambda made, count: made.prefill(start=count, lengths=count, backend=backend)), shapes
    if operation == "decode":
        return jax.jit(lambda made, count: made.decode(lengths=count, backend=backend)), shapes
    return jax.jit(jax.grad(loss, (0, 1, 2, 3))), (*one[:3], jax.ShapeDtypeStruct((8,), jnp.float32))


def kernels_table(path: Path) -> str:
    """Registers, spills and shared memory of every kernel."""
    head, results = read(path)
    gpus = head["about"]["gpus"]
    launches: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        for kernel in result["kernels"]:
            # A second launch of the same kernel has a number as suffix.
            name = kernel["name"].partition("__")[0].removesuffix("_mosaic_gpu_kernel")
            cache = result.get("cache", "same").replace("same", "")
            key = result["backend"], result["operation"], name, result["dtype"], cache, result["head_dim"]
            launches.setdefault(key, {}).setdefault(result["gpu"], []).append(kernel)
    rows = []
    for key, by_gpu in launches.items():
        row = [*key]
        for gpu in gpus:
            uses = by_gpu.get(gpu)
            if uses is None:
                row += ["", "", ""]
                continue
            registers, spills, shared = (
                max(use[name] for use in uses) for name in ("registers", "spill_bytes", "shared_memory")
            )
            row += [registers, spills, f"{shared / 1024:.0f}"]
        rows.append(row)
    headers = ["backend", "operation", "kernel", "type", "cache", "head dim"]
    for gpu in gpus:
        headers += [f"registers, {gpu}", "spilled bytes", "shared KiB"]
    note = "The largest of an operation's launches; an empty cache column means the data type of the queries."
    return f"{rows_to_table(rows, headers, 'lllllr')}\n\n{note} {compiled_with(head)}"


RESULT = ResultType("Kernels", with_fields("kernels", "backend"), {"Kernels": kernels_table}, group="Compiled, not run")
