"""`duo eval kernels`: registers, spills and main loops of the GPU kernels, from the compiler; no GPU is needed."""

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from duo_eval.aot.compile import AssemblyError, NoKernelError, assembler, compiled_with, kernels_on, lower_for
from duo_eval.runner.process import first_line
from duo_eval.runner.record import Record, Result, read, sha256
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from pallas_kernels import Unsupported, layer
from pallas_kernels.gpus import GPUS
from pallas_kernels.segments import is_short

# A short chunk is an operation of its own here: its kernel is another one than that of prefill.
Operation = Literal["prefill", "short-chunk", "decode", "append", "training"]

BackendName = Literal["mosaic", "triton", "jax_triton"]


class Compiled(NamedTuple):
    """What an operation is compiled with."""

    tokens: int
    backends: tuple[BackendName, ...] = ("mosaic", "triton", "jax_triton")
    """Those with a kernel of their own."""
    caches: tuple[str, ...] = ("same", "int8", "int4")
    """Data types of a cache."""


OPERATIONS: dict[Operation, Compiled] = {
    "prefill": Compiled(2048),
    # For 32 query heads and 8 KV heads, one tile of queries.
    "short-chunk": Compiled(32, backends=("triton",), caches=("int8", "int4")),
    "decode": Compiled(1),
    "append": Compiled(1, backends=("triton",)),
    "training": Compiled(2048, backends=("triton", "jax_triton"), caches=("same",)),
}
BACKENDS = Compiled(1).backends
# What is compiled in one case.
CASE = ("backend", "gpu", "dtype", "head_dim", "operation", "cache")
# Instructions of a loop, in the order of the table.
COUNTS = ("instructions", "mma", "depbar", "mufu", "sts")
# Slots of each pool, of half the KV heads of all layers.
SLOTS = 128


@dataclass(frozen=True)
class Kernels:
    """Compile every GPU kernel ahead of time and report the resources of a multiprocessor that it needs.

    A case that is in the file already is compiled again only if the program, jax or the assembler has changed.
    """

    gpus: tuple[str, ...] = ("a100-80g", "h100-80g", "h200", "b200", "rtx-4090")
    """GPUs by name."""
    backends: tuple[BackendName, ...] = BACKENDS
    """Backends; a case that a backend or a GPU does not support is left out. Of others, the file keeps what it has."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dims."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Data types of queries, keys and values."""
    caches: tuple[Literal["same", "int8", "int4"], ...] = ("same", "int8", "int4")
    """Data types of retrieval heads' cached keys and values; same: the data type of the queries."""
    operations: tuple[Operation, ...] = tuple(OPERATIONS)
    """Operations; of others, the file keeps what it has."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Compile every configuration, print a line for each kernel."""
        # It says where Mosaic's runtime is. XLA reads that when jax loads the CUDA plugin, which is before a first
        # kernel of another backend is compiled.
        importlib.import_module("jax.experimental.mosaic.gpu")
        for name, values, known in (
            ("gpus", self.gpus, GPUS),
            ("dtypes", self.dtypes, ("bfloat16", "float16", "float32")),
        ):
            if set(values) - set(known):
                raise ValueError(f"{name} are among {', '.join(known)}, got {', '.join(values)}")
        combinations = product(BACKENDS, self.gpus, self.dtypes, self.head_dims, OPERATIONS, self.caches)
        cases: list[dict[str, Any]] = [dict(zip(CASE, values, strict=True)) for values in combinations]
        about = {name: value for name, value in asdict(self).items() if name not in ("operations", "backends")}
        record = Record.open(self.out, {"task": "kernels", **about}, again=True)
        if self.out and self.out.exists() and self.out.stat().st_size:
            head, stored = read(self.out)
            wanted = [list(case.values()) for case in cases]
            record.results = [result for result in stored if _values(result) in wanted]
            record.head["runs"] = head["runs"] if record.results else []
        failed = []
        with record.writing() as append:
            for case in cases:
                compiled = OPERATIONS[case["operation"]]
                if case["operation"] not in self.operations or case["backend"] not in self.backends:
                    continue
                if case["cache"] not in compiled.caches or case["backend"] not in compiled.backends:
                    continue
                label = ", ".join(map(str, case.values()))
                same = [result for result in record.results if _values(result) == list(case.values())]
                try:
                    result = _compiled(**case, known=record.results)
                except Unsupported as error:
                    print(f"{label}: {error}", flush=True)
                    result = {}
                if result not in same:
                    record.results = [result for result in record.results if result not in same]
                    if result:
                        append(None, result)
                failed += [f"{label}: {result['failed']}"] if "failed" in result else []
                for kernel in result.get("kernels", ()):
                    print(f"{label}: {_line(kernel)}", flush=True)
                    failed += [f"{label}, {kernel['name']}: {text}" for text in kernel["warnings"]]
        if not record.results:
            raise ValueError("nothing could be compiled")
        if failed:
            raise ValueError(f"{len(failed)} kernels do not compile, or not as they should: {failed[0]}")


def _values(result: dict[str, Any]) -> list[Any]:
    """What was compiled; older results have no cache."""
    return [result[name] if name != "cache" else result.get(name, "same") for name in CASE]


def _compiled(known: Sequence[Result], **case: Any) -> Result:
    """The result of one case; a known one if it is of the same program, compilers and compute capability.

    Mosaic compiles a program once in a process: on a second GPU of one capability there would be nothing to read.
    """
    begin = time.perf_counter()
    function, shapes = program(**{name: value for name, value in case.items() if name != "gpu"})
    text = lower_for(case["gpu"], function, *shapes).as_text()
    versions = f"{jax.__version__}, {jaxlib.__version__}, {assembler()}"
    code = sha256(f"{versions}\n{text}".encode())
    for other in known:
        if other.get("code") == code and GPUS[other["gpu"]].capability == GPUS[case["gpu"]].capability:
            return other | case
    try:
        kernels = kernels_on(case["gpu"], function, *shapes)
        found: dict[str, Any] = {"kernels": [asdict(kernel) for kernel in kernels]}
    except (jax.errors.JaxRuntimeError, AssemblyError) as error:  # Such as too much shared memory.
        found = {"kernels": [], "failed": first_line(error)}
    except NoKernelError:
        # Mosaic's prefill unpacks int8 and int4 into the same scratch, and runs the same kernels on it.
        others = [other for other in known if all(other[name] == case[name] for name in CASE if name != "cache")]
        if not (case["backend"] == "mosaic" and case["cache"] != "same" and others):
            raise
        found = {"kernels": others[-1]["kernels"]}
    return case | {"code": code, "compile_seconds": time.perf_counter() - begin} | found


def _line(kernel: dict[str, Any]) -> str:
    """Resources of one kernel."""
    loop = _main_loop(kernel)
    counts = f", {loop['instructions']} instructions in the main loop" if loop else ""
    return (
        f"{kernel['name']}: {kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled, "
        f"{kernel['shared_memory'] / 1024:.0f} KiB shared memory{counts}"
    )


def _main_loop(kernel: dict[str, Any]) -> dict[str, int] | None:
    """The loop with matrix products that is executed most: over the tiles of retrieval heads that need no mask.

    In decode it is the first one; another one, over rings, is shorter if the cache is quantized. Other kernels have a
    loop for each kind of mask, and the shortest one has none.
    """
    loops = kernel.get("loops") or []
    if kernel["name"].startswith("decode_kernel"):
        return loops[0] if loops else None
    return min(loops, key=lambda loop: loop["instructions"], default=None)


def program(
    operation: Operation,
    backend: str,
    *,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    cache: str = "same",
    tokens: int | None = None,
    capacity: int = 65536,
    page_size: int | None = None,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """An operation, jitted, and the shapes of its arguments: one row, heads and slots as in Llama-3-8B.

    `cache` is one of `Kernels.caches`; with `page_size`, retrieval heads have their tokens in pages;
    `tokens` are those of a chunk, by default as in `OPERATIONS`.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    sizes: dict[str, Any] = {"heads": (32, 8, head_dim), "dtype": dtype, "streaming": 0.5, "capacity": capacity}
    usual = OPERATIONS[operation].tokens
    sizes |= {"tokens": tokens if tokens and usual > 1 else usual, "cache": None if cache == "same" else cache}
    one = jax.eval_shape(lambda: layer.make(**sizes))
    pools = jax.tree.map(lambda x: jax.ShapeDtypeStruct((SLOTS, *x.shape[1:]), x.dtype), one.pools)
    if page_size is not None:
        count = capacity // page_size
        full_k, full_v = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((SLOTS, count, page_size, *x.shape[3:]), x.dtype), pool)
            for pool in pools.full
        )
        table: Any = jax.ShapeDtypeStruct((1, count), jnp.int32)
        pools = pools._replace(full_k=full_k, full_v=full_v, pages=table)
    shapes = one._replace(pools=pools), jax.ShapeDtypeStruct((1,), jnp.int32)

    def loss(q: Any, k: Any, v: Any, gates: Any) -> Any:
        made = layer.Layer(q, k, v, pools, one.heads)
        return made.gated(gates, backend=backend).astype(jnp.float32).sum()

    def chunk(made: layer.Layer, count: Any) -> Any:
        if operation == "short-chunk" and not is_short(made.q, made.k.shape[2]):
            raise Unsupported(f"a short chunk is read as a long one with {dtype} and head dim {head_dim}")
        return made.prefill(start=count, lengths=count, backend=backend)

    def append(pools: Any, made: layer.Layer, count: Any) -> Any:
        return made._replace(pools=pools).append(start=count, backend=backend)

    if operation in ("prefill", "short-chunk"):
        return jax.jit(chunk), shapes
    if operation == "decode":
        return jax.jit(lambda made, count: made.decode(lengths=count, backend=backend)), shapes
    if operation == "append":
        return jax.jit(append, donate_argnums=0), (pools, *shapes)
    return jax.jit(jax.grad(loss, (0, 1, 2, 3))), (*one[:3], jax.ShapeDtypeStruct((8,), jnp.float32))


def kernels_table(path: Path) -> str:
    """Registers, spills and shared memory of every kernel, and instructions of its main loop."""
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
    order = sorted(launches, key=lambda key: (key[0], key[3], key[5], list(OPERATIONS).index(key[1]), key[2], key[4]))
    rows, loops = [], []
    for key in order:
        cells, counts = [], []
        for gpu in gpus:
            uses = launches[key].get(gpu, [])
            most = [max(use[name] for use in uses) for name in ("registers", "spill_bytes")] if uses else []
            shared = [f"{max(use['shared_memory'] for use in uses) / 1024:.0f}"] if uses else []
            cells.append(", ".join(map(str, most + shared)))
            found = next((loop for use in uses if (loop := _main_loop(use))), None)
            counts.append(", ".join(str(found[name]) for name in COUNTS) if found else "")
        rows.append([*key, *cells])
        loops.append([*key, *counts])
    headers, align = ["backend", "operation", "kernel", "type", "cache", "head dim", *gpus], "lllllr" + "r" * len(gpus)
    note = (
        "Registers of a thread, bytes that it spills, KiB of shared memory; the largest of an operation's launches. An "
        "empty cache column means the data type of the queries."
    )
    table = f"{rows_to_table(rows, headers, align)}\n\n{note}"
    if loops := [row for row in loops if any(row[6:])]:
        note = (
            "Instructions of a kernel's main loop, and among them matrix products, waits for copies and products, "
            "special functions (exponentials), and stores to shared memory. A loop is a tile of keys of one warp, of a "
            "retrieval head and without a mask."
        )
        table += f"\n\n{rows_to_table(loops, headers, align)}\n\n{note}"
    return f"{table} {compiled_with(head)}"


RESULT = ResultType("Kernels", with_fields("kernels", "backend"), {"Kernels": kernels_table}, group="Compiled, not run")
