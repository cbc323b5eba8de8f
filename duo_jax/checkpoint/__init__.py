"""Pretrained weights and tokenizers, from a Hugging Face folder, a hub id, a GGUF file, or a packaged model's name."""
