"""The wheel: the names that it installs, its use from an empty environment, and `duo` next to a user's files."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.shapes import GOLDEN

ROOT = Path(__file__).parent.parent
SOURCES = ("duo_jax", "pallas_kernels", "train", "eval/duo_eval", ".packages")
PACKAGES = {"duo_jax", "pallas_kernels", "duo_train", "duo_eval"}
# As pip writes it. A script's own folder is on the path, the current one is not.
SCRIPT = "from duo_jax.cli import main\nmain()\n"

pytestmark = pytest.mark.process
LOAD_COMMANDS = """
from importlib.metadata import entry_points

for entry in entry_points(group="duo.commands"):
    entry.load()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools writes into the folder that it builds."""
    pytest.importorskip("setuptools", reason="builds without a download")
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", folder, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel as pip unpacks it, and a script that starts it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "duo").write_text(SCRIPT)
    return folder


def python(site, *args, cwd, path=()):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (*path, site))),
        "JAX_PLATFORMS": "cpu",
        "DUO_TRACEBACK": "1",
    }
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_wheel_holds_the_four_packages_and_their_data_files(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    installed = {name.split("/")[0] for name in names}
    assert {name for name in installed if not name.endswith(".dist-info")} == PACKAGES
    for package in PACKAGES:
        source = ROOT / ".packages" / package
        files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        wanted = {f"{package}/{path}" for path in files if "__pycache__" not in path.parts}
        assert {name for name in names if name.startswith(f"{package}/")} == wanted


WHERE_FROM = """
import sys

import duo_eval, duo_jax, duo_train, pallas_kernels

duo_jax.load  # loads the modules behind it
print(*(module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)), sep="\\n")
"""


def test_the_wheel_works_in_an_empty_environment(wheel, smollm2_gguf, tmp_path):
    """Pip installs it and all that it requires, as for a user; nothing comes from the clone or this environment."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    binaries = environment / "bin"
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    clean = {name: value for name, value in os.environ.items() if name not in ours} | {"JAX_PLATFORMS": "cpu"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def output(*command):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder, env=clean)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    output(binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    assert "generate" in output(binaries / "duo", "--help")
    files = output(binaries / "python", "-c", WHERE_FROM).splitlines()
    assert any("/site-packages/duo_jax/" in file for file in files)
    assert [file for file in files if file.startswith((f"{ROOT}/", f"{sys.prefix}/"))] == []
    prompt = ("--prompt", "The capital of France is", "--max-new-tokens", 8)
    assert "Paris" in output(binaries / "duo", "generate", "--model", "smollm2-135m-instruct", *prompt)
    shutil.rmtree(environment)  # a gigabyte


def test_every_command_is_importable_and_our_folders_names_are_not(site, tmp_path):
    done = python(site, "-c", LOAD_COMMANDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("eval", "train", "tests"):
        done = python(site, "-c", f"import {name}", cwd=tmp_path)
        assert f"No module named '{name}'" in done.stderr


@pytest.mark.parametrize("where", ["a user's folder", "the repository"])
def test_duo_works_next_to_files_named_like_our_folders(site, tmp_path, where):
    folder = ROOT
    if where != "the repository":
        folder = tmp_path
        (folder / "eval.py").write_text("raise RuntimeError('this is the eval.py of the user')\n")
        (folder / "train").mkdir()
        (folder / "train" / "__init__.py").write_text("raise RuntimeError('this is the train of the user')\n")
    duo = site / "bin" / "duo"
    done = python(site, duo, "--help", cwd=folder, path=[folder])
    assert done.returncode == 0 and "identify" in done.stdout and "eval" in done.stdout, done.stderr
    model = GOLDEN / "llama"
    done = python(site, duo, "inspect", "--model", model, "--pattern", model / "pattern", cwd=folder, path=[folder])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
