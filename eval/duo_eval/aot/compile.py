"""Ahead-of-time compilation for a GPU that need not be present; reports memory and registers.

Needs the CUDA plugin of jax (`pip install jax-cuda12-plugin jax-cuda12-pjrt`, the version of jax), for registers also
`nvidia-cuda-nvcc-cu12`, for counts of instructions `triton`, but neither a driver nor a device. Executables are not
run.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_eval.aot.sass import Loop, loops_of
from duo_eval.aot.triton_calls import triton_calls
from duo_jax.mesh.mesh import MeshSize
from pallas_kernels.gpus import find_gpu

# Code as XLA generates it by default, whatever XLA_FLAGS says: without optimizations, kernels have up to three times as
# many instructions.
OPTIONS = {"xla_backend_optimization_level": 3}


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
    """Resources of a multiprocessor that one kernel uses, reported by `ptxas` and the kernel's compiler."""

    name: str
    registers: int  # of each thread
    spill_bytes: int  # registers that did not fit, stored and loaded again
    shared_memory: int  # bytes of each program
    address_bits: int | None  # width of the widest offset into an array; None: unknown, as in Mosaic's kernels
    warnings: tuple[str, ...]  # of `ptxas`: C75xx, products that it does not let run asynchronously
    loops: tuple[Loop, ...] | None  # innermost loops with matrix products; None: nvdisasm is not installed


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
    """Compile a jitted function for one GPU, and assemble each of its kernels to read what it needs.

    They are those of Pallas, whose names end in `_kernel`, and of jax_triton. XLA makes some of its own with Triton
    too, which are left out.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: the CUDA plugin or `ptxas` is not installed.
    """
    with tempfile.TemporaryDirectory() as dump:
        folder = Path(dump)
        # Mosaic writes PTX of the newest version that the `ptxas` on the PATH takes: it has to be the one below.
        programs = f"{Path(_tool('ptxas')).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=dump, PATH=programs):
            lowered = lower_for(gpu, function, *shapes)
            _compile(lowered, xla_dump_to=dump, xla_dump_emitter_re=".*")
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
        kernels = []
        for path in sorted(folder.glob("*.ptx")):
            text = path.read_text(encoding="utf-8")
            if not any(f".entry {name}(" in text for name in entries):
                continue  # One of XLA's own kernels, whose constants are elsewhere.
            kernels += [
                Kernel(use.name, use.registers, use.spill_bytes, *entries[use.name], use.warnings, use.loops)
                for use in assemble(gpu, path)
                if use.name in entries and re.search(r"_kernel(_\d+)?$", use.name)
            ]
        for number, call in enumerate(triton_calls(lowered)):
            path = folder / f"jax_triton_{number}.ptx"
            path.write_text(call.ptx, encoding="utf-8")
            (use,) = assemble(gpu, path)
            bits = 64 if re.search(r"tt\.addptr\W[^\n]*\bi64\b|tt\.addptr\W[^\n]*xi64", call.ttir) else 32
            kernels.append(
                Kernel(use.name, use.registers, use.spill_bytes, call.shared_memory, bits, use.warnings, use.loops)
            )
    if not kernels:
        raise NoKernelError("the program has no kernel of Pallas or jax_triton")
    return kernels


class NoKernelError(ValueError):
    """A program without kernels, or with such that this process has compiled before: Mosaic keeps them."""


class AssemblyError(ValueError):
    """PTX that `ptxas` refuses, such as of a later version than its own."""


class Assembled(NamedTuple):
    """What a kernel in a file of PTX needs."""

    name: str
    registers: int
    spill_bytes: int
    warnings: tuple[str, ...]
    loops: tuple[Loop, ...] | None


def assemble(gpu: str, path: Path) -> list[Assembled]:
    """Assemble a file of PTX for one GPU, and read what each kernel needs.

    Raises:
        NotImplementedError: `ptxas` is not installed.
        AssemblyError: it refuses the file.
    """
    cubin = path.with_suffix(".cubin")
    command = [_tool("ptxas"), "-v", f"-arch={find_gpu(gpu).architecture}", str(path), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssemblyError(done.stderr.strip().splitlines()[0].partition("; ")[2])
    report = done.stderr
    loops = None
    with contextlib.suppress(NotImplementedError):
        loops = loops_of(_tool("nvdisasm"), cubin)
    return [Assembled(*use, None if loops is None else loops.get(use[0], ())) for use in uses_in(report)]


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
        return f"one row, compiled for {find_gpu(gpu).name}"
    rows = "one row" if size.data == 1 else f"{size.data} rows"
    return f"{rows} in total, compiled for {size.devices} x {find_gpu(gpu).name} ({mesh}), sizes of each"


def compiled_with(head: Mapping[str, Any]) -> str:
    """Provenance of a result of the compiler, for the footer of its table."""
    runs = head["runs"]
    commits = ", ".join(dict.fromkeys(run["machine"]["commit"] for run in runs))
    commands = "; ".join(dict.fromkeys(f"`{run['command']}`" for run in runs))
    return f"Jax {runs[-1]['machine']['versions']['jax']}, commit {commits}; {commands}."


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
    return _compile(lower_for(gpu, function, *shapes, mesh=mesh), **options)


def _compile(lowered: jax.stages.Lowered, **options: Any) -> jax.stages.Compiled:
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # An executable for an absent device can be written to the cache, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile(OPTIONS | options)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def lower_for(gpu: str, function: jax.stages.Wrapped, *shapes: Any, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """As `compile_for`, without the compiler: its input."""
    mesh = mesh or Mesh(np.array(gpus_like(gpu, 1)), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or place), shapes)
    with jax.set_mesh(mesh):
        traced = function.trace(*placed)
        # Of the default device, Mosaic asks the compute capability.
        with jax.default_device(mesh.devices.flat[0]):
            return traced.lower(lowering_platforms=("cuda",))


def assembler() -> str:
    """Version of `ptxas`.

    Raises:
        NotImplementedError: it is not installed.
    """
    text = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True, check=True).stdout
    return text.strip().splitlines()[-1]


def uses_in(report: str) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """Name, registers, spilled bytes and warnings of each kernel in the report of `ptxas -v`."""
    uses = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise ValueError(f"cannot parse the report of ptxas: {part}")
        # "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized ... in function 'slow'"
        lines = re.findall(r"\(C75\d\d\).*", report)
        warnings = tuple(line.strip() for line in lines if f"'{name}'" in line or "function '" not in line)
        uses.append((name, int(registers.group(1)), max(map(int, spills.groups())), warnings))
    return uses


def _tool(name: str) -> str:
    """`ptxas` or `nvdisasm`: from the package nvidia-cuda-nvcc-cu12, a toolkit, or the package triton.

    Raises:
        NotImplementedError: it is in none of them.
    """
    with contextlib.suppress(PackageNotFoundError):
        for file in files("nvidia-cuda-nvcc-cu12") or ():
            if file.name == name:
                return str(file.locate())
    path = shutil.which(name)
    if path is None and (triton := find_spec("triton")) and triton.origin:
        path = shutil.which(name, path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if path is None:
        raise NotImplementedError(f"{name} was not found: pip install nvidia-cuda-nvcc-cu12 triton")
    return path
