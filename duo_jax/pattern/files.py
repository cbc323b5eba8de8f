"""The folder of a head pattern, in the format of the published ones, and where those are.

`full_attention_heads.tsv` has the raw gates, `config.json` the sizes of sinks and window.
"""

from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float

from duo_jax.arguments import path_of
from duo_jax.files import check_output
from duo_jax.reading import read_json, read_text

GATES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
# In `config.json`: the sparsity to load with, if no rule is given. `duo choose --apply` measures and writes it.
DEFAULT_RULE = "default_sparsity"
# A thousand times the largest published pattern.
MOST_BYTES = 1 << 24


def find_folder(source: str | Path) -> Path:
    """The folder of a pattern: itself, or that of a published name.

    Raises:
        FileNotFoundError: no such folder or name; the message lists the names.
    """
    folder = path_of("pattern", source, "a folder or a published name")
    if folder.is_dir():
        return folder
    name = str(source).lower()
    if name in published_patterns():
        return Path(str(resources.files(__package__) / "published" / name))
    names = "\n  ".join(published_patterns())
    raise FileNotFoundError(f"no folder and no published pattern {str(source)!r:.200}; the names are\n  {names}")


def published_patterns() -> list[str]:
    """Names that `HeadPattern.load` accepts in place of a path."""
    root = resources.files(__package__) / "published"
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("_"))


def is_published(folder: Path) -> bool:
    """Whether a folder is one of the published patterns, which are part of the installed package."""
    return folder.resolve().parent == Path(str(resources.files(__package__) / "published")).resolve()


def check_folder(folder: Path) -> None:
    """Check that a pattern can be saved to a folder, which need not exist, and would replace only another pattern.

    Raises:
        FileExistsError: the folder has another `config.json`, such as a model's.
        ValueError, PermissionError: nothing can be written there.
    """
    for name in (GATES_FILE, CONFIG_FILE):
        check_output(folder / name)
    path = folder / CONFIG_FILE
    if path.exists() and path.stat().st_size and not _is_pattern(path):
        raise FileExistsError(f"{path} exists and is not a pattern's: choose another folder, nothing is overwritten")


def _is_pattern(path: Path) -> bool:
    try:
        return {"sink_size", "recent_size"} <= set(read_json(path, most=MOST_BYTES))
    except ValueError:
        return False


def read_file(path: Path) -> str:
    """The text of one of the two files.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is larger than any pattern, or not UTF-8.
    """
    try:
        return read_text(path, most=MOST_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: a pattern is {GATES_FILE} and {CONFIG_FILE}") from None


def read_gates(path: Path) -> Float[np.ndarray, "L K"]:
    """The gates of a table, a row for each layer.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: rows of different lengths, or an entry that is not a number.
    """
    rows = [line.split("\t") for line in read_file(path).split("\n") if line.strip()]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise ValueError(
            f"{path} must have the same number of tab-separated gates in every row (layer), got rows of {lengths[:9]}"
        )
    return np.array([[_gate(gate, path) for gate in row] for row in rows])


def _gate(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} has an entry that is not a number: {text[:40]!r}") from None
