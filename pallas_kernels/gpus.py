"""Facts about GPUs: those known by name, described for planners and compilers, and the one that programs are for."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax

# Fraction of a GPU's memory that programs may take; jax's own default is three quarters. The rest is for what jax's
# allocator does not manage: CUDA's context, libraries and their workspaces, and fragmentation.
MEMORY_FRACTION = 0.95


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, to plan and compile for without the device."""

    name: str
    """As the driver reports it, `jax.Device.device_kind`."""
    capability: tuple[int, int]
    """Compute capability, as in (9, 0)."""
    cores: int
    """Multiprocessors; 0: unknown."""
    memory_bytes: int
    """Total that the CUDA driver reports: less than is sold, for error correction and the driver's own use."""
    bandwidth: int
    """Bytes of memory per second."""
    l2_bytes: int
    clock_ghz: float

    @property
    def usable_bytes(self) -> int:
        """Bytes that programs may take: `MEMORY_FRACTION` of the total."""
        return int(self.memory_bytes * MEMORY_FRACTION)

    @property
    def shared_memory_per_core(self) -> int:
        """Bytes of shared memory of a multiprocessor, which keeps one KiB of each block's share for itself."""
        return shared_memory_per_block(self.capability) + 1024

    @property
    def chip(self) -> "Chip":
        """What backends and tiles are chosen by."""
        return Chip(self.capability, self.cores or None, shared_memory_per_block(self.capability))

    @property
    def architecture(self) -> str:
        """As `ptxas -arch` takes it."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def target_config(self) -> str:
        """Description for XLA's compiler, a `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        threads = 2048 if self.capability in ((8, 0), (9, 0), (10, 0)) else 1536
        features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
              cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
              core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_bytes}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
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


# Cores, bandwidth, caches and clocks are those of NVIDIA's data sheets and architecture papers. Memory is the total
# that CUDA reports, rounded down: data sheets have what is sold. PyTorch's out-of-memory messages quote it. Published
# ones, in GiB: A100 79.14 to 79.25 and 39.39 to 39.50, H100 79.10 to 79.25, H100 NVL 93.00 to 93.10, GH200 94.50 and
# (144G) 142.50, H20 95.1 to 95.22, H200 139.72 to 139.81, B200 178.35 to 178.36, A10 and A10G 21.96 to 22.15, L40S
# 44.34 to 44.47, RTX 3090 23.50 to 23.70, RTX 4090 23.61 to 23.68, RTX 5090 31.34 to 31.51, A30 23.53
# to 23.69, A40 44.34 to 44.56, L4 22.03 to 22.17, L40 44.39 to 44.52, RTX A6000 47.40 to 47.54, RTX 6000 Ada 44.39 with
# error correction and 47.50 without, RTX PRO 6000 94.97.
_TABLE = """
    key          capability  cores    GiB  GB/s  L2 MiB    GHz  name
    a100-80g     8.0           108   79.1  2039      40   1.41  NVIDIA A100-SXM4-80GB
    a100-40g     8.0           108   39.3  1555      40   1.41  NVIDIA A100-SXM4-40GB
    h100-80g     9.0           132   79.1  3350      50   1.98  NVIDIA H100 80GB HBM3
    h100-pcie    9.0           114   79.1  2000      50  1.755  NVIDIA H100 PCIe
    h100-nvl     9.0           132   93.0  3900      50  1.785  NVIDIA H100 NVL
    gh200        9.0           132   94.5  4000      50   1.98  NVIDIA GH200 480GB
    gh200-144g   9.0           132  142.5  4900      50   1.98  NVIDIA GH200 144G HBM3e
    h20          9.0            78   95.0  4000      60   1.98  NVIDIA H20
    h200         9.0           132  139.7  4800      50   1.98  NVIDIA H200
    b200         10.0          148  178.3  8000     126   1.97  NVIDIA B200
    a30          8.0            56   23.5   933      24   1.44  NVIDIA A30
    a10          8.6            72   21.9   600       6  1.695  NVIDIA A10
    a10g         8.6            80   21.9   600       6   1.71  NVIDIA A10G
    a40          8.6            84   44.3   696       6   1.74  NVIDIA A40
    l4           8.9            58   22.0   300      48   2.04  NVIDIA L4
    l40          8.9           142   44.3   864      96   2.49  NVIDIA L40
    l40s         8.9           142   44.3   864      96   2.52  NVIDIA L40S
    rtx-a6000    8.6            84   47.4   768       6   1.80  NVIDIA RTX A6000
    rtx-6000-ada 8.9           142   44.3   960      96   2.51  NVIDIA RTX 6000 Ada Generation
    rtx-pro-6000 12.0          188   94.9  1792     128   2.62  NVIDIA RTX PRO 6000 Blackwell Workstation Edition
    rtx-3090     8.6            82   23.5   936       6  1.695  NVIDIA GeForce RTX 3090
    rtx-4090     8.9           128   23.5  1008      72   2.52  NVIDIA GeForce RTX 4090
    rtx-5090     12.0          170   31.3  1792      96   2.41  NVIDIA GeForce RTX 5090
"""


def _gpu(row: str) -> tuple[str, Gpu]:
    key, capability, cores, memory, bandwidth, l2, clock, name = row.split(maxsplit=7)
    major, minor = map(int, capability.split("."))
    sizes = int(float(memory) * (1 << 30)), int(bandwidth) * 10**9, int(l2) << 20
    return key, Gpu(name, (major, minor), int(cores), *sizes, clock_ghz=float(clock))


GPUS: dict[str, Gpu] = dict(map(_gpu, _TABLE.strip().splitlines()[1:]))


def find_gpu(name: str) -> Gpu:
    """A GPU by its key in `GPUS`, or as people and drivers write it.

    As in "H100 NVL", "4090" or "NVIDIA A100-SXM4-80GB"; "h100" is the first of its variants.

    Raises:
        ValueError: an unknown one.
    """
    key, by_driver = _key_of(name), {_key_of(gpu.name): gpu for gpu in GPUS.values()}
    found = GPUS.get(key) or GPUS.get(f"rtx-{key}") or by_driver.get(key)
    found = found or next((gpu for each, gpu in GPUS.items() if each.startswith(f"{key}-")), None)
    if found is None:
        raise ValueError(f"unknown GPU {name!r:.60}: choose one of {', '.join(GPUS)}")
    return found


def _key_of(name: str) -> str:
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    return key.removeprefix("nvidia-").removeprefix("geforce-")


def find_capability(text: str) -> Gpu | None:
    """A GPU of which no more is known than its compute capability, "8.9" or "sm_89"; None: the text is none."""
    found = re.fullmatch(r"(?:sm_?)?(\d+)\.(\d)|sm_?(\d+)(\d)a?", text.strip().lower())
    if found is None:
        return None
    major, minor = (int(part) for part in found.groups() if part is not None)
    gpu = Gpu(f"a GPU of compute capability {major}.{minor}", (major, minor), 0, 0, 0, 0, 0.0)
    _ABSENT[gpu.name] = gpu
    return gpu


# GPUs that programs may be traced for, by the kind of device.
_ABSENT: dict[str, Gpu] = {gpu.name: gpu for gpu in GPUS.values()}


def tracing_for(gpu: Gpu) -> AbstractContextManager[Any]:
    """Within it, programs are traced for a GPU that need not be here."""
    device = jax.sharding.AbstractDevice(gpu.name, gpu.cores, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device))


def device_kind() -> str:
    """Kind of device that programs are traced for: that of the mesh in use, otherwise of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


@dataclass(frozen=True)
class Chip:
    """What backends and tiles are chosen by, whatever name a product has."""

    capability: tuple[int, int] | None
    """Compute capability, as in (9, 0); None for a CPU, and for accelerators that are not NVIDIA's."""
    cores: int | None
    """Multiprocessors; None: unknown."""
    shared_memory: int
    """Bytes of shared memory that a block may take; 0 without a compute capability."""

    @property
    def is_hopper(self) -> bool:
        """Whether products read their right factor from shared memory; elsewhere each warp has it in registers."""
        return self.capability is not None and self.capability[0] == 9


def shared_memory_per_block(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may take on GPUs of a compute capability (CUDA programming guide, 20.2)."""
    kib = {(7, 0): 96, (7, 2): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    # 99 KiB: the GPUs of workstations and games, 8.6, 8.9 and 12.0, and a safe guess for later ones.
    return kib.get(capability, 99 if capability > (8, 0) else 48) * 1024


def chip() -> Chip:
    """The chip that programs are traced for: the driver's facts, or those of `GPUS` for a GPU that is not here."""
    device = jax.devices()[0]
    if device.device_kind != device_kind():  # Programs are compiled for a GPU that is not here.
        gpu = _ABSENT.get(device_kind())
        return Chip(None, None, 0) if gpu is None else gpu.chip
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return Chip(None, None, 0)
    capability = int(major), int(minor)
    shared = getattr(device, "shared_memory_per_block_optin", None) or shared_memory_per_block(capability)
    return Chip(capability, getattr(device, "core_count", None), int(shared))
