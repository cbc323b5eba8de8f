"""What goes wrong around a server: clients that stall, flood it or die, and a server that is killed."""

import collections
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from duo_jax import load
from duo_jax.serve.http import server as server_module
from duo_jax.text.lm import LM
from tests.test_serve_http import HELLO, KEY, SIZES, Running, expected

# A reply of about 130 kB.
LONG = {"model": "tiny", "prompt": [5], "max_tokens": 150, "n": 3, "stream": True, "logprobs": 1}


@pytest.fixture(scope="module")
def lm(chat_model: Path) -> LM:
    return load(chat_model)


@pytest.fixture
def start(lm: LM) -> Iterator[Callable[..., Running]]:
    """Starts servers whose connections buffer little."""
    servers = []

    def start(**options: object) -> Running:
        servers.append(Running(lm, **options))
        servers[-1].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def hasty(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server that looks after its connections often."""
    monkeypatch.setattr(server_module, "STALL_SECONDS", 1)
    return start()


def connect(port: int) -> socket.socket:
    """A connection with little room for what is not read yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(120)
    client.connect(("127.0.0.1", port))
    return client


def request_bytes(body: object, key: str = KEY, **headers: str) -> bytes:
    content = json.dumps(body).encode()
    fields = {"Host": "localhost", "Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    fields |= {"Content-Length": str(len(content))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content


def read_all(client: socket.socket, size: int = 65536, pause: float = 0.0) -> bytes:
    """What the server sends until it ends the connection."""
    data = bytearray()
    with suppress(ConnectionError):
        while part := client.recv(size):
            data += part
            time.sleep(pause)
    return bytes(data)


def burst(port: int, count: int, tokens: int) -> list[bytes]:
    """The answers to requests of so many clients, all of which connect before any of them is read."""
    answers = [bytearray() for _ in range(count)]
    with selectors.DefaultSelector() as selector, ExitStack() as stack:

        def begin(number: int) -> None:
            client = stack.enter_context(closing(socket.socket()))
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            selector.register(client, selectors.EVENT_WRITE, number)

        for number in range(count):
            begin(number)
        while clients := len(selector.get_map()):
            events = selector.select(300)
            assert events, f"{clients} clients wait, and nothing happens"
            for key, _ in events:
                client, number = key.fileobj, key.data
                try:
                    if key.events == selectors.EVENT_WRITE:
                        body = {
                            "model": "tiny",
                            "prompt": [5] * (1 + number % 40),
                            "max_tokens": tokens,
                            "seed": number,
                        }
                        client.sendall(request_bytes(body, Connection="close"))
                        selector.modify(client, selectors.EVENT_READ, number)
                        continue
                    part = client.recv(65536)
                except TimeoutError:  # The kernel gave up after two minutes; the server has not seen this client.
                    selector.unregister(client)
                    client.close()
                    begin(number)
                    continue
                except ConnectionError:
                    part = b""
                answers[number] += part
                if not part:
                    selector.unregister(client)
    return [bytes(answer) for answer in answers]


def check_burst(answers: list[bytes], queue: int) -> None:
    """Each client has a reply, or is asked to come again."""
    replies = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200")]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429")]
    assert len(replies) + len(refused) == len(answers), collections.Counter(answer[9:12] for answer in answers)
    assert len(replies) >= queue and all(b'"finish_reason"' in reply for reply in replies)
    assert all(b"retry-after: 1" in refusal and b'"queue_full"' in refusal for refusal in refused)


def check_answers(server: Running, lm: LM) -> None:
    # A server that looks after its connections often may end one before its request has come.
    reply = (
        server.client()
        .with_options(max_retries=5)
        .chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, seed=5)
    )
    assert reply.choices[0].message.content == expected(lm, HELLO, 9, 5)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def test_a_client_that_reads_nothing_frees_its_row_and_is_cut_off(hasty, lm):
    with closing(connect(hasty.port)) as stuck:
        stuck.sendall(request_bytes(LONG))
        hasty.wait_until(running=1)
        check_answers(hasty, lm)
        hasty.wait_until(running=0, waiting=0)
        wait_for(lambda: len(hasty.server.server_state.connections) <= 1)  # The other client may keep its own.
        assert b"[DONE]" not in read_all(stuck)


def test_a_slow_reader_gets_its_whole_reply(start, monkeypatch):
    monkeypatch.setattr(server_module, "STALL_SECONDS", 2)
    with closing(connect(start().port)) as slow:
        slow.sendall(request_bytes(LONG, Connection="close"))
        data = read_all(slow, size=4096, pause=0.15)
    assert b"data: [DONE]" in data and len(data) > 100_000


def test_a_server_stops_although_clients_do_not_read_or_write_on(start, monkeypatch):
    monkeypatch.setattr(server_module, "LAST_SECONDS", 0.2)
    server = start()
    with closing(connect(server.port)) as stuck, closing(connect(server.port)) as silent:
        stuck.sendall(request_bytes(LONG))
        silent.sendall(request_bytes(LONG)[:-1])
        server.wait_until(running=1)
        server.wait_until(running=0)
        server.server.should_exit = True
        server.thread.join(120)
        assert not server.thread.is_alive()


def test_connections_that_are_half_open_do_not_hinder_others(hasty, lm):
    begun = [b"", b"POST /v1/comp", request_bytes(LONG)[:-1]]
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(hasty.port))) for _ in range(90)]
        for number, client in enumerate(clients):
            client.sendall(begun[number % len(begun)])
        check_answers(hasty, lm)
        answers = [read_all(client).partition(b"\r\n")[0] for client in clients]
    assert collections.Counter(answers) == {b"": 60, b"HTTP/1.1 408 Request Timeout": 30}


@pytest.mark.parametrize("line", [b"A: " + b"b" * 4000 + b"\r\n", b"A: b\r\n", b"b" * 4000])
def test_heads_without_end_are_refused(start, lm, line):
    server = start()
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(server.port))) for _ in range(20)]
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + line * (200_000 // len(line)))
        assert all(read_all(client)[:12] in (b"HTTP/1.1 400", b"") for client in clients)
        check_answers(server, lm)


def test_a_body_without_end_is_refused(hasty):
    head, _, _ = (
        request_bytes(0, **{"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 1\r\n", b"").rpartition(b"0")
    )
    with closing(connect(hasty.port)) as client:
        with suppress(ConnectionError):
            client.sendall(head + (b"2710\r\n" + b" " * 10_000 + b"\r\n") * 200)
        assert b"the body has more than 100000 bytes" in read_all(client)


def test_bodies_that_arrive_together_have_a_limit(hasty, lm):
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(hasty.port))) for _ in range(24)]
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(request_bytes({"prompt": "x" * 90_000})[:-1])
        answers = collections.Counter(read_all(client)[9:12] for client in clients)
        assert answers[b"408"] >= 16 and answers[b"503"] >= 1 and sum(answers.values()) == 24, answers
    check_answers(hasty, lm)


def test_more_connections_than_fit_are_refused_and_the_others_are_served(start, lm):
    server = start(connections=3)
    with ExitStack() as stack:
        client = httpx2.Client(headers={"Authorization": f"Bearer {KEY}"})
        stack.callback(client.close)
        assert client.get(f"{server.url}/v1/models").status_code == 200
        for _ in range(2):
            stack.enter_context(closing(connect(server.port)))
        refused = server.post("/v1/completions", json={})
        assert refused.status_code == 503 and "too many connections" in refused.json()["error"]["message"]
        assert refused.headers["Retry-After"] == "1"
        assert client.get(f"{server.url}/v1/models").status_code == 200
    wait_for(lambda: not server.server.server_state.connections)
    check_answers(server, lm)


def test_clients_that_come_at_the_same_time_all_get_an_answer(start, lm):
    server = start(sizes=replace(SIZES, queue=40))
    # The kernel's: what it drops, the server never sees.
    (backlog,) = struct.unpack("I", server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:])
    assert backlog == min(int(Path("/proc/sys/net/core/somaxconn").read_text()), server_module.BACKLOG)
    answers = burst(server.port, 150, 20)
    check_burst(answers, 40)
    check_answers(server, lm)


@contextmanager
def serving(model: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`duo serve` in a process of its own, and its address."""
    flags = ["--pattern", str(model / "pattern"), "--sparsity", "0.5", "--memory", "50MB", "--max-context", "256"]
    flags += ["--page-size", "16", "--chunk", "32", "--name", "tiny", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "duo_jax", "serve", "--model", str(model), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DUO_API_KEY": KEY},
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.process
def test_a_server_that_was_killed_starts_again_at_the_same_port(chat_model):
    def ask(url: str, **options: object) -> object:
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
        return client.completions.create(model="tiny", prompt="Hello", temperature=0, **options)

    with serving(chat_model) as (server, url):
        text = ask(url, max_tokens=20).choices[0].text
        stream = ask(url, max_tokens=200, stream=True)
        next(stream)
        server.send_signal(signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(stream)
    with serving(chat_model, int(url.rpartition(":")[2].partition("/")[0])) as (_, again):
        assert again == url and ask(again, max_tokens=20).choices[0].text == text


@pytest.mark.slow
def test_10_000_clients_at_the_same_time_all_get_an_answer(chat_model):
    """Also those that come while the server is stopped: more than the system lets wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 10_500:
        pytest.skip(f"a process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 10_500), hard))
    try:
        with serving(chat_model) as (server, url):
            port = int(url.rpartition(":")[2].partition("/")[0])
            process = psutil.Process(server.pid)
            before = process.memory_info().rss
            server.send_signal(signal.SIGSTOP)
            threading.Timer(10, server.send_signal, [signal.SIGCONT]).start()
            check_burst(burst(port, 10_000, 4), 1024)
            assert httpx2.get(f"http://127.0.0.1:{port}/health", timeout=300).status_code == 200
            assert process.memory_info().rss - before < 400e6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
