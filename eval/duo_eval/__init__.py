"""Accuracy and speed under a KV budget; builds on `duo_jax` and `duo_train`."""

import duo_jax  # noqa: F401  Before transformers is imported, whose message about torch it removes.
