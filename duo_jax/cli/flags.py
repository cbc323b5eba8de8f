"""Flags of a command: parsed, checked for what holds for all of them, and named in messages. Knows no command."""

import contextlib
import dataclasses
import inspect
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from duo_jax.arguments import MOST_SEED, ArgumentError, spelling, whole_number
from duo_jax.cli.help import add_rules, one_line


def parse(command: type, prog: str, args: Sequence[str]) -> Any:
    """An instance of the command, whose fields are its flags. From here on, messages name flags.

    Raises:
        ValueError: an empty value, what tyro refuses, an integer beyond int64, a number that is not finite, or a seed
            below 0.
    """
    spelling.set(partial(flag, args=args))
    _check_values(args)
    command, prog, args = _subcommand(command, prog, args)
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional)
    add_rules(registry, command, is_help=is_help(args))
    text = one_line(inspect.getdoc(command) or "")
    try:
        with contextlib.redirect_stderr(io.StringIO()) as messages:
            parsed: Any = tyro.cli(command, prog=prog, args=args, registry=registry, description=text)
    except SystemExit as done:
        if done.code:
            raise ValueError(f"{_unboxed(messages.getvalue())}; see {prog} --help") from None
        raise
    sys.stderr.write(messages.getvalue())
    for name, value in _numbers(parsed):
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ArgumentError(name, f"must be a finite number, got {value}")
        else:
            whole_number(name, value, 0 if name.rpartition(".")[2] == "seed" else -MOST_SEED, MOST_SEED)
    return parsed


def _check_values(args: Sequence[str]) -> None:
    """Raise ValueError for an empty value, such as that of an unset variable of the shell."""
    name = ""
    for arg in args:
        name, sign, value = arg.partition("=") if arg.startswith("--") else (name, "=", arg)
        if sign and not value:
            raise ValueError(f"a value {name and f'of {name} '}is empty: set it, or leave it out")


def is_help(args: Sequence[str]) -> bool:
    """Whether these arguments ask for help."""
    return bool({"-h", "--help"} & set(args))


def flag(name: str, args: Sequence[str]) -> str:
    """The flag among these arguments that sets a field, such as `--data.seed` for `seed`; the name if none does.

    The name may be a path of fields. Flags may leave out its beginning, and a function that takes the value knows only
    its end: the flag that shares most of the path is meant, the shorter of two.
    """
    given = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    path = name.replace("_", "-").split(".")

    def shared(flag: str) -> tuple[int, int]:
        parts = flag[2:].replace("_", "-").split(".")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(parts), reversed(path), strict=False))
        return sum(1 for _ in same), -len(parts)

    best = max(given, key=shared, default="")
    return best if best and shared(best)[0] else name


def _unboxed(text: str) -> str:
    """A message of tyro, which it prints in a box, in one line and without help."""
    lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[1:-1]]
    parts = (" ".join(part.split()) for part in re.split(r"(?m)^[─-]{3,}$", "\n".join(lines)))
    kept = [part for part in parts if part and not part.startswith(("Argument helptext", "For full helptext"))]
    return "; ".join(kept).rstrip(".")


def _subcommand(command: type, prog: str, args: Sequence[str]) -> tuple[type, str, Sequence[str]]:
    """The subcommand that the first argument names, if there are any: its errors then point to its own help."""
    for field in get_type_hints(command, include_extras=True).values():
        options = next((each for each in (field, *get_args(field)[:1]) if _is_union(each)), None)
        for option in get_args(options):
            names = [getattr(each, "name", None) for each in get_args(option)[1:]]
            if get_origin(option) is Annotated and args and args[0] in names:
                return get_args(option)[0], f"{prog} {args[0]}", args[1:]
    return command, prog, args


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a parsed command, with the path of its field."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers(each, name)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(each, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) is Union or type(hint).__name__ == "UnionType"


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A value or None: help shows only the value, as None is what leaving the flag out means."""
    options = get_args(info.type)
    if not _is_union(info.type) or type(None) not in options:
        return None
    some: Any = Union[tuple(option for option in options if option is not type(None))]  # noqa: UP007
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(some, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=spec.metavar,
        instance_from_str=partial(_parse_optional, spec),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def _parse_optional(spec: PrimitiveConstructorSpec, text: list[str]) -> Any:
    if text == ["None"]:
        return None
    if spec.choices is not None and text[0] not in spec.choices:
        raise ValueError(f"{text[0]!r} is none of {', '.join(spec.choices)}")
    return spec.instance_from_str(text)
