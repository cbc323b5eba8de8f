"""The engine on a device without arrays: streams, stop strings, cancellation, failures, shutdown."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from duo_jax.checkpoint.open import load_tokenizer
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.serve.device import Chosen
from duo_jax.serve.engine import ClosedError, Engine
from duo_jax.serve.jobs import Action, Fill, Save, Step
from duo_jax.serve.requests import FinishEvent, Request, TokenEvent
from duo_jax.serve.scheduler import QueueFullError, Sizes
from duo_jax.text.tokenizer import TextTokenizer
from tests.serve_device import POISON, HistoryDevice, reply_of

SIZES = Sizes(rows=4, pages=40, page_size=4, chunk_size=8, row_pages=20, snapshots=12, snapshot_every=16)


class SlowDevice(HistoryDevice):
    """Waits before each step until the test lets it go on, and fails when told to."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.go, self.error, self.fails_at = threading.Event(), None, object
        self.go.set()

    def do(self, action: Action) -> list[Chosen]:
        if isinstance(action, Step):
            assert self.go.wait(30)
        if isinstance(action, self.fails_at) and (error := self.error) is not None:
            if self.fails_at is not object:
                self.error = None
            raise error
        return super().do(action)


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> TextTokenizer:
    return load_tokenizer(text_model)


@pytest.fixture
def device() -> SlowDevice:
    return SlowDevice(SIZES)


@pytest.fixture
def make(device: SlowDevice, tokenizer: TextTokenizer) -> Iterator[Callable[..., Engine]]:
    engines = []

    def engine(sizes: Sizes = SIZES) -> Engine:
        device.__init__(sizes)
        engines.append(Engine(device, sizes, tokenizer, vocab_size=97, eos_ids=(2,)))
        return engines[-1]

    yield engine
    device.go.set()
    for one in engines:
        one.close(0)


def text_of(tokens: list[int]) -> str:
    return "".join(chr(29 + token) for token in tokens)


def go_once_closing(engine: Engine, device: SlowDevice) -> None:
    """Let the device go on once the engine has been told to stop."""
    while not engine._must_stop:
        time.sleep(0.01)
    device.go.set()


def check_free(engine: Engine) -> None:
    metrics = engine.metrics()
    assert (metrics.running, metrics.waiting) == (0, 0)
    assert metrics.pages - metrics.pages_free == metrics.pages_prefix


def test_every_reply_is_that_of_the_request_alone(make):
    engine = make(replace(SIZES, pages=17))
    draw = random.Random(1)
    system = [draw.randrange(3, 96) for _ in range(19)]
    requests = []
    for number in range(60):
        own = [draw.randrange(3, 96) for _ in range(draw.randrange(1, 30))]
        prompt = (system if number % 2 else []) + own
        requests.append(Request(tuple(prompt), draw.randrange(1, 16), seed=number, n=draw.choice([1, 1, 1, 2])))
    with engine._change:  # It waits until all are there, so that what happens does not depend on time.
        handles = [engine.submit(request) for request in requests]
        for handle in handles[::7]:
            handle.cancel()
    for request, handle in zip(requests, handles, strict=True):
        events = list(handle)
        for number in range(request.n):
            tokens = [e.token for e in events if isinstance(e, TokenEvent) and e.reply == number]
            (end,) = [e for e in events if isinstance(e, FinishEvent) and e.reply == number]
            assert tokens == reply_of(list(request.prompt), request.seed + number, len(tokens))
            assert end.reason == "cancelled" or (end.reason == "length" and len(tokens) == request.max_tokens)
            assert end.usage[::2] == (len(request.prompt), len(tokens))
            assert "".join(e.text for e in events if e.reply == number) == text_of(tokens)
    check_free(engine)
    metrics = engine.metrics()
    assert metrics.hits > 20 and metrics.cached_tokens > 20 * 16 and metrics.preemptions > 0
    assert metrics.finished["length"] > 50


def test_stop_strings_and_eos_end_a_reply(make):
    engine, prompt = make(), (5, 6, 7)
    whole = reply_of(list(prompt), 0, 12)
    stop = text_of(whole[4:6])
    (reply,) = engine.submit(Request(prompt, 12, stop=(stop,))).replies()
    assert reply == text_of(whole[:4]) and reply.tokens == whole[:6] and reply.finish_reason == "stop"
    events = list(engine.submit(Request(prompt, 12, eos_ids=(whole[3],), top=1)))
    assert [event.top[0].token for event in events[:-1]] == whole[:4]
    assert events[-1].reason == "stop" and "".join(event.text for event in events) == text_of(whole[:3])
    (reply,) = engine.submit(Request(prompt, None, eos_ids=())).replies()
    assert len(reply.tokens) == 20 * 4 - 3 + 1 and reply.finish_reason == "length"
    check_free(engine)


def test_a_cancelled_reply_ends_where_it_is(make, device):
    engine = make()
    device.go.clear()
    handle = engine.submit(Request((5,), 70))
    other = engine.submit(Request((6,), 5))
    next(handle)
    handle.cancel()
    device.go.set()
    *events, end = handle
    assert end.reason == "cancelled" and end.usage.completion == len(events) + 1 < 70
    assert len(other.replies()[0].tokens) == 5
    handle.cancel()  # It has ended already.
    device.go.clear()
    waiting = [engine.submit(Request((number,), 5)) for number in range(3, 12)]
    waiting[-1].cancel()
    device.go.set()
    assert [event.reason for event in waiting[-1]] == ["cancelled"]
    assert all(len(handle.replies()[0].tokens) == 5 for handle in waiting[:-1])
    check_free(engine)


def test_numbers_that_are_not_finite_end_their_own_request(make):
    engine = make()
    wrong, right = engine.submit(Request((POISON, 6, 5), 20)), engine.submit(Request((5, 6), 20))
    *events, end = wrong
    assert len(events) == 3 and end.reason == "error" and end.error.startswith("the logits are not finite")
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        engine.submit(Request((POISON, 6, 5), 20)).replies()
    assert right.replies()[0].tokens == reply_of([5, 6], 0, 20)
    check_free(engine)


def test_a_failing_device_ends_all_and_is_reported(make, device):
    engine = make()
    device.go.clear()
    handles = [engine.submit(Request((number,), 9)) for number in range(3, 9)]
    device.error = RuntimeError("INTERNAL: the device is gone\nmore")
    device.go.set()
    for handle in handles:
        assert [*handle][-1].error == "the device failed (RuntimeError: INTERNAL: the device is gone)"
    assert not engine.is_open and engine.failure
    metrics = engine.metrics()
    assert metrics.running == metrics.waiting == 0
    with pytest.raises(ClosedError, match="the device failed"):
        engine.submit(Request((5,)))


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: 1 GB"), MemoryError("1 GB")])
@pytest.mark.parametrize("kind", [Step, Fill, Save])
def test_requests_fail_where_memory_runs_out_and_all_others_are_computed_again(make, device, error, kind, caplog):
    engine = make()
    engine.keep([5] * 17)
    engine.keep([6] * 9, saved=[6] * 10)
    device.go.clear()
    prompts = [(*prefix, number) for prefix in ([5] * 17, [6] * 9, [7] * 9) for number in (8, 9)]
    handles = [engine.submit(Request(prompt, 9)) for prompt in prompts]
    device.fails_at, device.error = kind, error
    device.go.set()
    ends = [list(handle)[-1] for handle in handles]
    errors = [end.error for end in ends if end.error]
    assert 0 < len(errors) < 6 and set(errors) == {f"memory ran out ({error})"}
    assert f"memory ran out ({error}): {len(errors)} requests failed, all others are" in caplog.text
    for handle, end in zip(handles, ends, strict=True):
        row, prompt = handle.runs[0].row, list(handle.runs[0].request.prompt)
        assert end.error or row.reply.tokens == reply_of(prompt, 0, 9)
    assert engine.is_open
    check_free(engine)
    for prefix, cached in ((5, 16), (6, 8)):
        *_, end = engine.submit(Request((prefix,) * 20, 3))
        assert end.usage.cached == cached, "permanent prefixes are computed again"


def test_close_lets_replies_end_or_ends_them(make, device):
    engine = make()
    handles = [engine.submit(Request((number,), 9)) for number in range(3, 12)]
    engine.close()
    assert all(len(handle.replies()[0].tokens) == 9 for handle in handles)
    engine = make()
    device.go.clear()
    handle = engine.submit(Request((5,), 70))
    threading.Thread(target=go_once_closing, args=(engine, device)).start()
    engine.close(0)
    assert [*handle][-1][1:] == ("error", "", handle.runs[0].usage, "the server is shutting down")
    with pytest.raises(ClosedError, match="the server is shutting down"):
        engine.submit(Request((5,)))


def test_a_prefix_can_be_kept(make):
    engine = make()
    engine.keep([5] * 19)
    with pytest.raises(ValueError, match="a prefix of 7 tokens cannot be kept: it must have at least 8"):
        engine.keep([5] * 7)
    with pytest.raises(ValueError, match="prefix must have token ids from 0 to 96, got 97"):
        engine.keep([5] * 19 + [97])
    with pytest.raises(ValueError, match="a prefix of 7 tokens cannot be kept: it must have at least 8"):
        engine.keep([6] * 6, saved=[6] * 7)
    assert engine.metrics().pages_prefix == 4
    engine.keep([6] * 7, saved=[6] * 8)
    for prompt, usage in (((5,) * 25, (25, 16, 3)), ((6,) * 8, (8, 7, 3))):
        events = list(engine.submit(Request(prompt, 3)))
        assert events[-1].usage == usage


@pytest.mark.parametrize("kind", [Fill, Save])
def test_a_prefix_is_refused_where_memory_runs_out(make, device, kind):
    engine = make()
    device.fails_at, device.error = kind, MemoryError("1 GB")
    with pytest.raises(ValueError, match="memory ran out"):
        engine.keep([5] * 8)
    check_free(engine)
    engine.keep([5] * 8)
    assert engine.metrics().pages_prefix == 2


def test_a_prefix_without_room_for_its_rings_is_refused(make):
    engine = make(replace(SIZES, snapshots=1))
    engine.keep([5] * 16)
    with pytest.raises(ValueError, match="there is memory to keep 1 prefixes: keep fewer, or give more"):
        engine.keep([6] * 16)
    with pytest.raises(ValueError, match="there is memory to keep 1 prefixes"):
        engine.keep([6] * 7, saved=[6] * 8)


def test_what_cannot_be_served_is_refused(make, device):
    engine = make(SIZES)
    for request, message in [
        (lambda: Request(()), "prompt must have at least one token"),
        (lambda: Request((5, 97)), "prompt must have token ids from 0 to 96, got 97"),
        (lambda: Request((5, -1, 97)), "prompt must have token ids from 0 to 96, got -1"),
        (lambda: Request((5,), 0), "max_tokens must be at least 1, got 0"),
        (lambda: Request((5,), n=129), "n must be at most 128"),
        (lambda: Request((5,), top=21), "top must be at most 20"),
        (lambda: Request((5,), stop=("",)), "stop must be a list of strings, none of them empty"),
        (lambda: Request((5,), presence_penalty=3.0), "presence_penalty must be in"),
        (lambda: Request((5,), sampling=SamplingSettings(top_p=0.5)), "top_p choose among random draws"),
        (lambda: Request((5,) * 60, 30), "a prompt of 60 tokens and 30 of reply do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(request())
    check_free(engine)
    engine = make(Sizes(rows=1, pages=20, page_size=4, chunk_size=8, row_pages=20, snapshots=1, queue=3))
    device.go.clear()
    accepted = [engine.submit(Request((5, 6), 3)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="requests are waiting: try again later"):
        for _ in range(10_000):
            accepted.append(engine.submit(Request((5, 6), 3)))
    device.go.set()
    assert len({tuple(handle.replies()[0].tokens) for handle in accepted}) == 1
    check_free(engine)
