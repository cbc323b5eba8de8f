"""`duo eval tune`: find the fastest tile sizes of any kernels, head dims and data types on this GPU."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from duo_jax.tune import tune


@dataclass(frozen=True)
class Tune:
    """Try tile sizes of the kernels on this GPU and write the fastest into the table."""

    kernels: tuple[str, ...] = ("flash", "decode", "short", "backward")
    """Kernels: flash, decode, short (a short chunk over a quantized cache), backward; mosaic_flash and mosaic_decode on
    Hopper."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dims."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Data types."""
    tokens: int = 16_384
    """Tokens of the prefill and of the training step that are timed."""
    context: int = 262_144
    """Tokens in the cache when decode, or a short chunk, is timed."""
    out: Path | None = None
    """The table, by default that of this user, which the kernels read; other entries stay."""

    def run(self) -> None:
        """Time the candidates; those that do not compile or fit are left out."""
        tune(
            self.kernels,
            self.head_dims,
            dtypes=self.dtypes,
            tokens=self.tokens,
            context=self.context,
            out=self.out,
            show=partial(print, flush=True),
        )
