"""Import a command for its help only: its declarations are real, and what it computes with is left out.

Help needs the flags of a command, which are dataclasses. Its modules also import jax, flax and transformers, which take
seconds, for functions that help never calls. While `declarations_only` lasts, these libraries are stand-ins.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

# What takes long to import and declares no flag.
COMPUTATION = frozenset(
    ("jax", "jaxlib", "jaxtyping", "flax", "optax", "orbax", "qwix", "transformers", "tokenizers", "huggingface_hub")
) | {"gguf", "safetensors", "matplotlib", "scipy", "lm_eval", "datasets", "torch"}


class StandIn:
    """Anything of such a library: a class, a decorator, a type in an annotation."""

    def __getattr__(self, name: str) -> Any:
        """Any attribute; names of Python's own protocols do not exist."""
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As a decorator, return what is decorated."""
        return args[0] if args and isinstance(args[0], FunctionType | type) else StandIn()

    def __getitem__(self, key: Any) -> "StandIn":
        """A generic type."""
        return self

    def __or__(self, other: Any) -> "StandIn":
        """A union of types."""
        return self

    __ror__ = __or__

    def __float__(self) -> float:
        """A number, for a constant of a module."""
        return 0.0

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """As a base class, nothing."""
        return ()


class _Library(ModuleType):
    """A module whose every name is a stand-in."""

    __path__ = []  # noqa: RUF012 - a package, without files

    def __getattr__(self, name: str) -> Any:
        return StandIn.__getattr__(StandIn(), name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in COMPUTATION else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Library(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def declarations_only() -> Iterator[None]:
    """Import modules without the libraries that they compute with; afterwards, forget these modules."""
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        own = {"duo_jax", "duo_eval", "duo_train", "pallas_kernels", *COMPUTATION}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in own:
                del sys.modules[name]
