"""`duo eval tune`: find the fastest tile sizes of every kernel on this GPU, for `pallas_kernels.tiles` to read."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite import layer
from duo_eval.runner.process import first_line
from duo_eval.speed.timing import fastest
from duo_jax.arguments import whole_number
from duo_jax.files import check_output, write_text
from duo_jax.reading import read_json
from pallas_kernels.gpus import device_kind
from pallas_kernels.tiles import KINDS, DecodeTiles, FlashTiles, PipelineTiles, trying, tuned_file


@dataclass(frozen=True)
class Tune:
    """Try tile sizes of the kernels on this GPU and write the fastest into the table."""

    kernels: tuple[str, ...] = ("flash", "decode", "backward")
    """Kernels: flash, decode, backward; mosaic_flash and mosaic_decode on Hopper."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dims."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Data types."""
    tokens: int = 16_384
    """Tokens of the prefill and of the training step that are timed."""
    context: int = 262_144
    """Tokens in the cache when decode is timed."""
    out: Path | None = None
    """The table, by default that of this user, which the kernels read; other entries stay."""

    def run(self) -> None:
        """Time every candidate; those that do not compile or fit are left out."""
        if set(self.kernels) - set(KINDS):
            raise ValueError(f"kernels are among {', '.join(KINDS)}, got {', '.join(self.kernels)}")
        whole_number("tokens", self.tokens, 1)
        whole_number("context", self.context, 1)
        for head_dim in self.head_dims:
            whole_number("head_dims", head_dim, 1)
        out = self.out or tuned_file()
        check_output(out)
        table = read_json(out) if out.exists() else {}
        tuned = 0
        for kernel, dtype, head_dim in product(self.kernels, self.dtypes, self.head_dims):
            call = self._timed(kernel, dtype, head_dim)
            results = []
            for tiles in candidates(kernel):
                try:
                    with trying(kernel, tiles):
                        results.append((call(), tiles))
                except Exception as error:  # Error types differ; too much shared memory, for example.
                    print(f"{kernel}, {dtype}, head dim {head_dim}: {tiles}: {first_line(error)}")
            if not results:
                print(f"{kernel}, {dtype}, head dim {head_dim}: no tiles run here", flush=True)
                continue
            tuned += 1
            seconds, best = min(results, key=lambda result: result[0])
            name = f"{max(16, 1 << (head_dim - 1).bit_length())}x{jnp.dtype(dtype).itemsize}"
            table.setdefault(device_kind(), {}).setdefault(kernel, {})[name] = asdict(best)
            write_text(out, json.dumps(table, indent=1) + "\n")
            print(f"{kernel}, {dtype}, head dim {head_dim}: {1e3 * seconds:.3f} ms with {best}", flush=True)
        if not tuned:
            raise ValueError(f"no tiles of {', '.join(self.kernels)} run here")

    def _timed(self, kernel: str, dtype: str, head_dim: int) -> Callable[[], float]:
        """Seconds of a layer of Llama-3-8B's heads, half of them streaming."""
        backend, _, task = kernel.rpartition("_")
        length = self.context if task == "decode" else self.tokens
        made = layer.make(heads=(32, 8, head_dim), dtype=dtype, streaming=0.5, tokens=self.tokens, capacity=length)
        backend, count = backend or "triton", jnp.full(1, length, jnp.int32)
        # Traced again for each candidate: tiles are read during tracing.
        if task == "flash":
            rows = {"start": jnp.zeros_like(count), "lengths": count}
            return lambda: layer.seconds_of(lambda made: made.prefill(**rows, backend=backend), made)
        if task == "decode":
            one = made._replace(q=made.q[:, :1])
            return lambda: layer.seconds_of(lambda made: made.decode(lengths=count, backend=backend), one)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            gates = jnp.full(8, 0.5, jnp.float32)
            return made._replace(q=q, k=k, v=v).gated(gates, backend=backend).astype(jnp.float32).sum()

        return lambda: fastest(jax.jit(jax.grad(loss, (0, 1, 2))), *made[:3], least=0.1)


def candidates(kernel: str) -> Iterator[Any]:
    """Tile sizes to try."""
    if kernel == "decode":
        for block, split, programs, warps, stages in product((32, 64, 128), (256, 512), (528, 1056), (2, 4), (2, 3)):
            yield DecodeTiles(block, split, programs, warps, stages)
    elif kernel == "mosaic_decode":
        for block, split, programs, stages in product((64, 128), (256, 512), (528, 1056), (2, 3, 4, 6)):
            yield DecodeTiles(block, split, programs, num_warps=4, num_stages=stages)
    elif kernel == "mosaic_flash":
        for block, stages in product((64, 128), (2, 3, 4)):
            yield PipelineTiles(block, stages)
    else:
        for block_q, block_k, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
            yield FlashTiles(block_q, block_k, warps, stages)
