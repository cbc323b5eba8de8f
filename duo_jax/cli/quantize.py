"""`duo quantize`: save a model with quantized weights."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from duo_jax.checkpoint.save import save_model
from duo_jax.cli.options import ModelOptions
from duo_jax.files import free_path
from pallas_kernels.types import Request


@dataclass(frozen=True)
class Quantize:
    """Quantize a model's weights once and save them; the folder loads like any other model, and faster."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    out: Path
    """Folder to write, new or empty."""

    def requests(self) -> list[Request]:
        """No attention: there is nothing to certify."""
        return []

    def run(self) -> None:
        """Load and quantize tensor by tensor, then save."""
        if self.model.weight_dtype is None and self.model.embed_dtype is None:
            raise ValueError(
                "which format? give --weight-dtype int8, w8a8, int4, int4-32, int4-128 or another of its names"
            )
        free_path(self.out)
        tokenizer, sampling = self.model.tokenizer(), self.model.sampling()
        model = self.model.load()
        save_model(model, self.out, tokenizer, sampling=sampling)
        formats = self.model.weight_dtype or f"{model.config.dtype}, embeddings in {self.model.embed_dtype}"
        print(f"{self.out}: {model.nbytes / 1e6:.1f} MB of weights in {formats}")
