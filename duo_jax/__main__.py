"""`python -m duo_jax`: the `duo` command."""

from duo_jax.cli import main

main()
