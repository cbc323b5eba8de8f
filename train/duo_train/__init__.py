"""Finding the retrieval heads: texts, needle data, objective and training loop. Builds on `duo_jax`."""

import duo_jax  # noqa: F401  Before transformers is imported, whose message about torch it removes.
