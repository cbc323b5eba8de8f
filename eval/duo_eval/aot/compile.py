"""Ahead-of-time compilation for a GPU that need not be present; reports memory and registers.

Needs the CUDA plugin of jax (`pip install jax-cuda12-plugin jax-cuda12-pjrt`, the version of jax), for registers also
`nvidia-cuda-nvcc-cu12`, but neither a driver nor a device. Executables are not run.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_jax.mesh.mesh import MeshSize
from pallas_kernels.gpus import GPUS, find_gpu


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory that one program needs while it runs."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def total(self) -> int:
        """The sum; an output in the place of an argument counts once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    def sizes(self) -> dict[str, int]:
        """All of these, as results store them."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Kernel:
    """Resources of a multiprocessor that one Pallas kernel uses, reported by `ptxas` and the kernel's compiler."""

    name: str
    registers: int  # of each thread
    spill_bytes: int  # registers that did not fit, stored and loaded again
    shared_memory: int  # bytes of each program
    address_bits: int | None  # width of the widest offset into an array; None: unknown, as in Mosaic's kernels


def memory_of(program: jax.stages.Compiled) -> Memory:
    """The memory that a compiled program needs on each device."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.alias_size_in_bytes,
    )


def kernels_on(gpu: str, function: jax.stages.Wrapped, *shapes: Any) -> list[Kernel]:
    """Compile a jitted function for one GPU and read the resources of each of its Pallas kernels.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: the CUDA plugin or `ptxas` is not installed.
    """
    with tempfile.TemporaryDirectory() as dump:
        folder = Path(dump)
        with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=dump, MOSAIC_GPU_DUMP_PTXAS="1"):
            compile_for(gpu, function, *shapes, xla_dump_to=dump, xla_dump_emitter_re=".*")
        # By the kernel's entry: shared memory, and bits of the widest address.
        entries: dict[str, tuple[int, int | None]] = {}
        for path in folder.glob("*.triton-to-llvm.txt"):
            text = path.read_text(encoding="utf-8")
            shared = re.search(r"ttg\.shared = (\d+)", text)
            wide = re.search(r"tt\.addptr\W[^\n]*xi64", text)
            entries[path.name.split(".")[1]] = int(shared.group(1)) if shared else 0, 64 if wide else 32
        for path in folder.glob("*.mlir-passes.log"):
            shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", path.read_text(encoding="utf-8"))
            entry = re.sub(r"_\d+\.mlir-passes\.log$", "_mosaic_gpu_kernel", path.name)
            entries[entry] = int(shared.group(1)) if shared else 0, None
        # Mosaic assembles its kernels itself and writes a report.
        uses = [use for path in sorted(folder.glob("*.ptxas")) for use in _uses(path.read_text(encoding="utf-8"))]
        for path in sorted(folder.glob("*.ptx")):
            text = path.read_text(encoding="utf-8")
            if path.with_suffix(".ptxas").exists() or not any(f".entry {name}(" in text for name in entries):
                continue  # Already reported, or one of XLA's own kernels, whose constants are elsewhere.
            uses += assemble(gpu, path)
    kernels = [Kernel(name, registers, spills, *entries[name]) for name, registers, spills in uses if name in entries]
    if not kernels:
        raise ValueError("the program has no Pallas kernel")
    return kernels


def assemble(gpu: str, path: Path) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in a file of PTX.

    Raises:
        NotImplementedError: `ptxas` is not installed.
    """
    command = [_ptxas(), "-v", f"-arch={GPUS[gpu].architecture}", str(path), "-o", os.devnull]
    return _uses(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def gpus_like(gpu: str, count: int) -> list[Any]:
    """GPUs to compile for, which need not be present.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: the CUDA plugin is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, target_config=find_gpu(gpu).target_config, topology=f"1x1x{count}"
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotImplementedError(
            f"cannot compile for a GPU here: {first}. pip install jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__}"
        ) from None
    return list(topology.devices)


def gpus_of(gpu: str, mesh: str | None) -> str:
    """The target of a compilation, for footers; `mesh` as on the command line."""
    size = MeshSize() if mesh is None else MeshSize.parse(mesh)
    if size.devices == 1:
        return f"one row, compiled for {GPUS[gpu].name}"
    rows = "one row" if size.data == 1 else f"{size.data} rows"
    return f"{rows} in total, compiled for {size.devices} x {GPUS[gpu].name} ({mesh}), sizes of each"


def compiled_with(head: Mapping[str, Any]) -> str:
    """Provenance of a result of the compiler, for the footer of its table."""
    run = head["runs"][-1]
    machine = run["machine"]
    return f"Jax {machine['versions']['jax']}, commit {machine['commit']}; `{run['command']}`."


def compile_for(
    gpu: str, function: jax.stages.Wrapped, *shapes: Any, mesh: Mesh | None = None, **options: Any
) -> jax.stages.Compiled:
    """Compile a jitted function for one GPU, or a mesh of `gpus_like` it, with XLA's options.

    Args:
        gpu: its name, see `pallas_kernels.gpus`.
        function: the program.
        shapes: its arguments, pytrees of `jax.ShapeDtypeStruct`.
        mesh: devices of the arrays that have no sharding of their own; by default one GPU.
        options: XLA's.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: the CUDA plugin is not installed.
    """
    mesh = mesh or Mesh(np.array(gpus_like(gpu, 1)), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or place), shapes)
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # An executable for an absent device can be written to the cache, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.set_mesh(mesh):
            return function.trace(*placed).lower(lowering_platforms=("cuda",)).compile(options)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _uses(report: str) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in the report of `ptxas -v`."""
    uses = []
    for part in report.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise ValueError(f"cannot parse the report of ptxas: {part}")
        uses.append((part.split("'")[0], int(registers.group(1)), max(map(int, spills.groups()))))
    return uses


def _ptxas() -> str:
    """The assembler, from a CUDA toolkit or the package nvidia-cuda-nvcc-cu12."""
    with contextlib.suppress(PackageNotFoundError):
        for file in files("nvidia-cuda-nvcc-cu12") or ():
            if file.name == "ptxas":
                return str(file.locate())
    path = shutil.which("ptxas")
    if path is None:
        raise NotImplementedError("ptxas was not found: pip install nvidia-cuda-nvcc-cu12")
    return path
