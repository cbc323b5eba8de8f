"""A plan held against the compiler: the programs of inference compiled for a GPU, and what they really take."""

from typing import Any

from duo_eval.aot.collectives import collectives, summary
from duo_eval.aot.compile import compile_for, gpus_like, memory_of
from duo_eval.aot.memory import decode, prefill_chunk
from duo_jax.mesh.mesh import mesh_of
from duo_jax.plan import Plan

# How far a plan may be off what the compiler says.
TOLERANCE = 0.03


def verify(plan: Plan, length: int, gpu: str, backend: str = "triton") -> dict[str, Any]:
    """Compile a chunk of prefill and a decode step with a cache of `length` tokens; all sizes are in bytes.

    On a mesh, of each device, and of what the devices send each other.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: a backend that cannot, or no compiler for GPUs here.
    """
    programs: dict[str, dict[str, Any]] = {}
    mesh = None if plan.mesh.devices == 1 else mesh_of(plan.mesh, gpus_like(gpu, plan.mesh.devices))
    for name, program in (("prefill", prefill_chunk), ("decode", decode)):
        compiled = compile_for(gpu, *program(plan, length, backend, mesh), mesh=mesh)
        memory = memory_of(compiled)
        programs[name] = {
            "arguments": memory.arguments,
            "outputs": memory.outputs,
            "aliased": memory.aliased,
            "temporaries": memory.temporaries,
            "total": memory.total,
        }
        if mesh is not None:
            programs[name] |= {"collectives": summary(collectives(compiled))}
    total = max(found["total"] for found in programs.values())
    planned = plan.total(length)
    found = {"gpu": gpu, "backend": backend, "context": length, "programs": programs}
    return found | {"total": total, "planned": planned, "deviation": planned / total - 1}


def is_close(found: dict[str, Any]) -> bool:
    """Whether a plan was within `TOLERANCE` of the compiler's figure."""
    return abs(found["deviation"]) <= TOLERANCE
