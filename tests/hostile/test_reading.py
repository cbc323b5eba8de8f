"""The reader of text, JSON and JSON lines: a value or a ValueError that names the file, whatever the bytes."""

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duo_jax import reading
from duo_jax.cli.prompt import PromptOptions
from duo_jax.reading import (
    MOST_LEVELS,
    parse_json,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_text_pieces,
)
from tests.hostile.strategies import scalars, values

DEEP = MOST_LEVELS + 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ": not JSON|is not JSON: Expecting value"),
        (b"{", "is not JSON"),
        (b'{\n"a": 1,\n}', r"a\.json:3 is not JSON"),
        (b"[]", "must contain a JSON object, not a list"),
        (b"null", "not null"),
        (b'"text"', "not a text"),
        (b"1.5", "not a number"),
        (b"true", "not true or false"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8 text"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 1}', "the name 'a' appears twice"),
        (b'{"a": [{"b": 1, "b": 1}]}', "the name 'b' appears twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"1" * 400 + b"}", "has 400 digits"),
        (b'{"a": ' + b"1" * 5000 + b"}", "has 5000 digits"),
        (b'{"a": ' * DEEP + b"1" + b"}" * DEEP, f"more than {MOST_LEVELS} levels"),
        (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", f"more than {MOST_LEVELS} levels"),
        (b'{"a": ' + b"[" * 10**6, f"more than {MOST_LEVELS} levels"),
        (b'{"a": 1}' + b" " * 1000, "has more than 1000 bytes"),
        (b'{"a": 1} {"a": 1}', "is not JSON: Extra data"),
    ],
    ids=range(23),
)
def test_json_that_is_refused(content, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refusal:
        read_json(path, most=1000 if content.endswith(b"  ") else 1 << 27)
    assert str(refusal.value).startswith(str(path)) and len(str(refusal.value)) < len(str(path)) + 200


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    value = {"a": [1, 1.5, None, True, "é \U0001f600 \u2028", {"b": {}}], "large": 10**307, "small": -0.0}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, indent=1)):
        for content in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
            path.write_bytes(content)
            assert read_json(path) == value
    nested = "[" * MOST_LEVELS + "]" * MOST_LEVELS
    assert parse_json(nested, path) == json.loads(nested)


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"a": "one\u2028two\u0085\x0b"}, {"a": 2}]
    for end in ("\n", "\r\n", "\n\n \n"):
        path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
        assert [row for _, row in read_json_lines(path)] == rows
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:3 must contain a JSON object, not a list"):
        list(read_json_lines(path))
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
        list(read_json_lines(path))


@pytest.mark.parametrize("kind", ["folder", "fifo", "zero"])
def test_only_regular_files_are_read(kind, tmp_path):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(ValueError, match=r"a\.json is a .*only regular files"):
            read(path)


@pytest.mark.parametrize(
    ("kind", "way"), [("fifo", ": copy it to a file, or give - and pipe it"), ("folder", ": give a file")]
)
def test_a_prompt_that_is_no_file_has_a_way_out(kind, way, tmp_path):
    (os.mkfifo if kind == "fifo" else os.mkdir)(path := tmp_path / "prompt")
    with pytest.raises(ValueError, match=f"only regular files are read here{way}$"):
        PromptOptions(prompt_file=path).text()


@pytest.mark.parametrize("cut", [b"", b"\xff", b"\xc3"])
def test_text_in_pieces_is_that_of_the_whole_file(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\n\ufeff\U0001f600".encode() + cut)
    if cut:
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 0x(ff|c3): .*; save it in that encoding"):
            list(read_text_pieces(path))
    else:
        assert "".join(read_text_pieces(path)) == "é\r\n\ufeff\U0001f600"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_is_unpacked_as_far_as_its_limit(suffix, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{suffix}"
    noise = os.urandom(5000)
    path.write_bytes(pack(noise) + pack(b"two") * 2)
    assert read_bytes(path) == noise + b"twotwo"
    path.write_bytes(pack(bytes(1 << 24)))
    assert len(read_bytes(path)) == 1 << 24
    with pytest.raises(ValueError, match="has more than 1000000 bytes"):
        read_bytes(path, most=10**6)
    for content in (pack(noise)[:-1], pack(noise)[:100], b"noise", pack(b"one") + b"noise"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix} is "):
            read_bytes(path)


bad_numbers = st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400])


@settings(deadline=None, max_examples=30)
@given(value=values, ascii_only=st.booleans(), indent=st.none() | st.just(1))
def test_what_json_writes_is_read_back(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    again = parse_json(text, "place")
    assert again == value and json.dumps(again) == json.dumps(value)


@settings(deadline=None, max_examples=30)
@given(
    value=st.recursive(scalars | bad_numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
    cut=st.integers(0, 100),
    noise=st.text(st.characters(codec=None), max_size=3) | st.sampled_from(["{", "[", '"', "\\ud800", ",", "1e9999"]),
    place=st.floats(0, 1),
)
def test_a_damaged_text_is_a_value_or_a_refusal(value, cut, noise, place):
    text = json.dumps(value)
    middle = int(place * len(text))
    text = (text[:middle] + noise + text[middle + cut % 7 :]).encode("utf-8", "replace").decode()
    try:
        again = parse_json(text, "place")
    except ValueError as error:
        assert str(error).startswith("place") and len(str(error)) < 300
    else:
        json.dumps(again, allow_nan=False, ensure_ascii=False).encode()


@settings(deadline=None, max_examples=30)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_text_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(content)
    try:
        text = read_text(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is not UTF-8")
    else:
        assert "\r" not in text and text.encode().count(b"\n") >= content.count(b"\n")
