"""The programs of training and inference with the shapes of their arguments, ready to be compiled for any device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from duo_train.data.batches import LABEL_MULTIPLE, Batch
from duo_train.devices import BY_TOKEN, Sharding
from duo_train.gated import GatedModel
from duo_train.loop import State, step
from duo_train.recipes import Distill
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_eval.aot.collectives import collectives, summary
from duo_eval.aot.compile import compile_for, gpus_like, memory_of
from duo_jax import ModelConfig
from duo_jax.generation import infer
from duo_jax.mesh.fsdp import fsdp_shapes
from duo_jax.mesh.mesh import MeshSize, mesh_of
from duo_jax.mesh.place import model_shapes
from duo_jax.plan import Plan

# A jitted function, then the shapes of its arguments.
Program = tuple[Any, ...]
# Deviation of a plan from the compiler's figure that is accepted.
TOLERANCE = 0.03


def training_step(
    config: ModelConfig, length: int, attention: GatedModel, mesh: Mesh | None = None, *, fsdp: bool = True
) -> Program:
    """A step of `distill` with one sample, or one for each group of devices, which share the weights (`fsdp`)."""
    recipe, fsdp = Distill(), fsdp and MeshSize.of(mesh).devices > 1
    if mesh is not None:
        attention = Sharding(mesh, config, MeshSize.of(mesh).data).model(attention)

    def shape(sizes: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    gates, rows = shape((len(config.full_layers), config.num_kv_heads), jnp.float32), MeshSize.of(mesh).data
    params = jax.tree.map(lambda x: shape(x.shape, x.dtype), jax.eval_shape(recipe.init, gates))
    state = State(shape((), jnp.int32), params, jax.eval_shape(recipe.optimizer().init, params))
    # Ten passkeys of 32 words.
    labels, by_row = (1, rows, 2 * LABEL_MULTIPLE), (None, "data")
    tokens = shape((1, rows, length), jnp.int32, None, *BY_TOKEN)
    batch = Batch(tokens, shape(labels, jnp.int32, *by_row), shape(labels, jnp.bool_, *by_row))
    targets = shape((*labels, config.embed_dim), jnp.float32, *by_row)
    model = fsdp_shapes(config, mesh) if fsdp and mesh is not None else model_shapes(config, None)
    return jax.jit(partial(step, recipe, attention)), model, state, batch, targets


def prefill_chunk(plan: Plan, length: int, backend: str | None, mesh: Mesh | None = None) -> Program:
    """A chunk of a prompt as `duo_jax.prefill` runs it, at the end of a cache of `length` tokens."""
    shape, rows = jax.ShapeDtypeStruct, plan.batch_size
    tokens, counts = shape((rows, plan.chunk_size), jnp.int32), shape((rows,), jnp.int32)
    last = shape((rows, plan.config.embed_dim), jnp.dtype(plan.config.dtype))
    # Weights that this program does not read, those of the head, are in the device's memory all the same.
    program = jax.jit(partial(infer.extend, backend=backend), donate_argnums=(2, 4), keep_unused=True)
    return program, model_shapes(plan.config, mesh), tokens, plan.cache(length, mesh).abstract(), counts, last


def decode(plan: Plan, length: int, backend: str | None, mesh: Mesh | None = None) -> Program:
    """A step of decoding as `duo_jax.decode_step` runs it, with a cache of `length` tokens."""
    shape, rows = jax.ShapeDtypeStruct, (plan.batch_size,)
    program = jax.jit(partial(infer.step, backend=backend), donate_argnums=2)
    cache = plan.cache(length, mesh).abstract()
    return program, model_shapes(plan.config, mesh), shape(rows, jnp.int32), cache, shape(rows, jnp.bool_)


def verify(plan: Plan, length: int, gpu: str, backend: str = "triton") -> dict[str, Any]:
    """Compare a plan with the compiler: prefill and decode with a cache of `length` tokens; all sizes are in bytes.

    On a mesh, sizes are those of each device, and the traffic between devices is reported too.

    Raises:
        ValueError: an unknown GPU.
        NotImplementedError: a backend that does not support this, or no compiler for GPUs here.
    """
    programs: dict[str, dict[str, Any]] = {}
    mesh = None if plan.mesh.devices == 1 else mesh_of(plan.mesh, gpus_like(gpu, plan.mesh.devices))
    for name, program in (("prefill", prefill_chunk), ("decode", decode)):
        compiled = compile_for(gpu, *program(plan, length, backend, mesh), mesh=mesh)
        programs[name] = memory_of(compiled).sizes()
        if mesh is not None:
            programs[name] |= {"collectives": summary(collectives(compiled))}
    total = max(sizes["total"] for sizes in programs.values())
    planned = plan.total(length)
    return {
        "gpu": gpu,
        "backend": backend,
        "context": length,
        "programs": programs,
        "total": total,
        "planned": planned,
        "deviation": planned / total - 1,
    }


def is_close(verified: dict[str, Any]) -> bool:
    """Whether a plan was within `TOLERANCE` of the compiler's figure."""
    return abs(verified["deviation"]) <= TOLERANCE
