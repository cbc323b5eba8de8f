"""What a KV budget costs in accuracy, and what it buys. Builds on `duo_jax`, and on `train` for its texts."""
