"""`duo eval memory`: what a training step takes of a GPU's memory, from the compiler; the GPU need not be there."""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from duo_jax import PRESETS, Model, ModelConfig
from duo_jax.model import Decoder
from eval.compiled import GPUS, memory_on
from eval.record import provenance, write
from train.batches import LABEL_MULTIPLE, Batch
from train.gated import GatedModel
from train.loop import State, step
from train.recipes import Distill


@dataclass(frozen=True)
class MemoryTask:
    """Compile a training step of `distill` ahead of time for a GPU and report the memory that it takes."""

    model: str = "llama-3-8b"
    """A shape by name, see duo inspect."""
    lengths: tuple[int, ...] = (8192, 16384, 32768)
    """Tokens of a sample."""
    gpu: str = "a100-80g"
    """a100-80g, h100-80g or h200."""
    layers: int | None = None
    """Layers; all of the model's by default."""
    dtype: str = "bfloat16"
    """Data type of weights and activations."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Compile every length, print a line for each."""
        if self.model not in PRESETS:
            raise ValueError(f"unknown shape {self.model!r}; there are {', '.join(PRESETS)}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {self.lengths}")
        config = PRESETS[self.model]
        config = replace(config, num_layers=self.layers or config.num_layers, dtype=self.dtype)
        record: dict[str, Any] = provenance(asdict(self)) | {"results": []}
        for length in self.lengths:
            begin = time.perf_counter()
            memory = memory_on(self.gpu, *training_step(config, length, GatedModel()))
            found = asdict(memory) | {"tokens": length, "total": memory.total}
            record["results"].append(found | {"compile_seconds": time.perf_counter() - begin})
            if self.out is not None:
                write(self.out, record)
            share = memory.total / GPUS[self.gpu].memory_bytes
            print(
                f"{self.model}, {length} tokens on {GPUS[self.gpu].name}: arguments {memory.arguments / 1e9:.1f} GB, "
                f"temporaries {memory.temporaries / 1e9:.1f} GB, in all {memory.total / 1e9:.1f} GB, {share:.0%} of it",
                flush=True,
            )


def training_step(config: ModelConfig, length: int, attention: GatedModel) -> tuple[Any, ...]:
    """A step of `distill` with one sample, and the shapes of its arguments: nothing is allocated."""
    recipe = Distill()

    def shape(size: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    def build() -> Model:
        return Model.from_decoder(Decoder(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(0)))

    gates = shape((config.num_layers, config.num_kv_heads), jnp.float32)
    state = State(shape((), jnp.int32), gates, jax.eval_shape(recipe.optimizer().init, gates))
    # Ten passkeys of 32 words.
    labels = shape((1, 1, 2 * LABEL_MULTIPLE), jnp.int32)
    batch = Batch(shape((1, 1, length), jnp.int32), labels, shape(labels.shape, jnp.bool_))
    targets = shape((*labels.shape, config.embed_dim), jnp.float32)
    return partial(step, recipe, attention), jax.eval_shape(build), state, batch, targets
