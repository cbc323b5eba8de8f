"""The settings of a `quantization_config`, each with its check, and names of modules by lists and expressions."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from duo_jax.arguments import true_or_false, whole_number

MOST_GROUP = 10**6
# Names of modules in a list; the longest published one has four for each layer.
MOST_NAMES = 10**5
# Repetitions in a regular expression that is compared with the names of modules, and its characters.
MOST_REPEATS, MOST_PATTERN = 4, 300


class Settings:
    """The values of a configuration, each with its check; errors name the method.

    Methods raise ValueError for a value of a wrong type or range, and NotImplementedError for one that is not read.
    """

    def __init__(self, method: str, values: Mapping[str, Any], inside: str = "") -> None:
        self.method, self.values, self.inside = method, values, inside

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it is; the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, *keys: str, default: int) -> int:
        """A whole number of at least -1, by the first of some names that is given."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        return whole_number(f"{self.inside}{key}", self.get(key, default), -1, MOST_GROUP)

    def bits(self, *keys: str, among: tuple[int, ...], default: int = 0) -> int:
        """Bits of a number, which must be among a few."""
        bits = self.whole(*keys, default=default)
        self.refuse(f"{bits} bits", unless=bits in among)
        return bits

    def group(self, *keys: str, default: int = -1) -> int | None:
        """Input channels that share a scale; None: all of them, written as -1."""
        size = self.whole(*keys, default=default)
        if size == 0:
            raise ValueError(f"{self.inside}{keys[0]} must be at least 1, or -1 for all channels, got 0")
        return None if size == -1 else size

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return true_or_false(f"{self.inside}{key}", self.get(key, default))

    def names(self, key: str) -> tuple[str, ...]:
        """A list of modules' names."""
        names = self.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MOST_NAMES:
            raise ValueError(f"{self.inside}{key} must be a list of modules' names, got {names!r:.60}")
        return tuple(names)

    def part(self, key: str) -> "Settings | None":
        """Nested settings."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{self.inside}{key} must be an object, got {value!r:.60}")
        name = key if key.isidentifier() and len(key) < 40 else repr(key)[:40]
        return None if value is None else Settings(self.method, value, f"{self.inside}{name}.")

    def word(self, key: str, default: str, among: tuple[str, ...]) -> str:
        """A name in lower case that must be one of a few."""
        value = self.get(key, default)
        self.refuse(f"{key} {value!r:.60}", unless=isinstance(value, str) and value.lower() in among)
        return str(value).lower()

    def refuse(self, what: str, *, unless: bool) -> None:
        """Raise NotImplementedError for what is not read."""
        if not unless:
            where = f" in {self.inside.rstrip('.')}" if self.inside else ""
            raise NotImplementedError(
                f"this model uses weights quantized by {self.method} with {what}{where}, which is not supported: "
                "load the model that is not quantized"
            )


def block(settings: Settings, key: str) -> tuple[int | None, int | None]:
    """Rows and columns of the blocks of weights that share a scale."""
    sizes = settings.get(key)
    if sizes is None:
        return None, None
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise ValueError(f"{settings.inside}{key} must be two sizes, got {sizes!r:.60}")
    rows, columns = (whole_number(f"{settings.inside}{key}", size, 1, MOST_GROUP) for size in sizes)
    return rows, columns


def named(settings: Settings, key: str, names: Iterable[str], *, by_part: bool = False) -> Callable[[str], bool]:
    """Whether a list names a module: by its name, or by a regular expression after `re:`.

    With `by_part`, as by transformers, a name is an expression itself, stands for all modules in the one that it names,
    and for those whose names end with it.
    """
    whole = {name for name in names if not name.startswith("re:")}
    expressions = [name.removeprefix("re:") for name in names if name.startswith("re:")]
    if by_part:
        expressions += [rf"(?:{name})(?:(?<=\.)|(?=\.|$))" for name in whole if not re.fullmatch(r"[\w.\-]*", name)]
    patterns = [_pattern(f"{settings.inside}{key}", expression) for expression in expressions]

    def has(module: str) -> bool:
        parts = range(1, len(module) + 1) if by_part else ()
        return (
            module in whole
            or any(module[-end:] in whole or (module[end:][:1] in ("", ".") and module[:end] in whole) for end in parts)
            or any(pattern.match(module) for pattern in patterns)
        )

    return has


def _pattern(key: str, expression: str) -> re.Pattern[str]:
    """A regular expression that cannot take long: few repetitions, and none of a repetition."""
    plain = re.sub(r"\\.|\[[^\]]*\]|\(\?", "_", expression)
    repeats = len(re.findall(r"[*+?{]", plain))
    if len(expression) > MOST_PATTERN or repeats > MOST_REPEATS or re.search(r"\)[*+{]", plain):
        raise NotImplementedError(
            f"{key} has the regular expression {expression!r:.60}; those with up to {MOST_REPEATS} repetitions of "
            "characters are read"
        )
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key} has {expression!r:.60}, which is not a regular expression: {error}") from None
