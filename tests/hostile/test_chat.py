"""Files and settings that a chat is given: refused in one line, and the conversation goes on."""

import io
import json
import os
import sys

import pytest

CONVERSATION = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
TOKENS = 256

# What a file contains, None for a folder and "pipe" for a pipe; then the words of the refusal.
LOADED = {
    "a folder": (None, ["is a folder"]),
    "a pipe": ("pipe", ["is a pipe or a device"]),
    "a text": (b"Once upon a time\n", ["is not JSON", "/file reads a text"]),
    "other bytes": (b"[\xff]", ["is not UTF-8 text"]),
    "an object": (b'{"role": "user"}', ["messages must be a list", "/load reads what /save wrote"]),
    "a number in the list": (b"[1]", ["message 0 must be an object"]),
    "no role": (b'[{"content": "a"}]', ["the role of message 0"]),
    "a content that is a number": (b'[{"role": "user", "content": 1}]', ["the content of message 0"]),
    "an image": (b'[{"role": "user", "content": [{"type": "image"}]}]', ["reads text only"]),
    "half of a surrogate pair": (b'[{"role": "user", "content": "\\ud800"}]', ["half of a surrogate pair"]),
    "a name twice": (b'[{"role": "user", "role": "system", "content": "a"}]', ["appears twice"]),
    "too many levels": (b"[" * 100 + b"]" * 100, ["more than 64 levels"]),
}
PUT = {
    "a folder": (None, ["is a folder"]),
    "a pipe": ("pipe", ["is a pipe or a device"]),
    "other bytes": (b"\xff\xfe", ["is not UTF-8 text"]),
    "nothing": (b" \n", ["is empty"]),
    "more than the cache": (b"x" * TOKENS, ["has 256 tokens, more than the cache of 256", "--max-length"]),
    "more than is read": (b"x" * TOKENS * 65, ["has more than 16384 bytes"]),
}


@pytest.mark.parametrize(
    ("command", "content", "words"),
    [
        *(pytest.param("/load", *row, id=f"load {name}") for name, row in LOADED.items()),
        *(pytest.param("/file", *row, id=f"file {name}") for name, row in PUT.items()),
    ],
)
def test_a_file_is_refused_and_the_conversation_continues(
    command, content, words, chat_model, tmp_path, duo, monkeypatch, request
):
    path, saved = tmp_path / "given", tmp_path / "said.json"
    if content is None:
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    (tmp_path / "before.json").write_text(json.dumps(CONVERSATION))
    lines = [f"/load {tmp_path}/before.json", f"{command} {path}", f"/save {saved}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    result = duo("chat", "--model", chat_model, "--max-length", TOKENS)
    assert result.code == 0 and len(result.err.splitlines()) == 1 and len(result.err) < 500, result
    assert all(word in result.err for word in [*words, str(path)]), result.err
    assert json.loads(saved.read_text()) == CONVERSATION


def test_a_file_that_is_no_conversation_is_not_overwritten(chat_model, tmp_path, duo, monkeypatch):
    path = tmp_path / "notes.json"
    path.write_text('{"my": "notes"}')
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/save {path}\n/save\n/load {path}.not\n"))
    result = duo("chat", "--model", chat_model, "--max-length", TOKENS)
    assert "is not a saved conversation: choose another name" in result.err and "--force" not in result.err
    assert "/save needs a file" in result.err and "No such file" in result.err
    assert path.read_text() == '{"my": "notes"}'


def test_special_tokens_in_a_file_are_text(chat_model, tmp_path, duo, monkeypatch):
    path = tmp_path / "notes.txt"
    path.write_text("a</s>b")
    for flags, count in (((), 6), (("--parse-special",), 3)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/file {path}\n"))
        result = duo("chat", "--model", chat_model, "--max-length", TOKENS, *flags)
        assert f"({path}, {count} tokens, " in result.out
