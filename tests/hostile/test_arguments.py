"""Arguments of the public functions: every type of integer is taken; what is impossible is refused in a short message.

Under the checks of annotations some values would be refused before they are seen, so those checks are off.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.aot.tune import Tune
from duo_eval.methods.patterns import Duo, RandomHeads
from hypothesis import given
from hypothesis import strategies as st

import duo_jax
from duo_jax import (
    Categorical,
    Greedy,
    HeadPattern,
    KVCache,
    Model,
    Plan,
    decode_step,
    generate,
    make_mesh,
    prefill,
    stream,
)
from duo_jax.arguments import MOST_SEED, MOST_TOKENS, ArgumentError, real_number, whole_number
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from duo_jax.checkpoint.save import save_model
from duo_jax.text.chat import Chat
from duo_jax.text.document import Document
from duo_jax.text.lm import LM
from tests.shapes import TINY

pytestmark = pytest.mark.usefixtures("annotations_off")
PROMPT = np.arange(3, 9)[None]
STREAMING = HeadPattern.from_gates(np.zeros((2, 2)), sink_size=3, recent_size=8)
GATES = np.ones((2, 2))
HUGE = 99999999999999999999999

# Function, name of an argument, its smallest and its largest value.
INTEGERS: dict[str, tuple[Callable[[Model, Any], Any], str, int, int]] = {
    "generate": (lambda model, n: generate(model, PROMPT, max_new_tokens=n), "max_new_tokens", 1, MOST_TOKENS),
    "chunks of generate": (lambda model, n: generate(model, PROMPT, chunk_size=n), "chunk_size", 1, MOST_TOKENS),
    "chunks of prefill": (
        lambda model, n: prefill(model, PROMPT, KVCache.init(TINY, None, 1, 8), chunk_size=n),
        "chunk_size",
        1,
        MOST_TOKENS,
    ),
    "seed": (lambda model, n: generate(model, PROMPT, sampler=Categorical(), key=n), "key", 0, MOST_SEED),
    "rows": (lambda model, n: KVCache.init(TINY, None, n, 8), "batch_size", 1, MOST_TOKENS),
    "tokens": (lambda model, n: KVCache.init(TINY, None, 1, n), "max_length", 1, MOST_TOKENS),
    "memory": (lambda model, n: KVCache.init(TINY, None, 1, memory=n), "memory", 1, MOST_SEED),
    "bytes": (lambda model, n: KVCache.bytes_for(TINY, None, 1, n), "max_length", 1, MOST_TOKENS),
    "fork": (lambda model, n: KVCache.init(TINY, STREAMING, 1, 8).fork(n), "batch_size", 1, MOST_TOKENS),
    "kv_fraction": (lambda model, n: STREAMING.kv_fraction(n), "context_length", 1, MOST_TOKENS),
    "sinks": (lambda model, n: HeadPattern.from_gates(GATES, sink_size=n, recent_size=8), "sink_size", 0, MOST_TOKENS),
    "window": (
        lambda model, n: HeadPattern.from_gates(GATES, sink_size=0, recent_size=n),
        "recent_size",
        1,
        MOST_TOKENS,
    ),
    "budget": (
        lambda model, n: HeadPattern.from_gates(GATES, sink_size=1, recent_size=1, kv_budget=1, context_length=n),
        "context_length",
        1,
        MOST_TOKENS,
    ),
    "plan's rows": (lambda model, n: Plan(TINY, batch_size=n), "batch_size", 1, MOST_TOKENS),
    "plan's chunk": (lambda model, n: Plan(TINY, chunk_size=n), "chunk_size", 1, MOST_TOKENS),
    "plan's context": (lambda model, n: Plan(TINY).check(n, 10**9), "length", 1, MOST_TOKENS),
    "plan's memory": (lambda model, n: Plan(TINY).max_context(n), "memory", 1, MOST_SEED),
    "mesh": (lambda model, n: make_mesh(tensor=n), "tensor", 1, MOST_TOKENS),
    "top-k": (lambda model, n: duo_jax.TopK(n), "top_k", 1, MOST_TOKENS),
    "room": (lambda model, n: Document(None, "abc", room=n), "room", 2, MOST_TOKENS),
    "document": (lambda model, n: Document(None, "abc", max_length=n), "max_length", 1, MOST_TOKENS),
}


@pytest.mark.parametrize(("call", "name", "least", "most"), INTEGERS.values(), ids=INTEGERS)
def test_an_integer_is_checked_where_it_is_given(tiny, call, name, least, most):
    for wrong in (1.5, 2.0, True, "3", b"3", np.float32(2), np.array([2, 3])):
        with pytest.raises(ValueError, match=f"^{name} must be an integer, got "):
            call(tiny, wrong)
    with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {least - 1}"):
        call(tiny, np.int64(least - 1))
    for wrong in (most + 1, HUGE):
        with pytest.raises(ValueError, match=f"^{name} must be at most {most}, got {wrong}"):
            call(tiny, wrong)


def test_every_type_of_integer_is_taken(tiny):
    for kind in (int, np.int64, np.uint8, np.int32, jnp.int32):
        cache = KVCache.init(TINY, STREAMING, kind(1), kind(8)).fork(kind(2))
        assert (cache.batch_size, cache.max_length) == (2, 8)
        assert whole_number("n", kind(3), 1) == 3 and type(whole_number("n", kind(3), 1)) is int
    options = {"max_new_tokens": np.int64(2), "sampler": Categorical(), "eos_ids": [np.int64(5)]}
    keys = (7, np.int64(7), jnp.int32(7), jax.random.key(7))
    assert len({str(generate(tiny, PROMPT, key=key, **options).tokens) for key in keys}) == 1


# What no machine has memory for.
IMPOSSIBLE: dict[str, tuple[Callable[[Model], Any], str]] = {
    "2**62 new tokens": (lambda model: generate(model, PROMPT, max_new_tokens=2**62), "max_new_tokens must be at most"),
    "positions beyond int32": (
        lambda model: generate(model, PROMPT, pattern=STREAMING, max_new_tokens=2**31 - 6),
        "max_new_tokens must be at most 2147483641",
    ),
    "a cache of petabytes": (lambda model: KVCache.init(TINY, None, 2**20, 2**30), "GB .* does not fit .* are free"),
    "1e9 rows": (
        lambda model: KVCache.init(TINY, STREAMING, 1, 16).fork(10**9),
        "1000000000 rows .* GB: ask for fewer",
    ),
    "a window and sinks": (
        lambda model: HeadPattern.from_gates(GATES, sink_size=1, recent_size=2**31 - 1),
        "sink_size \\+ recent_size must be at most",
    ),
}


@pytest.mark.parametrize(("call", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_memory_holds_is_refused_before_it_is_allocated(tiny, call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(tiny)
    assert len(str(caught.value)) < 300


# Every public function that takes a path.
PATHS: dict[str, Callable[[Model, Any], Any]] = {
    "load_model": lambda model, path: duo_jax.load_model(path),
    "load_tokenizer": lambda model, path: duo_jax.load_tokenizer(path),
    "load": lambda model, path: duo_jax.load(path),
    "save_model": lambda model, path: save_model(model, path),
    "open_config": lambda model, path: open_config(path),
    "weights_fingerprint": lambda model, path: weights_fingerprint(path),
    "HeadPattern.load": lambda model, path: HeadPattern.load(path),
    "HeadPattern.save": lambda model, path: STREAMING.save(path),
    "KVCache.save": lambda model, path: prefill(model, PROMPT, KVCache.init(TINY, None, 1, 8))[1].save(path),
    "KVCache.load": lambda model, path: KVCache.load(path),
}


@pytest.mark.parametrize("call", PATHS.values(), ids=PATHS)
def test_what_is_no_path_is_refused(tiny, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in (5, None, b"x", ["x"], "", "a\0b"):
        with pytest.raises(ValueError, match=r"^\w+ must be (a path|the path|a folder) .*, got "):
            call(tiny, wrong)
    assert not any(tmp_path.iterdir())


# Arguments of another type or shape.
WRONG: dict[str, tuple[Callable[[Model], Any], str]] = {
    "no rows": (lambda model: KVCache.init(TINY, None, None, 8), "batch_size must be an integer, got None"),
    "no text": (lambda model: LM(model, None)(None), "text must be a string or a list of strings, got None"),
    "model": (lambda model: generate("name", PROMPT), "model must be a Model, got 'name'; load_model"),
    "model of prefill": (lambda model: prefill(TINY, PROMPT, None), "model must be a Model"),
    "sampler's name": (lambda model: generate(model, PROMPT, sampler="greedy"), "sampler must be a Sampler"),
    "sampler's class": (lambda model: generate(model, PROMPT, sampler=Greedy), "sampler must be a Sampler"),
    "cache": (lambda model: generate(model, PROMPT, cache=3), "cache must be a KVCache"),
    "pattern's name": (lambda model: generate(model, PROMPT, pattern="name"), "pattern must be .*HeadPattern.load"),
    "config": (lambda model: KVCache.init(model, None, 1, 8), r"config must be a ModelConfig.*model\.config"),
    "mesh": (lambda model: KVCache.init(TINY, None, 1, 8, mesh="tensor=2"), "mesh must be .*make_mesh, got 'tensor=2'"),
    "mesh of a model": (lambda model: duo_jax.load_model("tests/golden/llama", mesh="text"), "mesh must be a mesh"),
    "pattern's source": (lambda model: HeadPattern.load(5), "pattern must be a folder or a published name"),
    "mark": (lambda model: KVCache.init(TINY, None, 1, 8).rewind(3), "mark must be a Mark"),
    "two keys": (
        lambda model: generate(model, PROMPT, sampler=Categorical(), key=jax.random.split(jax.random.key(0))),
        "key must be one jax.random key",
    ),
    "EOS text": (lambda model: generate(model, PROMPT, eos_ids="ab"), "eos_ids must be a tuple of token ids"),
    "EOS of text": (lambda model: generate(model, PROMPT, eos_ids=("a",)), "eos_ids must be an integer, got 'a'"),
    "EOS of floats": (lambda model: generate(model, PROMPT, eos_ids=(1.0,)), "eos_ids must be an integer, got 1.0"),
    "history of other rows": (
        lambda model: generate(model, PROMPT, history=np.ones((2, 3), int)),
        r"history must be \[batch, n\] with 1 rows, got \(2, 3\)",
    ),
    "history of one row": (lambda model: generate(model, PROMPT, history=[1, 2]), r"history must be \[batch, n\]"),
    "history of text": (lambda model: generate(model, PROMPT, history=[["a"]]), "history must be integers"),
    "history outside": (lambda model: generate(model, PROMPT, history=[[61]]), r"\[0, 61\), got 61"),
    "complex gates": (
        lambda model: HeadPattern.from_gates(GATES * 1j, sink_size=1, recent_size=1),
        "table .* of real numbers, got complex128",
    ),
    "sparsity of text": (
        lambda model: HeadPattern.from_gates(GATES, sink_size=1, recent_size=1, sparsity="half"),
        "sparsity must be a number, got 'half'",
    ),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_another_type_or_shape_is_refused_by_name(tiny, call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(tiny)
    assert len(str(caught.value)) < 200


def test_a_saved_cache_has_the_tokens_of_its_rows(tiny, tmp_path):
    _, cache = prefill(tiny, PROMPT, KVCache.init(TINY, None, 1, 16))
    for wrong, words in ((["text"], "integers"), (PROMPT[0], r"\[batch, n\]"), (PROMPT[:, :3], r"6 of each row")):
        with pytest.raises(ValueError, match=f"tokens must be .*{words}"):
            cache.save(tmp_path / "c", tokens=wrong)
    cache.save(tmp_path / "c", tiny, tokens=PROMPT)
    for wrong in (0, 1.5, 2**31):
        with pytest.raises(ValueError, match=f"max_length must be .*got {wrong}"):
            KVCache.load(tmp_path / "c", tiny, max_length=wrong)
    assert KVCache.load(tmp_path / "c", tiny, dtype=np.float32, max_length=np.int64(9)).max_length == 9


@pytest.mark.parametrize("pattern", [None, STREAMING], ids=["full", "streaming"])
def test_a_mark_of_a_longer_cache_is_refused(tiny, pattern):
    _, cache = prefill(tiny, PROMPT, KVCache.init(TINY, pattern, 1, 16))
    with pytest.raises(ValueError, match="no longer in the cache, or were in another one"):
        KVCache.init(TINY, pattern, 1, 4).rewind(cache.mark())


def test_a_stream_whose_cache_was_taken_says_so(tiny):
    steps = stream(tiny, PROMPT, max_new_tokens=4)
    next(steps)
    decode_step(tiny, [3], steps.cache)
    with pytest.raises(ValueError, match="given to a step function before"):
        next(steps)


def test_a_mark_of_another_data_type_is_refused():
    mark = KVCache.init(TINY, STREAMING, 1, 8, dtype="float32").mark()
    with pytest.raises(ValueError, match="this mark is of another cache"):
        KVCache.init(TINY, STREAMING, 1, 8, dtype="bfloat16").rewind(mark)


def test_a_name_that_load_does_not_take_is_refused_with_the_nearest():
    with pytest.raises(
        TypeError, match=r"load\(\) got an unexpected keyword argument 'patern': did you mean 'pattern'"
    ):
        duo_jax.load("no-such-model", patern="name")
    with pytest.raises(ValueError, match="pass pattern="):
        duo_jax.load("no-such-model", sparsity=0.5)


def test_a_chat_names_its_arguments(chat_model):
    lm = duo_jax.load(chat_model, progress=False)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Chat(lm, max_length=0)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer"):
        Chat(lm, max_length=64).say("Hi", max_new_tokens=1.5)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        lm("Hi", seed=-1)


# Data types.
TYPES = {
    "float32": ("float32", jnp.float32, np.float32, np.dtype("float32"), jnp.dtype("float32")),
    "bfloat16": ("bfloat16", jnp.bfloat16, np.dtype("bfloat16"), jnp.dtype("bfloat16")),
    "float16": ("float16", jnp.float16, np.float16, np.dtype("float16")),
    "int8": ("int8", jnp.int8, np.int8, np.dtype("int8")),
    "int4": ("int4", jnp.int4, jnp.dtype("int4")),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_data_type_is_a_name_or_an_object_everywhere(name):
    for dtype in TYPES[name]:
        cache = KVCache.init(TINY, STREAMING, 1, 8, dtype=dtype, streaming_dtype=dtype)
        assert {cache.dtype.name, cache.streaming_dtype.name} <= {name, f"u{name}"}
        plan = Plan(TINY, kv_dtype=dtype, streaming_dtype=dtype)
        assert (plan.kv_dtype, plan.streaming_dtype) == (name, name)
        if name.startswith("int"):
            config = TINY.with_dtypes(weight_dtype=dtype) if name == "int8" else TINY
            assert config.weight_dtype in (name, None)
        else:
            assert TINY.with_dtypes(dtype=dtype).dtype == name
            assert Model.random(TINY, dtype=dtype).config.dtype == name


def test_load_takes_data_types_of_jax(text_model):
    lm = duo_jax.load(text_model, dtype=jnp.bfloat16, kv_dtype=np.dtype("float32"), progress=False)
    assert lm.model.config.dtype == "bfloat16" and lm.make_cache(8).dtype == jnp.float32
    assert isinstance(lm, LM)


@pytest.mark.parametrize(
    "wrong", [3, jnp.ones(3), b"x", int, object, list, "float", np.float64, np.dtype("M8")], ids=str
)
def test_what_is_no_data_type_is_refused_by_a_short_message(wrong):
    for call, name in (
        (lambda: KVCache.init(TINY, None, 1, 8, dtype=wrong), "dtype"),
        (lambda: KVCache.init(TINY, None, 1, 8, streaming_dtype=wrong), "streaming_dtype"),
        (lambda: TINY.with_dtypes(dtype=wrong), "dtype"),
        (lambda: Plan(TINY, kv_dtype=wrong), "kv_dtype"),
        (lambda: duo_jax.load("no-such-model", kv_dtype=wrong), "kv_dtype"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be one of ") as caught:
            call()
        assert len(str(caught.value)) < 200


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers())))
def test_a_value_is_taken_or_refused_in_a_short_message(value):
    for check in (lambda: whole_number("n", value, 1, 9), lambda: real_number("n", value, 1, 9)):
        try:
            assert 1 <= check() <= 9
        except ArgumentError as error:
            assert str(error).startswith("n must be ") and len(str(error)) < 200


def test_a_number_that_python_does_not_print_is_refused():
    with pytest.raises(ArgumentError, match="got a number of thousands of digits"):
        whole_number("n", 10**5000, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tune(tokens=0).run(), "tokens must be at least 1, got 0"),
        (lambda: Tune(head_dims=(64, 0)).run(), "head_dims must be at least 1, got 0"),
        (lambda: Duo("x", sparsity=math.nan), r"duo:sparsity must be in \[0, 1\], got nan"),
        (lambda: Duo("x", sparsity=1.5), r"duo:sparsity must be in \[0, 1\], got 1.5"),
        (lambda: RandomHeads(seed=-1), "random-heads=SEED must be at least 0, got -1"),
    ],
)
def test_settings_of_an_evaluation_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
