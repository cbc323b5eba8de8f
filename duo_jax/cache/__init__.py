"""The KV cache: arrays split by head type, their writes, and their storage on disk."""
