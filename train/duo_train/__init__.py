"""Finding the retrieval heads: texts, needle data, objective and training loop. Builds on `duo_jax`."""
