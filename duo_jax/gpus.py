"""GPUs by name, to plan and compile for devices that need not exist. Knows no model."""

from dataclasses import dataclass

# Fraction of a GPU's memory for programs; jax's own default is three quarters. The rest is for fragmentation, and for
# CUDA's context, libraries and their workspaces, which jax's allocator does not manage.
MEMORY_FRACTION = 0.95


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """The driver's name; `pallas_kernels.gpus` has its compute capability under it."""
    cores: int
    """Multiprocessors."""
    memory_bytes: int
    """Memory that the CUDA driver reports: less than the nominal size, for error correction and the driver itself."""
    bandwidth: int
    """Memory bandwidth in bytes per second."""
    shared_memory_per_core: int
    l2_bytes: int
    clock_ghz: float

    @property
    def usable_bytes(self) -> int:
        """Memory for programs: the driver's figure times `MEMORY_FRACTION`."""
        return int(self.memory_bytes * MEMORY_FRACTION)


def _gib(count: float) -> int:
    return int(count * (1 << 30))


# Cores, bandwidth, caches and clocks are from NVIDIA's data sheets. Memory is the total that CUDA reports, rounded
# down: PyTorch's out-of-memory messages quote it, and published ones have 79.14 to 79.25 GiB for GPUs of 80 GB, 139.72
# to 139.81 for an H200, 178.35 to 178.36 for a B200, 23.61 to 23.68 for an RTX 4090.
GPUS: dict[str, Gpu] = {
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 108, _gib(79.1), 2_039_000_000_000, 167_936, 40 << 20, 1.41),
    "h100-80g": Gpu("NVIDIA H100 80GB HBM3", 132, _gib(79.1), 3_350_000_000_000, 233_472, 50 << 20, 1.98),
    "h200": Gpu("NVIDIA H200", 132, _gib(139.7), 4_800_000_000_000, 233_472, 50 << 20, 1.98),
    "b200": Gpu("NVIDIA B200", 148, _gib(178.3), 8_000_000_000_000, 233_472, 126 << 20, 1.97),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", 128, _gib(23.5), 1_008_000_000_000, 102_400, 72 << 20, 2.52),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        ValueError: an unknown one.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"unknown GPU {name!r}: choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
