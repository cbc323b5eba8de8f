"""`duo serve`: what it refuses before it loads, and a server in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import openai
import pytest

from duo_jax import load
from tests.text_models import Result, assert_refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--memory", "1MB"), ("serving 8 requests at a time needs at least", "but there are 1.0 MB", "fewer rows")),
        (("--chunk", "100"), ("a chunk is whole pages, got 100 tokens for pages of 128: use a multiple",)),
        (("--port", "65536"), ("--port must be at most 65535",)),
        (("--api-key", "\t"), ("--api-key must be printable ASCII characters, and not empty",)),
        (("--api-key", ""), ("a value of --api-key is empty: set it, or leave it out",)),
        (("--rows=",), ("a value of --rows is empty",)),
        (("--host-names", "proxy", ""), ("a value of --host-names is empty",)),
        (("--rows", "many"), ("Error parsing --rows: invalid literal for int()", "; see duo serve --help")),
        (("--memry", "1GB"), ("Unrecognized options: --memry", "Perhaps you meant: --memory")),
        (
            ("--host", "192.0.2.1"),
            ("cannot listen on 192.0.2.1:0 (Cannot assign requested address): choose another --host",),
        ),
        (("--max-body", "many"), ("--max-body must be a number above 0 and a unit",)),
        (("--prefix", "missing"), ("missing is not a folder with a saved cache",)),
        (("--pattern", "p", "--kv-budget", "0.5"), ("give --max-context too",)),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_flags_are_refused(text_model: Path, duo: Callable[..., Result], flags: tuple, words: tuple) -> None:
    result = duo("serve", "--model", text_model, "--port", 0, *flags)
    assert_refused(result, *words)
    assert len(result.err.splitlines()) == 1


def test_a_port_that_is_taken_is_refused(text_model: Path, duo: Callable[..., Result]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        result = duo("serve", "--model", text_model, "--memory", "50MB", "--max-context", 64, "--port", port)
    assert_refused(result, f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port")


def test_a_key_of_the_environment_is_called_by_its_name(
    text_model: Path, duo: Callable[..., Result], monkeypatch
) -> None:
    monkeypatch.setenv("DUO_API_KEY", "")
    assert_refused(duo("serve", "--model", text_model, "--port", 0), "DUO_API_KEY must be printable ASCII")


@pytest.mark.process
def test_a_server_replies_as_generate_and_ends_when_told(chat_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "duo_jax"]
    text, model = "The first words of every prompt, " * 4, ["--model", str(chat_model)]
    pattern = ["--pattern", str(chat_model / "pattern"), "--sparsity", "0.5"]
    subprocess.run([*command, "prefill", *model, *pattern, "--prompt", text, "--out", tmp_path / "p"], check=True)
    flags = ["--port", "0", "--memory", "50MB", "--max-context", "256", "--page-size", "16", "--chunk", "32"]
    server = subprocess.Popen(
        [*command, "serve", *model, *pattern, *flags, "--prefix", tmp_path / "p"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DUO_API_KEY": "secret"},
    )
    try:
        assert server.stdout is not None and server.stderr is not None
        url = server.stdout.readline().strip()
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        (served,) = client.models.list()
        reply = client.completions.create(model=served.id, prompt=text + "and more", max_tokens=12, temperature=0)
        lm = load(chat_model, pattern=chat_model / "pattern", sparsity=0.5)
        assert reply.usage.prompt_tokens_details.cached_tokens == len(lm.encode(text)) - 1 > 128, "its keys were loaded"
        assert reply.choices[0].text == lm(text + "and more", max_new_tokens=12)
        chat = client.chat.completions.create(
            model=served.id, messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0
        )
        expected = lm.chat([{"role": "user", "content": "Hello"}], max_new_tokens=5)
        assert chat.choices[0].message.content == expected
        stream = client.completions.create(model=served.id, prompt="x", max_tokens=200, stream=True)
        next(stream)
        server.send_signal(signal.SIGINT)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length", "replies have time to end"
        out, err = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == 130 and not out and err.splitlines()[-1] == "duo serve: interrupted", err
    assert "8 rows" in err and "pages of 16 tokens" in err
