"""How the flags of a command are listed: the most used first, and sentences that lines break only at their end.

Rules of tyro for dataclasses. They change help texts and the order of flags, not what is parsed.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from duo_jax.checkpoint.packaged import accept_terms

# The flags that most calls need, in the order in which help lists them, before all groups.
FIRST = (
    *("model", "prompt", "prompt_file", "prompts", "out", "chat", "pattern", "sparsity", "max_new_tokens"),
    *("methods", "budgets", "recipe", "preset", "resume", "temperature"),
)
# A flag of all commands that have a model.
TERMS = "accept_terms"
# Longer lists are cut where they are a default.
MOST_SHOWN = 16
MISSING = tyro.MISSING_NONPROP


class Rest:
    """A group of flags without those that are listed first; subclasses have the dataclass and their names."""

    whole: type
    listed_first: frozenset[str]
    default: Any


def add_rules(registry: ConstructorRegistry, command: type, *, is_help: bool) -> None:
    """Add the rules for a command, whose fields are flags and groups of flags.

    `is_help`: only its help is printed. That lists a flag such as --json by itself; --no-json is parsed all the same.
    """
    busy: list[type] = []

    def fields_of(kind: type, default: Any) -> tuple[StructFieldSpec, ...]:
        """The fields of a dataclass, by tyro's own rule."""
        busy.append(kind)
        try:
            spec = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(kind, default, in_union_context=False))
        finally:
            busy.pop()
        assert isinstance(spec, StructConstructorSpec)
        return tuple(_shown(field, is_help) for field in spec.fields)

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        kind: Any = info.type
        if isinstance(kind, type) and issubclass(kind, Rest):
            fields = fields_of(kind.whole, kind.default)
            return StructConstructorSpec(dict, tuple(each for each in fields if each.name not in kind.listed_first))
        if not _has_fields(kind) or kind in busy:
            return None
        fields = fields_of(kind, info.default)
        terms = StructFieldSpec(TERMS, bool, False, "Accept the terms of use that a packaged model has.")
        if kind is command:
            return _listed(kind, fields, fields_of, _shown(terms, is_help))
        return StructConstructorSpec(kind, fields)


def one_line(text: str) -> str:
    """Each paragraph of a docstring in one line, to be broken where the terminal ends."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text.strip()))


def _listed(
    command: type,
    fields: tuple[StructFieldSpec, ...],
    fields_of: Callable[[type, Any], tuple[StructFieldSpec, ...]],
    terms: StructFieldSpec,
) -> StructConstructorSpec:
    """The fields of a command: first the flags of `FIRST`, its own or of its groups, then its others and the groups.

    A command with a model has the flag `terms`, too, which is no field of it.
    """
    first: list[StructFieldSpec] = []
    own: list[StructFieldSpec] = []
    groups: list[StructFieldSpec] = []
    members: dict[str, tuple[type, frozenset[str]]] = {}
    for field in fields:
        kind, *metadata = get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
        if not _has_fields(kind) or tyro.conf.OmitArgPrefixes not in metadata:
            (first if field.name in FIRST else own).append(field)
            continue
        inside = fields_of(kind, field.default)
        listed_first = frozenset(each.name for each in inside if each.name in FIRST)
        first += [each for each in inside if each.name in FIRST]
        members[field.name] = kind, listed_first
        if len(inside) > len(listed_first):
            body = {"whole": kind, "listed_first": listed_first, "default": field.default}
            rest: Any = type(kind.__name__, (Rest,), body)
            title = tyro.conf.arg(name=field.name)
            help = one_line(kind.__doc__ or "")
            kind_of_rest: Any = Annotated[rest, *metadata, title]
            groups.append(StructFieldSpec(f"rest_of_{field.name}", kind_of_rest, MISSING, help))

    if any(field.name == "model" for field in first):
        own.append(terms)

    def make(**values: Any) -> Any:
        if values.pop(TERMS, False):
            accept_terms()
        for name, (kind, listed_first) in members.items():
            inside = {each: values.pop(each) for each in listed_first}
            values[name] = kind(**inside, **values.pop(f"rest_of_{name}", {}))
        return command(**values)

    make.__doc__ = command.__doc__
    first.sort(key=lambda field: FIRST.index(field.name))
    return StructConstructorSpec(make, (*first, *own, *groups))


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _shown(field: StructFieldSpec, is_help: bool) -> StructFieldSpec:
    """A field with its help in one line, and without a default that says nothing: its text has what happens then."""
    kind, text, default = field.type, field.helptext, field.default
    hint, metavar, markers = None, None, [tyro.conf.FlagCreatePairsOff] if is_help and default is False else []
    if default is None or default is False or default == ():
        hint = ""
    elif isinstance(default, tuple) and len(default) > MOST_SHOWN:
        hint = f"(default: {' '.join(map(str, default[:3]))} ..., {len(default)} in all)"
    elif isinstance(default, str) and "\n" in default:
        hint = f"(default: {default!r})"
    elif default is MISSING:
        hint = "(required)"
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))
    if isinstance(spec, PrimitiveConstructorSpec) and spec.nargs == "*":
        metavar = re.sub(r"^\[(.+) \[(\1 )?\.\.\.\]\]$", r"\1 ...", str(spec.metavar))
    if hint is not None or metavar is not None:
        markers.append(tyro.conf.arg(help_behavior_hint=hint, metavar=metavar))
    for marker in markers:
        kind = Annotated[kind, marker]  # type: ignore[assignment]
    return dataclasses.replace(field, type=kind, helptext=partial(_words, text))


def _words(text: str | Callable[[], str | None] | None) -> str | None:
    """A flag's help in one line; some is read from the source only when it is shown."""
    words = text() if callable(text) else text
    return None if words is None else one_line(words)
