"""Texts and task definitions of the installed lm-evaluation-harness, read from its files; none is copied here.

Its RULER modules cannot be imported, since the import downloads data: their prompts are read as literals.
"""

import ast
import importlib.util
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from duo_eval.runner.record import sha256

# Task definitions are small files of text; a home folder, given by mistake, would be read whole.
MOST_FILES, MOST_BYTES = 2000, 1 << 30


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """Fingerprints of files, and of all files in folders, by path.

    Raises:
        ValueError: more than `MOST_FILES` files in folders or `MOST_BYTES` bytes: the paths are not those of tasks.
    """
    hashes: dict[str, str] = {}
    left = MOST_BYTES
    for path in paths:
        inside = list(islice((file for file in path.rglob("*") if file.is_file()), MOST_FILES + 1))
        if len(inside) > MOST_FILES:
            raise ValueError(f"{path} has more than {MOST_FILES} files: give a folder with task definitions only")
        for file in sorted(inside) if path.is_dir() else [path] if path.is_file() else []:
            left -= file.stat().st_size
            if left < 0:
                raise ValueError(
                    f"{path} and what comes before it have more than {MOST_BYTES} bytes: give task definitions only"
                )
            hashes[str(file)] = sha256(file.read_bytes())
    return hashes


def tasks_folder(name: str) -> Path:
    """The folder of a group of tasks.

    Raises:
        NotImplementedError: lm-eval is not installed.
        ValueError: an lm-eval without these tasks.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise NotImplementedError("prompts and metrics are those of lm-eval: pip install 'duo-jax[eval]'")
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / name
    if not folder.is_dir():
        raise ValueError(f"the installed lm-eval has no {folder}: install one that pip install 'duo-jax[eval]' takes")
    return folder


@cache
def literal(path: Path, name: str) -> Any:
    """The first literal that a source file assigns to a name.

    Raises:
        ValueError: it assigns none, as in another version of lm-eval.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                continue  # Computed, not a literal.
    raise ValueError(f"{path} has no {name}: install an lm-eval that pip install 'duo-jax[eval]' takes")
