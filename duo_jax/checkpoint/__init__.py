"""Pretrained weights and tokenizers, from a Hugging Face folder, a hub id, a GGUF file, or a packaged model's name."""

import logging

# transformers warns at import that torch is missing. It is not needed: only the tokenizers are used.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

from duo_jax.checkpoint.load import load_model, load_tokenizer  # noqa: E402
from duo_jax.checkpoint.save import save_model  # noqa: E402

__all__ = ["load_model", "load_tokenizer", "save_model"]
