"""Accuracy and speed under a KV budget; builds on `duo_jax` and `duo_train`."""
