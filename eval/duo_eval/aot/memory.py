"""`duo eval memory`: the memory that a program needs on a GPU, from the compiler; the GPU need not be present."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from duo_train.gated import GatedModel
from jax.sharding import Mesh

from duo_eval.aot.compile import compile_for, compiled_with, gpus_like, gpus_of, memory_of
from duo_eval.aot.programs import Program, decode, prefill_chunk, training_step
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_jax import PRESETS, ModelConfig
from duo_jax.cli.devices import DeviceOptions
from duo_jax.mesh.mesh import mesh_of
from duo_jax.model.precision import FloatDtype, KvDtype, WeightDtype
from duo_jax.plan import Plan, any_pattern
from pallas_kernels.gpus import find_gpu


@dataclass(frozen=True)
class MemoryTask:
    """Compile training, prefill or decode of a model ahead of time for a GPU and report the memory that it needs."""

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
    """Names, such as a100-80g, h200 or rtx-4090; the message about a wrong one lists all."""
    layers: int | None = None
    """Number of layers; all of the model's by default."""
    dtype: FloatDtype = "bfloat16"
    """Data type of weights, activations and cache."""
    weight_dtype: WeightDtype | None = None
    """Quantize the weights of linear maps, in prefill and decode: int8, w8a8, int4, int4-32 or int4-128."""
    kv_dtype: KvDtype | None = None
    """Data type of the cache if it differs: int8 and int4 quantize retrieval heads' keys and values."""
    backend: str = "triton"
    """Attention backend."""
    mesh: str | None = None
    """GPUs that share a training step, such as data=2,sequence=4; sizes are those of each."""
    fsdp: bool = True
    """On a mesh, shard the weights as duo identify does; otherwise each GPU has a copy."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Compile every program at every length, print a line for each."""
        config, mesh = self._config(), self._mesh()
        record = Record.open(self.out, {"task": "memory", **asdict(self)}, again=True)
        with record.writing() as append:
            for program in self.programs:
                for length in self.lengths:
                    begin = time.perf_counter()
                    compiled = compile_for(self.gpu, *self._program(program, config, length, mesh), mesh=mesh)
                    sizes = memory_of(compiled).sizes()
                    seconds = {"compile_seconds": time.perf_counter() - begin}
                    append(None, {"program": program, "tokens": length} | sizes | seconds)
                    share = sizes["total"] / find_gpu(self.gpu).memory_bytes
                    print(
                        f"{self.model}, {program}, {length} tokens, {gpus_of(self.gpu, self.mesh)}: arguments "
                        f"{sizes['arguments'] / 1e9:.1f} GB, temporaries {sizes['temporaries'] / 1e9:.1f} GB, total "
                        f"{sizes['total'] / 1e9:.1f} GB, {share:.0%} of the GPU",
                        flush=True,
                    )

    def _config(self) -> ModelConfig:
        if self.model not in PRESETS:
            raise ValueError(f"unknown shape {self.model!r}; there are {', '.join(PRESETS)}")
        if not self.lengths or min(*self.lengths, self.chunk) < 1:
            raise ValueError(f"lengths and chunk must be at least 1, got {self.lengths=}, {self.chunk=}")
        if "prefill" in self.programs and self.chunk > min(self.lengths):
            raise ValueError(f"a chunk must fit into the cache, got {self.chunk=} and {self.lengths=}")
        config = PRESETS[self.model]
        return replace(config.first_layers(self.layers or config.num_layers), dtype=self.dtype)

    def _mesh(self) -> Mesh:
        size = DeviceOptions(self.mesh).size
        if size.devices > 1 and self.programs != ("training",):
            raise ValueError("--mesh is for the training program; duo plan --mesh --verify has prefill and decode")
        if any(length % size.sequence for length in self.lengths):
            raise ValueError(f"lengths must be multiples of sequence={size.sequence}, got {self.lengths=}")
        return mesh_of(size, gpus_like(self.gpu, size.devices))

    def _program(self, program: str, config: ModelConfig, length: int, mesh: Mesh) -> Program:
        if program == "training":
            return training_step(config, length, GatedModel(backend=self.backend), mesh, fsdp=self.fsdp)
        pattern = any_pattern(config, self.sparsity) if self.sparsity else None
        config = replace(config, weight_dtype=self.weight_dtype)
        plan = Plan(config, pattern, chunk_size=self.chunk, kv_dtype=self.kv_dtype)
        return (prefill_chunk if program == "prefill" else decode)(plan, length, self.backend)


def memory_table(path: Path) -> str:
    """Device memory of each program."""
    head, results = read(path)
    about = head["about"]
    rows = [
        (
            result["program"],
            result["tokens"],
            *(f"{result[name] / 1e9:.1f}" for name in ("arguments", "temporaries", "total")),
        )
        for result in results
    ]
    table = rows_to_table(rows, ["program", "tokens", "arguments, GB", "temporary, GB", "total, GB"])
    target = gpus_of(about["gpu"], about.get("mesh"))
    sharded = ", weights sharded (FSDP)" if about.get("mesh") and about.get("fsdp") else ""
    note = f"{about['model']}, {about['dtype']}, backend {about['backend']}, {target}{sharded}; not run."
    return f"{table}\n\n{note} {compiled_with(head)}"


RESULT = ResultType(
    "Memory", with_fields("program", "temporaries"), {"Programs": memory_table}, group="Compiled, not run"
)
