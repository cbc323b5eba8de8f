"""`duo eval memory`: what a program takes of a GPU's memory, from the compiler; the GPU need not be there."""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from duo_train.data.batches import LABEL_MULTIPLE, Batch
from duo_train.devices import BY_TOKEN, Sharding
from duo_train.gated import GatedModel
from duo_train.loop import State, step
from duo_train.recipes import Distill
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_eval.aot.compile import compile_for, compiled_with, gpus_like, gpus_of, memory_of
from duo_eval.runner.record import begun, write
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_jax import PRESETS, ModelConfig, infer
from duo_jax.cli.devices import DeviceOptions
from duo_jax.gpus import GPUS
from duo_jax.mesh.mesh import MeshSize, mesh_of
from duo_jax.mesh.place import model_shapes
from duo_jax.plan import Plan, any_pattern


@dataclass(frozen=True)
class MemoryTask:
    """Compile training, prefill or decode of a model ahead of time for a GPU and report the memory that it takes."""

    programs: tuple[Literal["training", "prefill", "decode"], ...] = ("training",)
    """A training step of distill; a chunk of a prompt at the end of a full cache; a step of decoding."""
    model: str = "llama-3-8b"
    """A shape by name, see duo inspect."""
    lengths: tuple[int, ...] = (8192, 16384, 32768)
    """Tokens of a sample, or of the cache."""
    sparsity: float = 0.5
    """Fraction of KV heads that stream, in prefill and decode."""
    chunk: int = 8192
    """Tokens of a chunk of the prompt."""
    gpu: str = "a100-80g"
    """a100-80g, h100-80g, h200, b200 or rtx-4090."""
    layers: int | None = None
    """Layers; all of the model's by default."""
    dtype: str = "bfloat16"
    """Data type of weights, activations and cache."""
    weight_dtype: str | None = None
    """Quantize the weights of linear maps, in prefill and decode: int8, w8a8, int4, int4-32 or int4-128."""
    kv_dtype: str | None = None
    """Data type of the cache, where it is another: int8 and int4 quantize retrieval heads' keys and values."""
    backend: str = "triton"
    """Attention backend."""
    mesh: str | None = None
    """GPUs that share a training step, such as data=2,sequence=4; what is reported is of each."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Compile every program at every length, print a line for each."""
        if self.model not in PRESETS:
            raise ValueError(f"unknown shape {self.model!r}; there are {', '.join(PRESETS)}")
        if not self.lengths or min(*self.lengths, self.chunk) < 1:
            raise ValueError(f"lengths and chunk must be at least 1, got {self.lengths=}, {self.chunk=}")
        if "prefill" in self.programs and self.chunk > min(self.lengths):
            raise ValueError(f"a chunk must fit into the cache, got {self.chunk=} and {self.lengths=}")
        size = DeviceOptions(self.mesh).size
        if size.devices > 1 and self.programs != ("training",):
            raise ValueError("--mesh is for the training program; duo plan --mesh --verify has prefill and decode")
        if any(length % size.sequence for length in self.lengths):
            raise ValueError(f"lengths must be multiples of sequence={size.sequence}, got {self.lengths=}")
        mesh = mesh_of(size, gpus_like(self.gpu, size.devices))
        config = PRESETS[self.model]
        config = replace(config, num_layers=self.layers or config.num_layers, dtype=self.dtype)
        record: dict[str, Any] = begun(self.out, asdict(self))
        for program in self.programs:
            for length in self.lengths:
                begin = time.perf_counter()
                memory = memory_of(compile_for(self.gpu, *self._program(program, config, length, mesh), mesh=mesh))
                found = {"program": program, "tokens": length, **asdict(memory), "total": memory.total}
                record["results"].append(found | {"compile_seconds": time.perf_counter() - begin})
                if self.out is not None:
                    write(self.out, record)
                share = memory.total / GPUS[self.gpu].memory_bytes
                print(
                    f"{self.model}, {program}, {length} tokens, {gpus_of(self.gpu, self.mesh)}: arguments "
                    f"{memory.arguments / 1e9:.1f} GB, temporaries {memory.temporaries / 1e9:.1f} GB, in all "
                    f"{memory.total / 1e9:.1f} GB, {share:.0%} of it",
                    flush=True,
                )

    def _program(self, program: str, config: ModelConfig, length: int, mesh: Mesh) -> tuple[Any, ...]:
        if program == "training":
            return training_step(config, length, GatedModel(backend=self.backend), mesh)
        pattern = any_pattern(config, self.sparsity) if self.sparsity else None
        plan = Plan(
            replace(config, weight_dtype=self.weight_dtype), pattern, chunk_size=self.chunk, kv_dtype=self.kv_dtype
        )
        return (prefill_chunk if program == "prefill" else decode)(plan, length, self.backend)


def training_step(config: ModelConfig, length: int, attention: GatedModel, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """A step of `distill` with one sample, or one for each group of devices, and the shapes of its arguments."""
    recipe = Distill()
    if mesh is not None:
        attention = Sharding(mesh, config, MeshSize.of(mesh).data).model(attention)

    def shape(sizes: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    gates, rows = shape((config.num_layers, config.num_kv_heads), jnp.float32), MeshSize.of(mesh).data
    state = State(shape((), jnp.int32), gates, jax.eval_shape(recipe.optimizer().init, gates))
    # Ten passkeys of 32 words.
    labels, by_row = (1, rows, 2 * LABEL_MULTIPLE), (None, "data")
    tokens = shape((1, rows, length), jnp.int32, None, *BY_TOKEN)
    batch = Batch(tokens, shape(labels, jnp.int32, *by_row), shape(labels, jnp.bool_, *by_row))
    targets = shape((*labels, config.embed_dim), jnp.float32, *by_row)
    return jax.jit(partial(step, recipe, attention)), model_shapes(config, None), state, batch, targets


def prefill_chunk(plan: Plan, length: int, backend: str, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """A chunk of a prompt, as `duo_jax.prefill` runs it, and the shapes of its arguments; `mesh`: of `plan.mesh`."""
    shape, rows = jax.ShapeDtypeStruct, plan.batch_size
    tokens, counts = shape((rows, plan.chunk_size), jnp.int32), shape((rows,), jnp.int32)
    last = shape((rows, plan.config.embed_dim), jnp.dtype(plan.config.dtype))
    # Weights that this program does not read, those of the head, lie in the device's memory all the same.
    program = jax.jit(partial(infer.extend, backend=backend), donate_argnums=(2, 4), keep_unused=True)
    return program, model_shapes(plan.config, mesh), tokens, _cache(plan, length, mesh), counts, last


def decode(plan: Plan, length: int, backend: str, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """A step of decoding, as `duo_jax.decode_step` runs it, and the shapes of its arguments; `mesh`: of `plan.mesh`."""
    shape, rows = jax.ShapeDtypeStruct, (plan.batch_size,)
    program = jax.jit(partial(infer.step, backend=backend), donate_argnums=2)
    cache = _cache(plan, length, mesh)
    return program, model_shapes(plan.config, mesh), shape(rows, jnp.int32), cache, shape(rows, jnp.bool_)


def _cache(plan: Plan, length: int, mesh: Mesh | None) -> Any:
    return plan.cache(length, mesh).abstract()


def memory_table(path: Path) -> str:
    """Device memory of each program."""
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = record["settings"]
    sizes = ("arguments", "temporaries", "total")
    rows = [
        (result["program"], result["tokens"], *(f"{result[name] / 1e9:.1f}" for name in sizes))
        for result in record["results"]
    ]
    table = rows_to_table(rows, ["program", "tokens", "arguments, GB", "temporary, GB", "total, GB"])
    target = gpus_of(settings["gpu"], settings.get("mesh"))
    about = f"{settings['model']}, {settings['dtype']}, backend {settings['backend']}, {target}; not run."
    return f"{table}\n\n{about} {compiled_with(record)}"


RESULT = ResultType("Memory, from the compiler", with_fields("program", "temporaries"), {"Programs": memory_table})
