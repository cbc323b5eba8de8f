"""Dataclasses as pytrees."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def register(*, arrays: Sequence[str], static: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Make a dataclass a pytree, as `jax.tree_util.register_dataclass` does, that is rebuilt without `__init__`.

    jax also rebuilds it with descriptions in place of arrays, when a function is compiled without being called, and
    tests check the types of what `__init__` gets.
    """

    def decorate(cls: type[T]) -> type[T]:
        def flatten(value: T) -> tuple[tuple[tuple[GetAttrKey, Any], ...], tuple[Any, ...]]:
            children = tuple((GetAttrKey(name), getattr(value, name)) for name in arrays)
            return children, tuple(getattr(value, name) for name in static)

        def unflatten(others: Iterable[Any], children: Iterable[Any]) -> T:
            value = object.__new__(cls)
            for name, field in zip((*arrays, *static), (*children, *others), strict=True):
                object.__setattr__(value, name, field)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return decorate
