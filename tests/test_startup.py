"""What is imported, and when: nobody waits for a library that is not used."""

import os
import subprocess
import sys

import pytest
from duo_eval.runner.record import read
from duo_eval.speed.startup import cpu_seconds

from duo_jax import PRESETS, published_patterns
from duo_jax.checkpoint.packaged import PACKAGED
from duo_jax.families.table import FAMILIES
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
        ("sys.argv = ['duo', 'models']; from duo_jax.cli import main; main()", {"jax"}),
        ("sys.argv = ['duo', 'patterns']; from duo_jax.cli import main; main()", {"jax"}),
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


@pytest.mark.full_matrix
def test_loading_lets_jax_keep_compiled_programs(tmp_path):
    code = "import sys, duo_jax, jax; duo_jax.load_model(sys.argv[1]); print(jax.config.jax_compilation_cache_dir)"
    command = [sys.executable, "-c", code, GOLDEN / "llama"]
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    for extra, folder in (({}, tmp_path / "compiled"), (chosen, tmp_path / "own")):
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"DUO_JAX_CACHE": str(tmp_path)} | extra
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == str(folder)


@pytest.mark.slow
def test_startup_is_measured_in_cpu_seconds(duo, text_model, tmp_path):
    out = tmp_path / "startup.json"
    pythons = ("--pythons", f"here={sys.executable}", sys.executable)
    shown = duo("eval", "startup", "--out", out, "--model", text_model, "--repeats", 1, *pythons).out
    assert "duo generate, 8 tokens" in shown and "here" in shown
    results = read(out)[1]
    assert len(results) == 12
    assert all(0 < result["seconds"] < 60 for result in results)


def test_an_interpreter_without_the_package_is_refused(tmp_path):
    for command in ([sys.executable, "-S", "-c", "import jax"], [str(tmp_path / "none")]):
        with pytest.raises(ValueError, match="--pythons"):
            cpu_seconds(command)
