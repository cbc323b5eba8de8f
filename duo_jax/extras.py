"""Packages that only an extra of this distribution installs: a missing one is reported before the work, with the extra.

A command names its own as `packages`, an attribute or a property; `duo` checks them before it runs.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

# The extras of pyproject.toml, by the names that are imported.
EXTRAS = {
    "train": ("datasets", "matplotlib", "zstandard"),
    "eval": ("aiohttp", "lm_eval", "matplotlib", "scipy", "tabulate", "wonderwords"),
    "bench": ("accelerate", "torch"),
    "serve": ("prometheus_client", "pydantic", "starlette", "uvicorn"),
}


def require(what: str, packages: Iterable[str]) -> None:
    """Check that packages are installed, without importing them.

    Raises:
        NotImplementedError: one is not, with the extra that has it.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise NotImplementedError(needed(what, missing))


def needed(what: str, missing: Iterable[str]) -> str:
    """The message for missing packages."""
    missing = list(dict.fromkeys(missing))
    extra = next((extra for extra, packages in EXTRAS.items() if set(missing) <= set(packages)), "eval,train,bench")
    return f"{what} needs {', '.join(missing)}, not installed here: pip install 'duo-jax[{extra}]'"


def missing_package(error: ImportError) -> str | None:
    """The package of an extra that is not installed, if that is the error."""
    package = (error.name or "").partition(".")[0]
    is_extra = any(package in packages for packages in EXTRAS.values())
    return package if is_extra and not _is_installed(package) else None


def packages_of(command: Any) -> Iterator[str]:
    """The packages that a command or its class names, and those of its groups of flags."""
    named = getattr(command, "packages", ())
    yield from named if isinstance(named, tuple) else ()  # A property has no value before flags are parsed.
    if dataclasses.is_dataclass(command) and not isinstance(command, type):
        for field in dataclasses.fields(command):
            yield from packages_of(getattr(command, field.name))


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec has its name.
        return False
