"""`duo serve` as OpenAI's own client sees it, and as clients do that send anything else."""

import collections
import itertools
import json
import os
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from duo_jax import load
from duo_jax.serve.engine import Engine
from duo_jax.serve.http import app
from duo_jax.serve.http import server as server_module
from duo_jax.serve.http.app import Limits, make_app
from duo_jax.serve.http.server import Server, listen
from duo_jax.serve.scheduler import Sizes
from duo_jax.text.lm import LM
from tests.serve_device import POISON, reply_of
from tests.test_serve_engine import SlowDevice, go_once_closing, text_of

SIZES = Sizes(rows=3, pages=60, page_size=4, chunk_size=8, row_pages=40, snapshots=12, snapshot_every=16, queue=4)
KEY = "secret"
HELLO = [{"role": "user", "content": "Hello"}]


class Running:
    """A server on a free port, in a thread."""

    def __init__(
        self, lm: LM, grace: float = 10.0, seconds: float = 20.0, sizes: Sizes = SIZES, connections: int = 1000,
        **options: object,
    ) -> None:  # fmt: skip
        self.device = SlowDevice(sizes)
        self.engine = Engine(self.device, sizes, lm.tokenizer, vocab_size=97, eos_ids=(2,))
        limits = Limits(body_bytes=100_000, body_seconds=0.5, seconds=seconds)
        served = make_app(self.engine, lm, "tiny", limits=limits, **{"api_key": KEY} | options)
        self.socket, ready = listen("127.0.0.1", 0), threading.Event()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(served, self.engine, grace=grace, connections=connections, ready=ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        assert ready.wait(20)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def post(self, path: str, **options: object) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {KEY}", **options.pop("headers", {})}
        return httpx2.post(self.url + path, headers=headers, timeout=120, **options)

    def stop(self) -> None:
        self.device.go.set()
        self.server.should_exit = True
        self.thread.join(120)
        self.socket.close()
        assert not self.thread.is_alive()

    def wait_until(self, **numbers: int) -> None:
        """Wait until the engine's metrics are these."""
        for _ in range(12_000):  # Two minutes: a failing test may be slow, a slow machine may not fail it.
            metrics = self.engine.metrics()
            if all(getattr(metrics, name) == value for name, value in numbers.items()):
                return
            time.sleep(0.01)
        raise AssertionError(metrics)


@pytest.fixture(scope="module")
def lm(chat_model: Path) -> LM:
    return load(chat_model)


@pytest.fixture(scope="module")
def server(lm: LM) -> Iterator[Running]:
    running = Running(lm)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def expected(lm: LM, messages: list[dict[str, str]], count: int, seed: int = 0) -> str:
    return text_of(reply_of(lm.encode_chat(messages), seed, count))


def test_chat(client, lm):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, seed=5, temperature=0)
    assert reply.choices[0].message.content == expected(lm, HELLO, 9, 5)
    assert (reply.choices[0].finish_reason, reply.choices[0].message.role) == ("length", "assistant")
    prompt = len(lm.encode_chat(HELLO))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (
        prompt,
        9,
        prompt + 9,
    )
    # A second turn continues the first: the earlier turns are known up to their last whole chunk.
    turns = [
        *HELLO,
        {"role": "assistant", "content": reply.choices[0].message.content},
        {"role": "user", "content": "?"},
    ]
    returned = [*HELLO, reply.choices[0].message.model_dump(), turns[-1]]  # With fields that are null.
    again = client.chat.completions.create(model="tiny", messages=returned, max_completion_tokens=4, seed=5)
    assert again.choices[0].message.content == expected(lm, turns, 4, 5)
    assert again.usage.prompt_tokens_details.cached_tokens >= 24


# Templates: one that only adds to a conversation, and one that leaves out the beginning of earlier replies, as those of
# models that think do.
TEMPLATES = {"appends": "m.content", "renders again": "m.content[4:] if m.role == 'assistant' else m.content"}


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_of_ten_turns_computes_each_token_once(chat_model, tmp_path, template, chunk):
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("m.content", TEMPLATES[template]))
    lm = load(folder)
    pages = 2000 // chunk
    sizes = Sizes(rows=2, pages=pages, page_size=chunk, chunk_size=chunk, row_pages=pages // 2, snapshots=1000, queue=4)
    running = Running(lm, sizes=sizes)
    client, messages, known, new = running.client(), [], [], 0
    for turn in range(10):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        prompt = lm.encode_chat(messages)
        pairs = zip(known, prompt, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        new += len(prompt) - shared
        reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=turn)
        text = reply.choices[0].message.content
        assert text == expected(lm, messages, 12, turn)
        cached = reply.usage.prompt_tokens_details.cached_tokens
        # The last token of a reply is not computed before the next turn.
        assert shared - chunk < cached <= shared
        if chunk == 1:
            assert running.device.filled == new
        messages.append({"role": "assistant", "content": text})
        known = [*prompt, *lm.encode(text)][:-1]
    assert running.device.filled < new + 10 * chunk
    if template == "appends" and chunk == 1:
        # With the steps of the replies: every token of the last turn's text once, but the newest.
        assert running.device.filled + 10 * 11 == len(prompt) + 11
    running.stop()


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client, lm):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 3}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=7, **options))
    texts, reasons = ["", ""], {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [expected(lm, messages, 7, 3), expected(lm, messages, 7, 4)]
    assert reasons == {0: "length", 1: "length"} and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 14
    assert chunks[-1].usage.prompt_tokens == len(lm.encode_chat(messages))


def test_completions(client, lm):
    prompts = ["once upon", "a time"]
    reply = client.completions.create(model="tiny", prompt=prompts, n=2, seed=1, max_tokens=5, logprobs=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for number, choice in enumerate(reply.choices):
        tokens = reply_of(lm.encode(prompts[number // 2]), 1 + number % 2, 5)
        assert choice.text == text_of(tokens) and choice.finish_reason == "length"
        assert choice.logprobs.tokens == list(choice.text) and choice.logprobs.text_offset == [0, 1, 2, 3, 4]
        assert choice.logprobs.token_logprobs == [-float(token) for token in tokens]
        assert choice.logprobs.top_logprobs == [{chr(29 + token): -float(token)} for token in tokens]
    assert reply.usage.prompt_tokens == sum(len(lm.encode(prompt)) for prompt in prompts)
    whole = client.completions.create(model="tiny", prompt=[5, 6, 7], seed=0).choices[0].text
    assert whole == text_of(reply_of([5, 6, 7], 0, 16)), "16 tokens, as by OpenAI"
    stopped = client.completions.create(model="tiny", prompt=[5, 6, 7], seed=0, stop=[whole[4:6]], stream=True)
    chunks = [chunk.choices[0] for chunk in stopped]
    assert "".join(choice.text for choice in chunks) == whole[:4] and chunks[-1].finish_reason == "stop"


def test_log_probabilities_of_a_chat(client, lm):
    options = {"logprobs": True, "top_logprobs": 1, "seed": 0, "max_tokens": 3}
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **options).choices[0]
    content = whole.logprobs.content
    assert "".join(entry.token for entry in content) == whole.message.content
    assert [bytes(entry.bytes).decode() for entry in content] == [entry.top_logprobs[0].token for entry in content]
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **options))
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for part in streamed if part for entry in part.content] == content


def test_a_developer_is_the_system(client, lm):
    messages = [{"role": "system", "content": "Be short."}, *HELLO]
    sent = [{"role": "developer", "content": "Be short."}, *HELLO]
    reply = client.chat.completions.create(model="tiny", messages=sent, max_tokens=4, seed=0)
    assert reply.choices[0].message.content == expected(lm, messages, 4)


def test_models_and_health_and_metrics(client, server):
    (model,) = client.models.list()
    assert model.id == client.models.retrieve("tiny").id == "tiny" and model.max_model_len == 160
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    text = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    numbers = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert numbers["duo_rows"] == 3 and numbers["duo_requests_running"] == 0
    assert numbers['duo_replies_total{reason="length"}'] > 5 and numbers["duo_cached_tokens_total"] > 10
    assert numbers["duo_first_token_seconds_count"] > 3 and 0 < numbers["duo_kv_bytes"] < numbers["duo_kv_full_bytes"]


def test_numbers_for_the_page(server):
    assert httpx2.get(f"{server.url}/stats").status_code == 401
    stats = httpx2.get(f"{server.url}/stats", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert stats["pages"] == SIZES.pages and stats["pages_free"] <= SIZES.pages and stats["rows"] == SIZES.rows
    page = httpx2.get(server.url)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert all(f"stats.{name}" in page.text for name in stats if name not in UNUSED)
    assert not re.search(r"https?://|src=|@import", page.text), "it loads nothing"


# Numbers that the page does not show.
UNUSED = ("rows", "pages_prefix", "snapshots", "reply_tokens", "preemptions", "finished")


REFUSED = {
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
    "response_format": ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "'logit_bias' is not supported"),
    "unknown": ({"colour": "red"}, "'colour' is not supported"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "message 0 has a part of type 'image_url': this model reads text only",
    ),
    "tool message": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role: Input should be 'system', 'developer', 'user' or 'assistant'",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "'messages.0.tool_calls' is not supported",
    ),
    "temperature": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "type": ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    "empty": ({"messages": []}, "messages: List should have at least 1 item"),
    "stop": ({"stop": [""]}, "stop must be a list of strings, none of them empty"),
    "stops": ({"stop": ["x"] * 65}, "stop must be at most 64 strings of 1000 characters each"),
    "long stop": ({"stop": "x" * 1001}, "stop must be at most 64 strings of 1000 characters each"),
    "too long": (
        {"messages": [{"role": "user", "content": "x" * 200}]},
        "do not fit: a request has room for 160 tokens",
    ),
    "surrogate": ({"messages": [{"role": "user", "content": "\\ud800"}]}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(server, case):
    change, message = REFUSED[case]
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 3} | change).replace("\\\\ud800", "\\ud800")
    response = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", error
    assert message in error["message"] and len(error["message"]) < 400


def test_fields_that_ask_for_nothing_are_taken(server):
    nothing = {"tools": None, "logit_bias": {}, "response_format": {"type": "text"}, "user": "u", "colour": None}
    response = server.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 1, **nothing}
    )
    assert response.status_code == 200


BODIES = {
    "empty": (b"", "the body is not JSON"),
    "not JSON": (b"{", "the body is not JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "the body is not JSON"),
    "a list": (b"[]", "the body must be a JSON object, got list"),
    "NaN": (b'{"model": "tiny", "messages": NaN}', "NaN is not a number of JSON"),
    "half of a surrogate pair": (b'{"\\ud800": 1}', "is not supported by this server"),
    "deep": (b"[" * 50_000, "nested too deeply"),
    "deep messages": (b'{"model": "tiny", "messages": ' + b"[" * 500 + b"]" * 500 + b"}", "messages.0"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_no_requests_are_refused(server, case):
    body, message = BODIES[case]
    response = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_errors_have_their_status(server, client):
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other': this server has 'tiny'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.APIStatusError, match="the body has more than 100000 bytes") as refused:
        client.completions.create(model="tiny", prompt="x" * 200_000)
    assert refused.value.status_code == 413
    assert server.post("/v1/completions", content=b"{}").status_code == 415
    assert server.post("/v1/unknown").json()["error"]["message"] == "POST /v1/unknown: Not Found"
    assert httpx2.get(f"{server.url}/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="prompt must have token ids from 0 to 96, got 97"):
        client.completions.create(model="tiny", prompt=[97])
    with pytest.raises(openai.BadRequestError, match=r"prompt\.1: Input should be a valid string"):
        client.completions.create(model="tiny", prompt=["a", [5]])
    with pytest.raises(openai.InternalServerError, match="the logits are not finite"):
        client.completions.create(model="tiny", prompt=[POISON, 4, 5])
    stream = client.completions.create(model="tiny", prompt=[POISON, 4, 5], stream=True)
    with pytest.raises(openai.APIError, match="the logits are not finite"):
        list(stream)
    with closing(socket.create_connection(("127.0.0.1", server.port))) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n".encode())
        slow.settimeout(120)
        assert b"408" in slow.recv(1000).split(b"\r\n")[0], "a body that does not arrive"
    with closing(socket.create_connection(("127.0.0.1", server.port))) as flood:
        flood.settimeout(120)
        flood.sendall(b"GET /health HTTP/1.1\r\n" + b"A: " + b"b" * 100_000)
        assert b"400" in flood.recv(1000).split(b"\r\n")[0], "a head that is too long"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(server, client, stream):
    server.device.go.clear()
    body = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    cancelled = server.engine.metrics().finished.get("cancelled", 0)
    gone = socket.create_connection(("127.0.0.1", server.port))
    gone.sendall(head.encode() + body)
    server.wait_until(running=1)
    gone.close()
    while not (server.engine._cancelled or server.engine.metrics().finished.get("cancelled", 0) > cancelled):
        time.sleep(0.01)
    server.device.go.set()
    server.wait_until(running=0)
    assert server.engine.metrics().finished["cancelled"] == cancelled + 1


def test_more_requests_than_may_wait_are_refused(server, client):
    server.device.go.clear()
    handles = [client.completions.create(model="tiny", prompt=[5], max_tokens=2, stream=True) for _ in range(1)]
    with pytest.raises(openai.RateLimitError, match="requests are waiting: try again later"):
        handles += [client.completions.create(model="tiny", prompt=[6], max_tokens=2, stream=True) for _ in range(20)]
    # The body is not even parsed.
    refused = server.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    server.device.go.set()
    for handle in handles:
        assert [chunk.choices[0].finish_reason for chunk in handle][-1] == "length"


def test_a_stopped_server_ends_its_streams_with_an_error(lm):
    running = Running(lm, grace=0.1)
    client = running.client()
    running.device.go.clear()
    stream = client.completions.create(model="tiny", prompt=[5], max_tokens=100, stream=True)
    running.server.should_exit = True
    running.wait_until(running=1)
    threading.Thread(target=go_once_closing, args=(running.engine, running.device)).start()
    with pytest.raises(openai.APIError, match="the server is shutting down"):
        list(stream)
    running.stop()


def test_a_stream_that_waits_shows_signs_of_life_until_its_time_is_over(lm, monkeypatch):
    monkeypatch.setattr(app, "SILENCE", 0.05)
    running = Running(lm, seconds=2.0)
    running.device.go.clear()
    body = {"model": "tiny", "prompt": [5], "max_tokens": 100}
    text = running.post("/v1/completions", json=body | {"stream": True}).text
    assert text.count(": waiting\n\n") > 2 and "the request took more than 2 seconds" in text.splitlines()[-2]
    response = running.post("/v1/completions", json=body)
    assert response.status_code == 408 and "more than 2 seconds" in response.json()["error"]["message"]
    running.device.go.set()
    running.wait_until(running=0, waiting=0)
    running.stop()


def test_heads_that_do_not_end_are_cut_off_and_long_replies_are_not(lm, monkeypatch):
    monkeypatch.setattr(server_module, "STALL_SECONDS", 1)
    running = Running(lm)
    for begun in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
        with closing(socket.create_connection(("127.0.0.1", running.port), timeout=120)) as slow:
            slow.sendall(begun)
            assert slow.recv(100) == b""
    running.device.go.clear()
    threading.Timer(2.5, running.device.go.set).start()
    # A client may stall too, between its connection and its request.
    reply = running.client().with_options(max_retries=5).completions.create(model="tiny", prompt=[5], max_tokens=3)
    assert reply.choices[0].finish_reason == "length"
    running.stop()


def test_only_known_names_lead_to_a_server_of_this_machine(lm):
    running = Running(lm, hosts=("127.0.0.1", "[::1]"), api_key=None)
    assert httpx2.get(f"{running.url}/health").status_code == 200
    assert httpx2.get(f"{running.url}/health", headers={"Host": "[::1]:80"}).status_code == 200
    assert httpx2.get(f"{running.url}/health", headers={"Host": "evil.example"}).status_code == 400
    running.stop()


@pytest.mark.slow
def test_memory_does_not_grow_under_random_load(lm):
    """Ten minutes of clients of all kinds; DUO_SOAK_SECONDS sets another time."""
    running, end = Running(lm), time.monotonic() + float(os.environ.get("DUO_SOAK_SECONDS", "600"))
    process, failures, asked = psutil.Process(), [], collections.Counter()

    def raw(draw: random.Random) -> None:
        """A client that sends something, perhaps reads slowly, and goes away."""
        body = json.dumps({"model": "tiny", "prompt": [5] * draw.randrange(1, 60), "max_tokens": 90, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        sent = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        with closing(socket.create_connection(("127.0.0.1", running.port))) as gone:
            gone.sendall(draw.choice([sent, sent, sent[: draw.randrange(len(sent))], draw.randbytes(200)]))
            gone.settimeout(0.2)
            with suppress(OSError):
                for _ in range(draw.randrange(4)):
                    time.sleep(draw.random() / 10)
                    gone.recv(64)

    def ask(number: int) -> None:
        draw, client = random.Random(number), running.client()
        while time.monotonic() < end:
            prompt = [draw.randrange(3, 93) for _ in range(draw.randrange(1, 9))] * draw.randrange(1, 7)
            count, kind = draw.randrange(1, 60), draw.choice(["reply", "reply", "stream", "raw", "wrong", "poison"])
            try:
                if kind == "raw":
                    raw(draw)
                elif kind == "wrong":
                    assert running.post("/v1/completions", content=draw.randbytes(100)).status_code == 415
                elif kind == "poison":
                    client.completions.create(model="tiny", prompt=[POISON, 3], max_tokens=5)
                else:
                    stream = kind == "stream"
                    reply = client.completions.create(
                        model="tiny", prompt=prompt, max_tokens=count, seed=number, stream=stream
                    )
                    text = "".join(chunk.choices[0].text for chunk in reply) if stream else reply.choices[0].text
                    assert text == text_of(reply_of(prompt, number, count))
                asked[kind] += 1
            except openai.RateLimitError:
                asked["refused"] += 1
            except openai.InternalServerError:
                assert kind == "poison"
                asked[kind] += 1
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(min(30.0, (end - time.monotonic()) / 2))
    before = process.memory_info().rss
    for thread in threads:
        thread.join()
    running.wait_until(running=0, waiting=0)
    metrics = running.engine.metrics()
    assert not failures and len(asked) == 6, asked
    assert metrics.pages - metrics.pages_free == metrics.pages_prefix and metrics.finished["cancelled"]
    assert process.memory_info().rss - before < 30e6, asked
    running.stop()
