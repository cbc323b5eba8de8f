"""Exact under load: a reply among others is that of the same request alone, token by token and bit for bit."""

import functools
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from duo_jax import HeadPattern, KVCache, Model, ModelConfig, load_model, make_mesh, prefill
from duo_jax.cache.spec import CacheSpec
from duo_jax.checkpoint.open import load_tokenizer
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.plan import Plan, any_pattern
from duo_jax.serve import programs
from duo_jax.serve.device import Chosen
from duo_jax.serve.engine import Engine
from duo_jax.serve.jobs import Action, Fill
from duo_jax.serve.model_device import GROUP, ModelDevice, page_bytes, ring_bytes
from duo_jax.serve.programs import Programs, Rows
from duo_jax.serve.requests import Event, FinishEvent, Request, TokenEvent
from duo_jax.serve.scheduler import Sizes
from duo_jax.serve.sizing import plan_sizes, temporaries
from duo_jax.serve.start import keep_prefix
from duo_jax.sizes import nbytes
from duo_jax.text.tokenizer import TextTokenizer

SIZES = Sizes(rows=4, pages=24, page_size=8, chunk_size=16, row_pages=16, snapshots=8, snapshot_every=32)
SAMPLERS = [
    {},
    {"sampling": SamplingSettings(repetition_penalty=1.3)},
    {"sampling": SamplingSettings(temperature=1.0), "top": 3},
    {"sampling": SamplingSettings(temperature=0.8, top_k=20, top_p=0.9), "frequency_penalty": 0.5},
    {"sampling": SamplingSettings(temperature=1.5, min_p=0.05), "presence_penalty": -1.0, "stop": ("e", "q1")},
]


@dataclass(frozen=True)
class Served:
    """A model, and engines for it, which share its compiled programs."""

    model: Model
    tokenizer: TextTokenizer
    pattern: HeadPattern

    def spec(self, sizes: Sizes) -> CacheSpec:
        config = self.model.config
        return CacheSpec(
            config,
            self.pattern,
            sizes.rows,
            sizes.row_pages * sizes.page_size,
            config.precision(),
            self.model.mesh,
            page_size=sizes.page_size,
            num_pages=sizes.pages,
        )

    def engine(self, sizes: Sizes) -> Engine:
        device = ModelDevice(self.model, self.spec(sizes), sizes.chunk_size)
        return Engine(device, sizes, self.tokenizer, vocab_size=self.model.config.vocab_size, eos_ids=(2,))


@pytest.fixture(scope="module")
def served(text_model: Path) -> Served:
    pattern = HeadPattern.load(text_model / "pattern", sparsity=0.5, sink_size=3, recent_size=12)
    # As `duo serve` stores it: only then a step computes a few rows at a time.
    return Served(load_model(text_model).by_output(donate=True), load_tokenizer(text_model), pattern)


@pytest.fixture(scope="module")
def alone(served: Served) -> Iterator[Engine]:
    """Serves one request at a time, computing every prompt from its beginning."""
    with served.engine(replace(SIZES, snapshots=0)) as engine:
        yield engine


def requests(count: int, seed: int, most: int) -> list[Request]:
    """Prompts of all lengths, some with a prefix in common, and all ways to choose tokens."""
    draw = random.Random(seed)
    prefixes = [[], *([draw.randrange(3, 97) for _ in range(size)] for size in (20, 45))]
    made = []
    for number in range(count):
        own = [draw.randrange(3, 97) for _ in range(draw.randrange(1, 50))]
        settings = SAMPLERS[number % len(SAMPLERS)] | {"n": draw.choice([1, 1, 1, 1, 2])}
        prompt = draw.choice(prefixes) + own
        made.append(Request(tuple(prompt), draw.randrange(1, most), seed=number, **settings))
    draw.shuffle(made)
    return made


def replies(events: list) -> dict[int, tuple[list, str, str]]:
    """Of each reply, the tokens with their log-probabilities, the text, and why it ended."""
    made = {}
    for reply in {event.reply for event in events}:
        own = [event for event in events if event.reply == reply]
        tokens = [event[1:4] for event in own if isinstance(event, TokenEvent)]
        made[reply] = tokens, "".join(event.text for event in own), own[-1].reason
    return made


def check_load(served: Served, alone: Engine, sizes: Sizes, count: int, at_a_time: int, cancelled: int) -> None:
    made = requests(count, seed=count, most=34 if count > 100 else 24)
    draw, slots = random.Random(3), threading.Semaphore(at_a_time)
    last = {number: draw.randrange(1, 8) for number in range(cancelled)}
    results, handles = {number: [] for number in range(count)}, {}

    def listen(number: int, event: Event) -> None:
        """Called between the engine's steps, so that what it does next does not depend on time."""
        results[number].append(event)
        if len(results[number]) == last.get(number):
            handles[number].cancel()
        if sum(isinstance(event, FinishEvent) for event in results[number]) == made[number].n:
            slots.release()

    with served.engine(sizes) as engine:
        # All are there before the first begins, if that many are served at a time.
        with engine._change if count <= at_a_time else nullcontext():
            for number, request in enumerate(made):
                slots.acquire()
                with engine._change:  # The engine waits.
                    handles[number] = engine.submit(request, functools.partial(listen, number))
        engine.close()
        metrics = engine.metrics()
    assert (metrics.running, metrics.waiting) == (0, 0)
    assert metrics.pages - metrics.pages_free == metrics.pages_prefix and metrics.hits
    for number, request in enumerate(made):
        expected = replies(list(alone.submit(request)))
        for reply, (tokens, text, reason) in replies(results[number]).items():
            if reason == "cancelled":
                assert tokens == expected[reply][0][: len(tokens)]
                assert expected[reply][1].startswith(text)
            else:
                assert (tokens, text, reason) == expected[reply]
    assert metrics.preemptions and metrics.finished["cancelled"]


def test_replies_under_load_are_those_of_the_requests_alone(served, alone):
    check_load(served, alone, SIZES, count=14, at_a_time=14, cancelled=4)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [8, 16])
def test_200_requests_16_at_a_time(served, chunk_size):
    sizes = replace(SIZES, rows=8, pages=20, chunk_size=chunk_size)
    with served.engine(replace(sizes, snapshots=0)) as alone:
        check_load(served, alone, sizes, count=200, at_a_time=16, cancelled=30)


@pytest.mark.parametrize(
    "settings", [{"n": 3, "sampling": SamplingSettings(temperature=1.0)}, {"sampling": SamplingSettings(0.0)}]
)
def test_a_known_prompt_is_not_computed_again_and_has_the_same_reply(served, alone, settings):
    prompt = tuple(np.random.default_rng(5).integers(3, 97, 53).tolist())
    expected = replies(list(alone.submit(Request(prompt, 12, seed=7, **settings))))
    with served.engine(SIZES) as engine:
        first, again = (list(engine.submit(Request(prompt, 12, seed=7, **settings))) for _ in range(2))
        usage = [event.usage.cached for event in (*first, *again) if isinstance(event, FinishEvent)]
    assert replies(first) == replies(again) == expected
    # The whole prompt for several replies to it, otherwise up to the last whole chunk.
    assert sorted(usage) == ([0, 53, 53, 53, 53, 53] if "n" in settings else [0, 48])


def test_a_reply_is_continued_from_its_own_keys_to_rounding(served, alone):
    prompt = tuple(np.random.default_rng(6).integers(3, 97, 21).tolist())
    with served.engine(SIZES) as engine:
        (reply,) = engine.submit(Request(prompt, 30)).replies()
        following = Request((*prompt, *reply.tokens, 5, 6, 7), 8)
        *tokens, end = engine.submit(following)
    assert end.usage.cached == 48 > len(prompt)
    (expected,) = alone.submit(following).replies()
    assert [event.token for event in tokens] == expected.tokens
    np.testing.assert_allclose([event.logprob for event in tokens], expected.logprobs, atol=1e-4)


def test_a_saved_prefix_is_loaded_and_continued_at_its_end(served, alone, tmp_path):
    config, spec = served.model.config, served.spec(SIZES)
    text = np.random.default_rng(8).integers(3, 97, 53)
    _, cache = prefill(served.model, text[None], KVCache.init(config, served.pattern, 1, 64), chunk_size=32)
    cache.save(tmp_path / "p", served.model, tokens=text[None])
    with served.engine(SIZES) as engine:
        assert not keep_prefix(engine, served.model, spec, tmp_path / "p", text.tolist())
        for question in ((), (5, 6, 7, 8, 9) * 6):
            request = Request((*text.tolist(), *question), 12)
            first, again = (list(engine.submit(request)) for _ in range(2))
            (expected,) = alone.submit(request).replies()
            tokens, cached = first[:-1], [events[-1].usage.cached for events in (first, again)]
            assert cached == [52, 80 if question else 52] and replies(first) == replies(again)
            assert [event.token for event in tokens] == expected.tokens
            np.testing.assert_allclose([event.logprob for event in tokens], expected.logprobs, atol=1e-4)
        full = replace(spec, pattern=HeadPattern.full(config))
        assert "was made with" in keep_prefix(engine, served.model, full, tmp_path / "p", text.tolist())
        assert engine.metrics().prompt_tokens == 53 + 2 * 53 + 2 * 83 + 52


@pytest.mark.mesh
def test_devices_that_share_a_model_serve_as_one(served, alone, text_model):
    model = load_model(text_model, mesh=make_mesh(tensor=2), pattern=served.pattern)
    made = [replace(request, sampling=SamplingSettings()) for request in requests(12, seed=1, most=24)]
    with replace(served, model=model).engine(SIZES) as engine:
        handles = [engine.submit(request) for request in made]
        for request, handle in zip(made, handles, strict=True):
            pairs = zip(handle.replies(), alone.submit(request).replies(), strict=True)
            for reply, expected in pairs:
                assert reply.tokens == expected.tokens
                np.testing.assert_allclose(reply.logprobs, expected.logprobs, atol=1e-4)


def test_a_prompt_that_gives_nan_fails_by_itself_and_its_pages_are_used_again(served, alone):
    wrong = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[90].set(np.nan) if "'embed'" in jax.tree_util.keystr(path) else x, served.model
    )
    right = Request(tuple(range(3, 40)), 20)
    (expected,) = alone.submit(right).replies()
    with replace(served, model=wrong).engine(SIZES) as engine:
        for _ in range(2):
            others = [engine.submit(right), engine.submit(Request((90, *range(3, 60)), 20)), engine.submit(right)]
            assert others[0].replies() == others[2].replies() == [expected]
            (end,) = others[1]
            assert end.reason == "error" and "logits are not finite" in end.error
        assert engine.metrics().pages_free == 24 - 6, "what is not finite is not kept"


def test_replies_are_the_same_after_the_device_has_lost_its_rows(served, alone, monkeypatch):
    made = [request for request in requests(16, seed=3, most=24) if request.n == 1]
    expected = [alone.submit(request).replies() for request in made]
    with served.engine(SIZES) as engine:
        device, failures = engine._device, iter([1])
        do = device.do

        def fail_once(action: Action) -> list[Chosen]:
            if isinstance(action, Fill) and len(engine._scheduler.running) == 3 and next(failures, None):
                for array in jax.tree.leaves(device._rows):
                    array.delete()  # As a program that takes them and then fails does.
                raise RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 1 bytes.")
            return do(action)

        monkeypatch.setattr(device, "do", fail_once)
        ends = [list(handle) for handle in [engine.submit(request) for request in made]]
        assert [events[-1].reason for events in ends].count("error") == 1
        for events, (reply,) in zip(ends, expected, strict=True):
            if events[-1].reason != "error":
                assert [event.token for event in events[:-1]] == reply.tokens
                assert [event.logprob for event in events[:-1]] == reply.logprobs
        assert engine.metrics().preemptions > 0 and engine.is_open


def compiled_temporaries(server: Programs, model: Model, rows: Rows) -> int:
    """Bytes that the largest program takes besides its arguments and results."""
    number, none = np.int32(0), np.full(len(rows.token), -1, np.int32)
    lowered = [
        programs._step.lower(server, model, rows, none < 0, none),
        programs._prefill.lower(server, model, rows, number, np.zeros(server.chunk, np.int32), number),
        programs._first.lower(server, model, rows, number, number),
    ]
    return max(program.compile().memory_analysis().temp_size_in_bytes for program in lowered)


@pytest.mark.full_matrix
@pytest.mark.parametrize("rows", [1, 8])
def test_programs_need_no_more_than_was_planned(fresh_programs, rows):
    shape = {"num_layers": 2, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "max_positions": 8192}
    config = ModelConfig("llama", vocab_size=49152, embed_dim=576, mlp_dim=1536, dtype="float32", eos_ids=(2,), **shape)
    plan, memory = Plan(config, any_pattern(config, 0.5), chunk_size=256), 10**9
    sizes, spec = plan_sizes(plan, memory, rows=rows)
    model, server = Model.random(config).by_output(donate=True), Programs(256, group=GROUP)
    kept = server.rows(model, replace(spec, num_pages=4))
    besides = compiled_temporaries(server, model, kept)
    assert besides <= temporaries(plan, rows, 8192)
    state = nbytes((kept.last, kept.token, kept.sampling, kept.drawn._replace(keys=kept.token)))
    rings = (sizes.snapshots + 1) * (ring_bytes(spec) + 4 * config.embed_dim)
    taken = nbytes(model) + spec.nbytes + rings + state + besides
    assert 0.9 * memory < taken <= memory


def check_memory_under_load(served: Served, count: int) -> int:
    """Arrays that live between the device's actions are within what the programs leave of the memory given.

    Returns the bytes planned for the programs.
    """
    plan = Plan(served.model.config, served.pattern, chunk_size=16)
    memory = plan.total(64) + 500_000
    sizes, spec = plan_sizes(plan, memory, rows=4, page_size=8, max_context=120)
    besides = temporaries(plan, 4, 120)

    def live() -> int:
        return sum(nbytes(array) for array in jax.live_arrays())

    gc.collect()
    others, held = live() - nbytes(served.model), []
    with served.engine(sizes) as engine:
        listen = lambda event: held.append(live() - others)  # noqa: E731
        handles = [engine.submit(request, listen) for request in requests(count, seed=4, most=24)]
        for handle in handles[::9]:
            handle.cancel()
        engine.close()
        metrics = engine.metrics()
    assert metrics.snapshots == sizes.snapshots > 3 and metrics.finished["cancelled"] and len(held) > 5 * count
    assert 0.9 * (memory - besides) < max(held) <= memory - besides
    assert spec.nbytes == sizes.pages * page_bytes(spec) + 4 * ring_bytes(spec)
    return besides


def test_memory_stays_within_what_was_given(served):
    check_memory_under_load(served, 12)


@pytest.mark.full_matrix
def test_memory_stays_within_what_was_given_under_more_load(served, fresh_programs):
    besides = check_memory_under_load(served, 60)
    server = Programs(16, group=GROUP)
    rows = server.rows(served.model, replace(served.spec(SIZES), num_pages=4))
    assert compiled_temporaries(server, served.model, rows) <= besides


def test_half_of_the_heads_streaming_hold_1_8_times_as_many_conversations():
    shape = {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_positions": 8192}
    config = ModelConfig("llama", vocab_size=128256, embed_dim=4096, mlp_dim=14336, dtype="bfloat16", **shape)
    counts = []
    for pattern in (None, any_pattern(config, 0.5)):
        sizes, _ = plan_sizes(Plan(config, pattern, chunk_size=1024), 80 * 10**9)
        # Each has its pages, and a copy of its rings at the end of its last turn.
        counts.append(min(sizes.pages * sizes.page_size // 4096, sizes.snapshots if pattern else 2**31))
    assert counts[1] >= 1.8 * counts[0] > 150


def test_a_server_takes_the_memory_that_was_planned(served):
    plan = Plan(served.model.config, served.pattern, chunk_size=16)
    memory = plan.total(64) + 2_000_000
    sizes, spec = plan_sizes(plan, memory, rows=4, page_size=8, max_context=120)
    assert sizes.row_pages == 15 and sizes.snapshots > 4 and sizes.pages > 4 * 15
    assert spec.nbytes == sizes.pages * page_bytes(spec) + 4 * ring_bytes(spec)
    taken = plan.weights + plan.activations + spec.nbytes + sizes.snapshots * ring_bytes(spec)
    assert 0.8 * memory < taken < memory
    with pytest.raises(ValueError, match=r"serving 4 requests at a time needs at least .*: serve fewer"):
        plan_sizes(plan, plan.weights, rows=4)
