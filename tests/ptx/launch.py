"""Compiles this project's kernels for a GPU that is not present and executes their PTX. Needs jax's CUDA plugin.

`executing()` replaces the launches of kernels. Attention is called as usual, and all other operations run on the CPU.
"""

import functools
import os
import re
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from duo_eval.aot.compile import compile_for, lower_for
from duo_eval.aot.triton_calls import triton_calls
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpus, segments
from pallas_kernels.mosaic import compat
from pallas_kernels.triton import tile
from tests.ptx import machine
from tests.ptx.parse import parse

GPU = "a100-80g"


@dataclass(frozen=True)
class Program:
    """A kernel's PTX, and how the compiled module launches it."""

    text: str
    grid: tuple[int, ...]
    shared: int  # bytes of each block


def compiled_by_mosaic(function: Callable[..., Any], shapes: Any, grid: tuple[int, ...]) -> Program:
    """Compile a function that has one kernel of Mosaic for `GPU`."""
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder):
            compile_for(GPU, jax.jit(function), *shapes)
        (path,) = Path(folder).glob("*.mlir-passes.log")
        text = (path.parent / path.name.replace(".mlir-passes.log", ".ptx")).read_text(encoding="utf-8")
        log = path.read_text(encoding="utf-8")
    # The launch as the last pass has it, and where the host finds each argument in its list of arrays.
    before, _, launch = log.rpartition("gpu.launch_func ")
    host = before.rpartition("func.func @")[2]
    ((size, names),) = re.findall(r"dynamic_shared_memory_size (%\d+) args\(([^)]*)\)", launch.partition("\n")[0])
    (shared,) = re.findall(rf"{size} = llvm\.mlir\.constant\((\d+) : i32\)", host)
    places = {"": 0, **{name: int(at) for name, at in re.findall(r"(%\d+) = llvm\.getelementptr \S+\[(\d+)\]", host)}}
    loads = {name: places.get(at, 0) for name, at in re.findall(r"(%\d+) = llvm\.load (\S+) : !llvm\.ptr -> ", host)}
    arguments = [loads[name] for name in re.findall(r"%\d+", names)]
    assert sorted(arguments) == list(range(len(arguments))), "the kernel does not use all arrays"
    # Parameters in the order of the arrays.
    lines = re.findall(r"\t\.param [^\n,]+", text)
    declared = ",\n".join(line for _, line in sorted(zip(arguments, lines, strict=True)))
    return Program(text.replace(",\n".join(lines), declared), grid, int(shared))


# What a test executes instead of a program.
Change = Callable[[Program], Program]


@dataclass(frozen=True)
class Launch:
    """A program that was executed, and the result."""

    program: Program
    run: machine.Run


def compiled(function: Callable[..., Any], shapes: Any) -> Program:
    """Compile a function that has one kernel for `GPU`."""
    with tempfile.TemporaryDirectory() as folder:
        compile_for(GPU, jax.jit(function), *shapes, xla_dump_to=folder, xla_dump_emitter_re=".*")
        (sequence,) = Path(folder).glob("*.thunk_sequence.txt")
        launches = re.findall(
            r"kCustomKernel .*?\] (\w+) grid: \[([\d, ]+)\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes",
            sequence.read_text(encoding="utf-8"),
        )
        assert len(launches) == 1, f"one kernel is needed: {sequence.read_text(encoding='utf-8')}"
        ((name, grid, threads, shared),) = launches
        (text,) = (text for path in Path(folder).glob("*.ptx") if f".entry {name}(" in (text := path.read_text()))
    assert parse(text).threads == int(threads)
    return Program(text, tuple(map(int, grid.split(","))), int(shared))


class Launches(list[Launch]):
    """Launches in their order."""

    def __init__(self, change: Change | None = None) -> None:
        self.change = change

    def execute(
        self, program: Program, arrays: list[Any], outputs: list[Any], *, is_in_place: bool = False
    ) -> list[jax.Array]:
        """Execute one more; its outputs have the shapes and types of `outputs`, and may be the last of the arrays."""
        if self.change is not None:
            program = self.change(program)
        shapes = [(x.shape, np.dtype(x.dtype)) for x in outputs]
        inputs = [np.asarray(x) for x in arrays]
        before = inputs[len(inputs) - len(outputs) :] if is_in_place else None
        run = machine.run(parse(program.text), program.grid, program.shared, inputs, shapes, before)
        self.append(Launch(program, run))
        return [jnp.asarray(x) for x in run.outputs]


@contextmanager
def executing(change: Change | None = None) -> Iterator[Launches]:
    """Within it, the kernels of `triton`, `jax_triton` and `mosaic` are executed from their PTX.

    Backends and tiles are those of `GPU`.

    Args:
        change: replaces each program before it is executed.

    Yields:
        The launches so far.
    """
    launches = Launches(change)

    def pallas(kernel: Any, out: Any, arrays: Any, **settings: Any) -> Any:
        leaves, structure = jax.tree.flatten(arrays)
        outputs, results = jax.tree.flatten(out)
        function, keywords = getattr(kernel, "func", kernel), getattr(kernel, "keywords", {})
        program = _pallas(
            _frozen(function, keywords), _frozen(None, settings), structure, _shapes(leaves), results,
            _shapes(outputs),
        )  # fmt: skip
        found = launches.execute(program, leaves, outputs, is_in_place=settings.get("is_in_place", False))
        return jax.tree.unflatten(results, found)

    def triton(*arrays: Any, kernel: Any, **settings: Any) -> Any:
        (name,) = settings.keys() & {"out_type", "out_shape"}
        outputs = settings.pop(name)
        return launches.execute(
            _triton(kernel, name, _shapes(outputs), _frozen(None, settings), _shapes(arrays)), arrays, outputs
        )

    def mosaic(kernel: Any, *, out_type: Any, **settings: Any) -> Any:
        def call(*arrays: Any) -> Any:
            key = kernel.func, str(kernel.keywords), str(settings), _shapes(arrays)
            if key not in _OF_MOSAIC:
                run = _KERNEL(kernel, out_type=out_type, **settings)
                _OF_MOSAIC[key] = compiled_by_mosaic(run, _structs(_shapes(arrays)), settings["grid"])
            return launches.execute(_OF_MOSAIC[key], list(arrays), list(out_type))

        return call

    with ExitStack() as patches:
        for module in (gpus, compat):
            patches.enter_context(mock.patch.object(module, "device_kind", lambda: gpus.GPUS[GPU].name))
        patches.enter_context(mock.patch.object(tile, "call", pallas))
        patches.enter_context(mock.patch.object(plgpu, "kernel", mosaic))
        patches.enter_context(mock.patch.object(segments, "lax", types.SimpleNamespace(fori_loop=_loop)))
        if find_spec("jax_triton"):
            import jax_triton

            # Callers inspect its parameters.
            call = functools.wraps(jax_triton.triton_call)(triton)
            patches.enter_context(mock.patch.object(jax_triton, "triton_call", call))
        yield launches


@contextmanager
def executing_pallas_calls() -> Iterator[Launches]:
    """Within it and `jax.disable_jit`, the kernels of every `pallas_call` are executed from their PTX."""
    launches, real = Launches(), pl.pallas_call

    def pallas_call(kernel: Any, **settings: Any) -> Any:
        def call(*arrays: Any) -> Any:
            leaves, structure = jax.tree.flatten(arrays)
            outputs, results = jax.tree.flatten(settings["out_shape"])

            def function(*leaves: Any) -> Any:
                return real(kernel, **settings)(*jax.tree.unflatten(structure, leaves))

            with jax.disable_jit(False):
                program = compiled(function, _structs(_shapes(leaves)))
            return jax.tree.unflatten(results, launches.execute(program, leaves, outputs))

        return call

    with mock.patch.object(pl, "pallas_call", pallas_call):
        yield launches


def _loop(begin: Any, end: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """`lax.fori_loop` outside of a program."""
    for i in range(int(begin), int(end)):
        state = body(jnp.int32(i), state)
    return state


def forget() -> None:
    """Compile kernels again when they are called, after a change of their source."""
    _pallas.cache_clear()
    _OF_MOSAIC.clear()
    jax.clear_caches()


# Compiled programs are cached by everything that they depend on.


def _frozen(function: Any, keywords: dict[str, Any]) -> tuple[Any, ...]:
    return function, tuple(sorted(keywords.items()))


def _shapes(arrays: Any) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return tuple((tuple(x.shape), np.dtype(x.dtype)) for x in arrays)


def _structs(shapes: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


_CALL, _KERNEL = tile.call, plgpu.kernel
_OF_MOSAIC: dict[Any, Program] = {}


@functools.cache
def _pallas(kernel: Any, settings: Any, structure: Any, shapes: Any, results: Any, outputs: Any) -> Program:
    def function(*leaves: Any) -> Any:
        arrays = jax.tree.unflatten(structure, leaves)
        out = jax.tree.unflatten(results, _structs(outputs))
        return _CALL(functools.partial(kernel[0], **dict(kernel[1])), out, arrays, **dict(settings[1]))

    return compiled(function, _structs(shapes))


@functools.cache
def _triton(kernel: Any, name: str, outputs: Any, settings: Any, shapes: Any) -> Program:
    """Compile as jax_triton does."""
    from jax_triton import triton_lib

    def function(*arrays: Any) -> Any:
        return triton_lib.triton_call(*arrays, kernel=kernel, **{name: _structs(outputs)}, **dict(settings[1]))

    (call,) = triton_calls(lower_for(GPU, jax.jit(function), *_structs(shapes)))
    return Program(call.ptx, call.grid, call.shared_memory)
