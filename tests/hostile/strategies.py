"""Strategies that several tests and the fuzz target share: JSON values, and structures and bytes with a few changes."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Values of JSON.
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
# Values that a reader of settings may not expect: near limits, of another type, long, or nested.
edges: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30),
        *(0.0, -0.0, 0.5, 1.5, 1e-9, 1e9, 1e38, 1e39, 1e300, 5e-324),
        *("", " ", "x", "0", "1", "null", "x" * 5000, "é", "\0", "a\nb", "/dev/zero", "<s>", "</s>", "{", "\ud7ff"),
        *(True, False, None, [], {}, [[]], [0], [None], {"a": 0}, {"type": "x"}, [1] * 300, list("ab")),
    ]
)  # fmt: skip
small = st.recursive(
    edges | st.integers(-3, 40) | st.floats(allow_nan=False, width=16) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
).map(copy.deepcopy)  # Some are lists and objects, which `changed` changes.


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    """The list or object that a path ends in."""
    for key in path[:-1]:
        value = value[key]
    return value


def changed(data: st.DataObject, value: Any, *, names: tuple[str, ...] = (), most: int = 3) -> Any:
    """A copy of a JSON value in which a few values are dropped, replaced, moved to another place, or added.

    Args:
        data: where changes are drawn from.
        value: a list or an object.
        names: names that may be added to objects, besides those that it has.
        most: changes.
    """
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, most), label="changes")):
        paths = list(places(value))
        if not paths:
            return value
        path = data.draw(st.sampled_from(paths))
        parent, last = parent_of(value, path), path[-1]
        kind = data.draw(st.sampled_from(["replace", "replace", "drop", "move", "add"]))
        if kind == "drop":
            del parent[last]
        elif kind == "replace":
            parent[last] = data.draw(small)
        elif kind == "move":
            other = data.draw(st.sampled_from(paths))
            parent[last] = copy.deepcopy(parent_of(value, other)[other[-1]])
        elif isinstance(parent, dict):
            known = sorted({str(path[-1]) for path in paths} | set(names))
            parent[data.draw(st.sampled_from(known) | st.text(max_size=3))] = data.draw(small)
        else:
            parent.insert(data.draw(st.integers(0, len(parent))), data.draw(small))
    return value


def damaged(data: st.DataObject, content: bytes, end: int | None = None, most: int = 3) -> bytes:
    """Bytes with a few changes before `end`: replaced, flipped, inserted, deleted or copied from elsewhere."""
    end = len(content) if end is None else end
    changed = bytearray(content[:end])
    for _ in range(data.draw(st.integers(1, most))):
        if not changed:
            break
        at = data.draw(st.integers(0, len(changed) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\xff" * 8, b"\1" + b"\0" * 7]))
        match data.draw(st.sampled_from(["replace", "flip", "insert", "delete", "copy"])):
            case "replace":
                changed[at : at + len(new)] = new
            case "flip":
                changed[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                changed[at:at] = new
            case "delete":
                del changed[at : at + len(new)]
            case "copy":
                start = data.draw(st.integers(0, len(changed) - 1))
                part = changed[start : start + data.draw(st.integers(1, 40))]
                changed[at : at + len(part)] = part
    return bytes(changed) + content[end:]


def json_bytes(data: st.DataObject, value: Any, *, names: tuple[str, ...] = ()) -> bytes:
    """The text of a changed JSON value, sometimes damaged in a few bytes as well, or with a byte order mark."""
    content = json.dumps(changed(data, value, names=names), ensure_ascii=data.draw(st.booleans())).encode()
    kind = data.draw(st.sampled_from(["right", "right", "right", "damaged", "mark"]))
    if kind == "mark":
        return b"\xef\xbb\xbf" + content
    return damaged(data, content) if kind == "damaged" else content
