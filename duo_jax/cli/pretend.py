"""`duo doctor --pretend GPU`: what would run on a GPU that is not here, by operation, and why the rest would not."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

from duo_jax.cli.serve import Serve
from duo_jax.generation.chunks import most_at_a_time
from pallas_kernels import BACKENDS
from pallas_kernels.backends import candidates, find_backend, preferences
from pallas_kernels.gpus import Gpu, find_capability, find_gpu, tracing_for
from pallas_kernels.ptxas import SUSPECTED, ptxas_version, version_text
from pallas_kernels.segments import can_be_short
from pallas_kernels.tiles import tiles_of
from pallas_kernels.types import OPERATIONS, Request


@dataclass(frozen=True)
class Heads:
    """What is asked of the backends: heads of a model, and a cache."""

    name: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    bits: int | None = None
    page: int | None = None


# The heads of Llama-3 and most other models, then what other models and flags change.
HEADS = (
    Heads("bfloat16, head dim 128"),
    Heads("bfloat16, head dim 128, int4 cache", bits=4),
    Heads("bfloat16, head dim 128, a server's cache", page=Serve.page_size),
    Heads("bfloat16, head dim 256", head_dim=256),
    Heads("float32, head dim 128", dtype="float32"),
)
GROUP, CAPACITIES = 4, (131_072, 320)


def pretend(name: str) -> dict[str, Any]:
    """For each kind of heads and each operation: candidates with their tiles, and why other backends are none.

    Args:
        name: of a GPU, or a compute capability, as in "8.9" or "sm_89".

    Raises:
        ValueError: an unknown GPU.
    """
    gpu = find_capability(name) or _named(name)
    with tracing_for(gpu):
        heads = {each.name: {name: _chosen(gpu, each, **what) for name, what in _asked(each).items()} for each in HEADS}
    return {
        "gpu": gpu.name,
        "capability": ".".join(map(str, gpu.capability)),
        "cores": gpu.chip.cores,
        "shared_memory": gpu.chip.shared_memory,
        "chunk_size": most_at_a_time(on_gpu=True),
        "ptxas": version_text(ptxas_version("mosaic")),
        "heads": heads,
    }


def lines_of(record: dict[str, Any]) -> Iterator[str]:
    """The same as text."""
    yield (
        f"{record['gpu']}: sm_{record['capability'].replace('.', '')}, {record['cores'] or 'unknown'} multiprocessors, "
        f"{record['shared_memory'] >> 10} KiB of shared memory a block"
    )
    yield f"chunks of {record['chunk_size']} tokens, shared by the rows of a batch"
    yield f"ptxas here: {record['ptxas']}{_suspicion(record['capability'])}"
    yield "Candidates, the best first as expected. Certification on the GPU takes the fastest one that is right there."
    for heads, operations in record["heads"].items():
        yield heads
        for operation, found in operations.items():
            yield f"  {operation:<11} {', '.join(found['candidates'])}"
            for backend, kernels in found["tiles"].items():
                yield from (f"              {backend}, {kernel}: {text}" for kernel, text in kernels.items())
            yield from (f"              not {backend}: it {reason}" for backend, reason in found["refused"].items())


def _named(name: str) -> Gpu:
    try:
        return find_gpu(name)
    except ValueError as error:
        raise ValueError(
            f"{error}. Of others, the compute capability will do, as in 8.9: https://developer.nvidia.com/cuda-gpus"
        ) from None


def _suspicion(capability: str) -> str:
    if capability != "9.0" or ptxas_version("mosaic") not in SUSPECTED:
        return ""
    return " (suspected, not known, to compile other Hopper kernels wrongly: mosaic needs its certification)"


def _asked(heads: Heads) -> dict[str, dict[str, Any]]:
    """What is asked for some heads, by name."""
    names = [operation for operation in OPERATIONS if heads.page is None or operation != "training"]
    asked: dict[str, dict[str, Any]] = {operation: {"operation": operation} for operation in names}
    if heads.bits and can_be_short(heads.dtype, heads.head_dim):
        asked["short chunk"] = {"operation": "prefill", "is_short": True}
    return asked


def _chosen(gpu: Gpu, heads: Heads, operation: str, *, is_short: bool = False) -> dict[str, Any]:
    is_cached = operation != "training"
    request = Request(
        operation,
        gpu.name,
        frozenset([heads.dtype]),
        heads.head_dim,
        GROUP,
        bits=frozenset([heads.bits] if heads.bits and is_cached else []),
        capacities=(heads.page or CAPACITIES[0], *CAPACITIES[1:]) if is_cached else (),
        page=heads.page if is_cached else None,
        is_short=is_short,
        capability=gpu.capability,
        full=(f"int{heads.bits}" if heads.bits else heads.dtype) if is_cached else None,
    )
    able, wanted = candidates(request), preferences(request)
    refused = {}
    for name in BACKENDS:
        reason = find_backend(name).supports(request)
        if name == "reference":
            continue  # Dense: for tests.
        if reason is not None:
            refused[name] = reason
        elif name not in wanted:
            refused[name] = "is not preferred for this operation on this kind of GPU: name it to run it"
    return {
        "candidates": list(able),
        "tiles": {
            backend: {kernel: _text(tiles) for kernel, tiles in tiles_of(backend, request).items()}
            for backend in able
            if tiles_of(backend, request)
        },
        "refused": refused,
    }


def _text(tiles: Any) -> str:
    return ", ".join(f"{field.name} {value}" for field, value in zip(fields(tiles), astuple(tiles), strict=True))
