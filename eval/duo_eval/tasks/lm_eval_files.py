"""Texts and task definitions of the installed lm-evaluation-harness, read from its files; none is copied here.

Its RULER modules cannot be imported: they fetch data from the network when they are. So their prompts are read from the
source, as the literals that they are.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any


def tasks_folder(name: str) -> Path:
    """The folder of a group of tasks.

    Raises:
        NotImplementedError: lm-eval is not installed.
        ValueError: an lm-eval without these tasks.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise NotImplementedError("prompts and metrics are those of lm-eval: pip install 'duo-jax[eval]'")
    folder = Path(found.submodule_search_locations[0]) / "tasks" / name
    if not folder.is_dir():
        raise ValueError(f"the installed lm-eval has no {folder}: install one that pip install 'duo-jax[eval]' takes")
    return folder


@cache
def literal(path: Path, name: str) -> Any:
    """The first literal that a source file assigns to a name.

    Raises:
        ValueError: it assigns none: another version of lm-eval.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                continue  # Computed, not written down.
    raise ValueError(f"{path} has no {name}: install an lm-eval that pip install 'duo-jax[eval]' takes")
