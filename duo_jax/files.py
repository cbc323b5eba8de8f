"""Writing files so that what was there survives a full disk or a kill."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then into it. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
