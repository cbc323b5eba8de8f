"""`duo bench-serve` against a server that answers at known times."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from aiohttp import web
from duo_eval.runner.record import read
from duo_eval.speed.serving.bench import BenchServe, serve_table, servers_table
from duo_eval.speed.serving.mix import Mix

from duo_jax.checkpoint.open import load_text_tokenizer

WAIT = 0.05


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{n}" for n in range(3000)))
    return str(path)


@pytest.fixture
def server():
    """A server of three tokens a reply, each after `WAIT`; it refuses the third request. Its address, and bodies."""
    bodies = []

    async def models(request):
        return web.json_response({"data": [{"id": "small"}]})

    async def chat(request):
        body = await request.json()
        seen = {"key": request.headers.get("Authorization"), "port": request.transport.get_extra_info("peername")[1]}
        bodies.append(body | seen)
        if len(bodies) == 3:
            return web.json_response({"error": {"message": "too busy"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event):
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        await send({"choices": [{"delta": {"role": "assistant"}}]})
        for piece in "abc":
            await asyncio.sleep(WAIT)
            await send({"choices": [{"delta": {"content": piece}}]})
        usage = {"prompt_tokens": 100, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 75}}
        await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    loop, started, address = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        return runner

    def serve():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    yield address[0], bodies
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_times_tokens_and_failures_are_those_of_the_server(server, text, text_model, tmp_path, capsys):
    address, bodies = server
    mix = Mix(requests=6, prefixes=2, prefix_tokens=40, question_tokens=(5, 9), reply_tokens=(3,))
    out = tmp_path / "serve.json"
    BenchServe(
        mix, url=address + "/", clients=2, tokenizer=str(text_model), haystack=text, api_key="secret", out=out
    ).run()
    _, results = read(out)
    assert [result["error"] is None for result in results].count(True) == 5
    assert "too busy" in next(result["error"] for result in results if result["error"])
    replies = [result for result in results if result["error"] is None]
    for reply in replies:
        # A busy machine may see the first token late, and the last one soon after it.
        assert reply["begin"] + WAIT <= reply["first"] <= reply["end"] and reply["end"] - reply["begin"] >= 3 * WAIT
        assert (reply["prompt"], reply["cached"], reply["reply"]) == (100, 75, 3)
    assert max(reply["end"] - reply["first"] for reply in replies) > WAIT
    assert {body["key"] for body in bodies} == {"Bearer secret"} and "secret" not in out.read_text()
    assert {body["model"] for body in bodies} == {"small"} and {body["max_tokens"] for body in bodies} == {3}
    assert len({body["port"] for body in bodies}) == 6  # None is sent on a connection that the server may be closing.
    systems = {body["messages"][0]["content"] for body in bodies}
    assert len(systems) <= 2 and len({body["messages"][1]["content"] for body in bodies}) == 6
    printed = capsys.readouterr().out
    assert serve_table(out) in printed and "75.0%" in printed
    assert "1 of 6 requests failed, the first because of ValueError: status 429" in printed


def test_servers_are_shown_next_to_each_other_if_they_were_asked_the_same(tmp_path):
    (tmp_path / "cpu").mkdir()

    def write(name, clients=2, cached=60, **about):
        times = [{"arrived": 0.0, "begin": 0.0, "first": 1.0 + n, "end": 30.0, "error": None} for n in range(3)]
        failed = {"first": None, "error": "status 429"}
        results = [time | {"prompt": 100, "cached": cached, "reply": 10} for time in times]
        mix = {"prefixes": 1, "prefix_tokens": 40}
        content = {
            "about": {"task": "bench-serve", "name": name, "clients": clients, "warm": False, "mix": mix, **about},
            "gates": {},
            "runs": [{"command": "duo bench-serve", "date": "2026-01-01", "device": name}],
            "results": [*results, results[0] | failed],
        }
        content["runs"][0]["machine"] = {"processor": "P", "cores": 2, "python": "3", "versions": {}, "commit": "c"}
        (tmp_path / "cpu" / f"serve-{name}.json").write_text(json.dumps(content))

    write("one", settings="16 slots")
    write("two", cached=None)
    table = servers_table(tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:4]]
    assert cells[0] == ["one", "16 slots", "3 of 4", "6.0", "2.0 s", "2.9 s", "1.0", "60.0%"]
    assert cells[1] == ["two", "-", "3 of 4", "6.0", "2.0 s", "2.9 s", "1.0", "not reported"]
    assert "2 clients, 1 shared text of 40 tokens, cold; P, 2 cores." in table
    write("three", clients=3)
    with pytest.raises(ValueError, match="must be of one mix on one machine"):
        servers_table(tmp_path)


def test_arrivals_are_as_frequent_as_asked(text, text_model):
    tokenizer = load_text_tokenizer(text_model)
    mix = Mix(requests=400, prefix_tokens=0, question_tokens=(4,), rate=8.0)
    tokens = tokenizer.encode(Path(text).read_text(), verbose=False)
    _, asks = mix.draw(tokens, tokenizer)
    assert asks[-1].at == pytest.approx(50, rel=0.2) and asks[0].system == ""
    assert mix.draw(tokens, tokenizer)[1] == asks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": Mix(requests=0)}, "requests"),
        ({"mix": Mix(reply_tokens=())}, "reply_tokens"),
        ({"mix": Mix(rate=-1.0)}, "rate"),
        ({"clients": 0}, "clients"),
        ({"timeout": 0.0}, "timeout"),
        ({"mix": Mix(prefix_tokens=100_000)}, "too short"),
        ({"url": "http://127.0.0.1:9"}, "no server answers at http://127.0.0.1:9"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message, text, text_model, tmp_path):
    small = {"mix": Mix(prefix_tokens=10, question_tokens=(5,))}
    with pytest.raises(ValueError, match=message):
        BenchServe(
            **small | settings | {"tokenizer": str(text_model), "haystack": text, "out": tmp_path / "x.json"}
        ).run()
