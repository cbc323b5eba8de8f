"""Which weights does a name stand for today? A cheap fingerprint of a checkpoint's files, without loading them."""

import hashlib
import json
from pathlib import Path

from duo_jax.checkpoint.open import open_source
from duo_jax.reading import read_json

# Of each file: this many blocks, evenly spaced. Smaller files are read whole.
BLOCKS = 1024
BLOCK_BYTES = 4096
CONFIGS = ("config.json", "duo_model.json")
# Fields that change when the same model is saved again. The data type of the weights is that of the files.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def weights_fingerprint(source: str | Path) -> str:
    """Distinguishes checkpoints of the same name by their configuration, and by samples of their weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    checkpoint = open_source(source)
    path = checkpoint.path
    digest = hashlib.sha256()
    for name in CONFIGS if path.is_dir() else ():
        if (path / name).is_file():
            values = {key: value for key, value in read_json(path / name).items() if key not in VOLATILE}
            digest.update(json.dumps(values, sort_keys=True).encode())
    for file in checkpoint.files:
        _sample(file, digest)
    return digest.hexdigest()[:16]


def _sample(path: Path, digest: "hashlib._Hash") -> None:
    size = path.stat().st_size
    digest.update(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(file.read(size))
            return
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
