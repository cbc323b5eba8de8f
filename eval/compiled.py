"""Programs compiled ahead of time for a GPU that need not be there: what they take of its memory.

Needs the CUDA plugin of jax (`pip install jax-cuda12-plugin jax-cuda12-pjrt`, the version of jax), and neither a driver
nor a device. Executables are not run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks about a GPU."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory_bytes: int
    bandwidth: int
    shared_memory_per_core: int
    l2_bytes: int
    clock_ghz: float

    @property
    def config(self) -> str:
        """A `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
              cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
              core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_bytes}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.12.0"
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{self.name}"
        """


GPUS: dict[str, Gpu] = {
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 << 30, 2_039_000_000_000, 167_936, 40 << 20, 1.41),
    "h100-80g": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 << 30, 3_350_000_000_000, 233_472, 50 << 20, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 141 << 30, 4_800_000_000_000, 233_472, 50 << 20, 1.98),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory that one program needs while it runs."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def total(self) -> int:
        """All of it; an output that takes its argument's place counts once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


def memory_on(gpu: str, function: Callable, *shapes: Any) -> Memory:
    """Compile `function` for one GPU and read what it needs; `shapes` are pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: the CUDA plugin is not installed.
    """
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; there are {', '.join(GPUS)}")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, target_config=GPUS[gpu].config, topology="1x1x1"
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotImplementedError(
            f"cannot compile for a GPU here: {first}. pip install jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__}"
        ) from None
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):
        program = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
    found = program.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )
