"""`duo eval training`: seconds and memory of a training step, and its fraction of the device's matmul rate."""

import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from duo_train.data.batches import LABEL_MULTIPLE, Batch
from duo_train.gated import GatedModel
from duo_train.loop import State, step
from duo_train.recipes import Distill

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_eval.speed.ceilings import flops_per_second
from duo_eval.speed.roofline import prefill_flops
from duo_jax import HeadPattern, ModelConfig, load_model
from duo_jax.certified import training
from duo_jax.checkpoint.open import open_config
from pallas_kernels import Window
from pallas_kernels.timing import fastest
from pallas_kernels.types import Request


@dataclass(frozen=True)
class Training:
    """Time a step of `distill` and read its memory from the compiler."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of a sample."""
    steps: int = 3
    """Timed steps after the first; the fastest counts."""
    sink_size: int = 32
    """First tokens that a streaming head sees."""
    recent_size: int = 128
    """Most recent tokens that a streaming head sees."""
    out: Path = Path("training.json")
    """File to write."""

    def requests(self) -> list[Request]:
        """The attention that training runs, for certification."""
        return training(open_config(self.model), Window(self.sink_size, self.recent_size))

    def run(self) -> None:
        """Measure every length with and without rematerialization."""
        if not self.lengths or min(self.lengths) < 1 or self.steps < 1:
            raise ValueError(f"need lengths and steps of at least 1, got {self.lengths=}, {self.steps=}")
        record = Record.open(self.out, {"task": "training", **asdict(self)}, again=True)
        model = load_model(self.model)
        with record.writing(dtype=str(model.dtype)) as append:
            for length, rematerialize in product(self.lengths, (True, False)):
                attention = GatedModel(self.sink_size, self.recent_size, rematerialize=rematerialize)
                result = self._measure(model, attention, length)
                # Measured each time: machines are shared, and their rates change.
                rate = flops_per_second(model.dtype)
                flops = step_flops(model.config, attention, length)
                result |= {"matmul_flops_per_second": rate, "flops": flops}
                result["fraction_of_matmul_rate"] = flops / result["seconds"] / rate
                append(None, result)
                print(
                    f"{length} tokens, {'with' if rematerialize else 'without'} rematerialization: "
                    f"{result['seconds']:.1f} s a step, {result['fraction_of_matmul_rate']:.0%} of the matmul rate, "
                    f"{result['temporary_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )

    def _measure(self, model: Any, attention: GatedModel, length: int) -> dict[str, Any]:
        recipe = Distill(steps=100)
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, 1, length)), jnp.int32)
        labels = jnp.arange(LABEL_MULTIPLE, dtype=jnp.int32)[None, None] % length
        batch = Batch(tokens, labels, jnp.ones_like(labels, dtype=bool))
        targets = jnp.zeros((*labels.shape, model.config.embed_dim), jnp.float32)
        gates = jnp.full((len(model.config.full_layers), model.config.num_kv_heads), 0.5, jnp.float32)
        params = recipe.init(gates)
        state = State(jnp.int32(0), params, recipe.optimizer().init(params))
        begin = time.perf_counter()
        program = step.lower(recipe, attention, model, state, batch, targets).compile()
        compiled = time.perf_counter() - begin
        analysis = program.memory_analysis()
        return {
            "tokens": length,
            "rematerialize": attention.rematerialize,
            "compile_seconds": compiled,
            "temporary_bytes": analysis.temp_size_in_bytes if analysis else 0,
            "seconds": fastest(program, model, state, batch, targets, rounds=self.steps),
        }


def step_flops(config: ModelConfig, attention: GatedModel, length: int) -> int:
    """Operations of a student's forward and backward pass, without the teacher and without rematerialization.

    Weights are frozen: the backward pass multiplies by each of them once. Attention's multiplies five times where its
    forward pass multiplies twice.
    """
    gates = np.zeros((config.num_layers, config.num_kv_heads))
    sizes: dict[str, Any] = {"sink_size": attention.sink_size, "recent_size": attention.recent_size}
    streaming = HeadPattern.from_gates(gates, sparsity=1.0, **sizes, window_layers=config.window_layers)
    alone: dict[str, Any] = {"sink_size": 0, "recent_size": 1, "window_layers": config.window_layers}
    nothing = HeadPattern.from_gates(gates, sparsity=1.0, **alone)
    costs: dict[str, Any] = {"batch_size": 1, "length": length}
    own = 4 * config.head_dim * config.num_heads * config.num_layers * length  # each token sees itself
    body = prefill_flops(config, nothing, **costs) - own
    mixed = sum(prefill_flops(config, pattern, **costs) - body for pattern in (HeadPattern.full(config), streaming))
    return round(2 * body + 3.5 * mixed)


def training_table(path: Path) -> str:
    """Seconds, matmul rate and memory of a training step."""
    head, results = read(path)
    rows = [
        (
            result["tokens"],
            "yes" if result["rematerialize"] else "no",
            f"{result['seconds']:.1f}",
            f"{result['fraction_of_matmul_rate']:.0%}",
            f"{result['temporary_bytes'] / 1e9:.2f}",
        )
        for result in results
    ]
    headers = ["tokens", "rematerialized", "seconds a step", "of the matmul rate", "temporary memory, GB"]
    rates = [result["matmul_flops_per_second"] / 1e9 for result in results]
    note = f"Matmul rate {min(rates):.0f} to {max(rates):.0f} GFLOP/s."
    return f"{rows_to_table(rows, headers, 'rlr')}\n\n{note} {origin(head['runs'], head['runs'][-1]['command'])}"


RESULT = ResultType("Training step", with_fields("rematerialize"), {"Steps": training_table})
