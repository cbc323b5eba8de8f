"""Kernels of this project compiled for a GPU that is not here, and executed from their PTX. Needs jax's CUDA plugin.

`executing()` puts itself in the place of the launches: attention is called as ever, and everything around its kernels
runs on the CPU. Compilation is that of a user: XLA's options here are not those of the tests.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from duo_eval.aot.compile import compile_for

from pallas_kernels.triton import tile
from tests.ptx import machine
from tests.ptx.parse import parse

GPU = "a100-80g"
# Without it, the tests' own XLA_FLAGS choose the code that is generated.
OPTIONS = {"xla_backend_optimization_level": 3}


@dataclass(frozen=True)
class Program:
    """A kernel's text, and how the compiled module launches it."""

    text: str
    grid: tuple[int, ...]
    shared: int  # bytes of each block

    def edited(self, edit: Callable[[str], str]) -> "Program":
        """The same with another text."""
        text = edit(self.text)
        assert text != self.text
        return replace(self, text=text)


@dataclass(frozen=True)
class Launch:
    """A program, its arguments, and what its execution gave."""

    program: Program
    inputs: list[np.ndarray]
    outputs: list[tuple[tuple[int, ...], np.dtype]]
    run: machine.Run

    def again(self, program: Program) -> list[np.ndarray]:
        """The outputs of another program on the same arguments."""
        return execute(program, self.inputs, self.outputs).outputs


def execute(program: Program, inputs: list[np.ndarray], outputs: list[tuple[tuple[int, ...], np.dtype]]) -> machine.Run:
    """Run all blocks."""
    return machine.run(parse(program.text), program.grid, program.shared, inputs, outputs)


def compiled(function: Callable[..., Any], shapes: Any) -> Program:
    """The only kernel of a program."""
    with tempfile.TemporaryDirectory() as folder:
        compile_for(GPU, jax.jit(function), *shapes, xla_dump_to=folder, **OPTIONS)
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


@contextmanager
def executing() -> Iterator[list[Launch]]:
    """Within it, kernels of `triton` and `jax_triton` run from their PTX; the list collects their launches."""
    launches: list[Launch] = []
    call = tile.call

    @functools.cache
    def program(kernel: Any, keywords: Any, out: Any, structure: Any, shapes: Any, launch: Any) -> Program:
        def function(*leaves: Any) -> Any:
            arrays = jax.tree.unflatten(structure, leaves)
            return call(functools.partial(kernel, **dict(keywords)), jax.tree.unflatten(*out), arrays, **dict(launch))

        return compiled(function, [jax.ShapeDtypeStruct(*shape) for shape in shapes])

    def run(kernel: Any, out: Any, arrays: Any, **launch: Any) -> Any:
        leaves, structure = jax.tree.flatten(arrays)
        results, results_structure = jax.tree.flatten(out)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        made = program(
            kernel.func, tuple(kernel.keywords.items()), (results_structure, tuple(results)), structure, shapes,
            tuple(launch.items()),
        )  # fmt: skip
        inputs, outputs = [np.asarray(x) for x in leaves], [(x.shape, x.dtype) for x in results]
        done = execute(made, inputs, outputs)
        launches.append(Launch(made, inputs, outputs, done))
        return jax.tree.unflatten(results_structure, map(jnp.asarray, done.outputs))

    with mock.patch.object(tile, "call", run):
        yield launches
