"""Pretrained weights and tokenizers, from a Hugging Face folder, a hub id, a GGUF file, or a packaged model's name."""

from duo_jax.checkpoint.load import load_model, load_tokenizer
from duo_jax.checkpoint.save import save_model

__all__ = ["load_model", "load_tokenizer", "save_model"]
