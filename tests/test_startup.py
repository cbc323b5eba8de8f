"""What is imported, and when: nobody waits for a library that is not used."""

import os
import subprocess
import sys

import pytest

from duo_jax import PRESETS, published_patterns
from duo_jax.checkpoint.packaged import PACKAGED
from duo_jax.config import FAMILIES
from tests.shapes import GOLDEN

SLOW = ("flax", "gguf", "jax", "orbax", "qwix", "transformers")


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import duo_jax", set()),
        ("sys.argv = ['duo', '--help']; from duo_jax.cli import main; main()", set()),
        ("import duo_jax; duo_jax.ModelConfig", {"jax"}),
        ("import duo_jax; duo_jax.HeadPattern", {"jax"}),
        ("import duo_jax; duo_jax.KVCache, duo_jax.generate", {"flax", "jax"}),
    ],
)
def test_slow_libraries_are_imported_when_they_are_used(code, allowed):
    at_exit = f"import atexit, sys; atexit.register(lambda: print(*sorted(set({SLOW}) & set(sys.modules))))"
    out = subprocess.run(
        [sys.executable, "-c", f"{at_exit}; {code}"], capture_output=True, text=True, check=True
    ).stdout
    assert set(out.splitlines()[-1].split()) <= allowed


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "duo_jax", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("duo-jax ")


def test_names_are_listed_whole(duo):
    models, patterns = duo("models").out, duo("patterns").out
    assert all(name in models for name in (*PACKAGED, *PRESETS, *FAMILIES))
    assert all(name in patterns for name in published_patterns())


def test_loading_lets_jax_keep_compiled_programs(tmp_path):
    code = "import sys, duo_jax, jax; duo_jax.load_model(sys.argv[1]); print(jax.config.jax_compilation_cache_dir)"
    command = [sys.executable, "-c", code, GOLDEN / "llama"]
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    for extra, folder in (({}, tmp_path / "compiled"), (chosen, tmp_path / "own")):
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"DUO_JAX_CACHE": str(tmp_path)} | extra
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == str(folder)
