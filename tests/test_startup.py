"""What is imported, and when: nobody waits for a library that is not used."""

import subprocess
import sys

import pytest

SLOW = ("flax", "gguf", "jax", "orbax", "qwix", "transformers")


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import duo_jax", set()),
        ("import sys; sys.argv = ['duo', '--help']; from duo_jax.cli import main; main()", set()),
        ("import duo_jax; duo_jax.ModelConfig", {"jax"}),
        ("import duo_jax; duo_jax.HeadPattern", {"jax"}),
        ("import duo_jax; duo_jax.KVCache, duo_jax.generate", {"flax", "jax"}),
    ],
)
def test_slow_libraries_are_imported_when_they_are_used(code, allowed):
    code += f"; import sys; print(*sorted(set({SLOW}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(out.splitlines()[-1].split()) <= allowed
