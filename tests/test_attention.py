"""Every attention backend against `reference`, and `reference` against the mask written out in numpy, in float64."""

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.aot.kernels import program
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import Heads, Pools, Unsupported, cudnn, ops, tiles, xla
from pallas_kernels.gpus import find_gpu
from pallas_kernels.quantized import BITS, Quantized, Stored, empty
from pallas_kernels.segments import segments_of
from pallas_kernels.tiles import DecodeTiles, FlashTiles, trying
from pallas_kernels.window import Window
from tests.shapes import ON_CPU, on_each_backend
from tests.stored import hadamard, read, store

SMALL_BLOCKS = {"Q_BLOCK": 4, "K_BLOCK": 8, "STREAMING_Q_BLOCK": 3}
SMALL_TILES = {
    "flash": FlashTiles(block_q=4, block_k=8, num_warps=4, num_stages=2),
    # Few programs for the longest rows, so that both ways of splitting occur.
    "decode": DecodeTiles(block_k=8, min_split=16, max_programs=18, num_warps=4, num_stages=2),
    "short": DecodeTiles(block_k=8, min_split=16, max_programs=8, num_warps=4, num_stages=2),
}
# Of values around 1: sums are in float32, weights and output are rounded to the type of the queries.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
CALLS = {"prefill": pallas_kernels.prefill_attention, "decode": pallas_kernels.decode_attention}
# Mosaic takes larger shapes than these: tests/test_mosaic.py.
backends = pytest.mark.parametrize("backend", ON_CPU)
FULL_MATRIX = pytest.mark.full_matrix


class Case(NamedTuple):
    """One problem: a batch, rows of different lengths, one layer's heads among the slots of a larger model."""

    is_retrieval: tuple[bool, ...]
    group: int = 2
    head_dim: int = 16
    tokens: int = 13
    capacity: int = 61
    starts: tuple[int, ...] = (0, 5, 41)
    lengths: tuple[int, ...] = (13, 1, 7)
    sink_size: int = 3
    recent_size: int = 8
    dtype: str = "float32"
    pool_dtype: str | None = None
    ring_dtype: str | None = None
    blocks: str = "small"


MIXED = (True, False, True)
CASES = {
    "gqa_1_head_dim_64": Case(MIXED, group=1, head_dim=64),
    "gqa_2_one_row": Case(MIXED, starts=(20,), lengths=(9,)),
    "gqa_3_head_dim_80_no_sinks": Case(MIXED, group=3, head_dim=80, sink_size=0),
    "gqa_4_head_dim_96_bfloat16": Case(MIXED, group=4, head_dim=96, dtype="bfloat16"),
    "gqa_5_streaming_only_after_many_wraps": Case((False, False), group=5, starts=(48, 37, 26), recent_size=5),
    "gqa_6_retrieval_only": Case((True, True), group=6),
    "gqa_7_bfloat16_window_of_one": Case((False, True), group=7, dtype="bfloat16", recent_size=1),
    "gqa_8_head_dim_128": Case((False, True), group=8, head_dim=128),
    "head_dim_256": Case((False, True), group=1, head_dim=256),
    "head_dim_256_bfloat16": Case((False, True), group=1, head_dim=256, dtype="bfloat16"),
    "bfloat16_cache_of_a_float32_model": Case(MIXED, pool_dtype="bfloat16"),
    "bfloat16_cache_with_float32_rings": Case(MIXED, pool_dtype="bfloat16", ring_dtype="float32"),
    "int8_cache": Case(MIXED, pool_dtype="int8"),
    "int4_cache_head_dim_64_bfloat16": Case(MIXED, head_dim=64, dtype="bfloat16", pool_dtype="int4"),
    "int4_cache_int8_rings": Case(MIXED, group=1, pool_dtype="int4", ring_dtype="int8"),
    "int8_cache_head_dim_256": Case((True, True), group=1, head_dim=256, pool_dtype="int8"),
    # 140 queries of a KV head are two tiles, which read the packed keys.
    "int4_cache_short_chunk": Case(
        MIXED, group=4, head_dim=32, dtype="bfloat16", pool_dtype="int4", ring_dtype="int8", tokens=35, blocks="packed"
    ),
    "int8_cache_short_chunk_bfloat16": Case(MIXED, dtype="bfloat16", pool_dtype="int8", blocks="packed"),
    "int4_rings": Case((False, False), ring_dtype="int4"),
    "one_token": Case(MIXED, tokens=1, lengths=(1, 1, 1), starts=(0, 1, 60)),
    "fewer_tokens_than_sinks": Case(MIXED, tokens=4, lengths=(4, 2, 3), starts=(0, 1, 2), sink_size=7),
    "chunk_longer_than_the_ring_and_an_empty_row": Case(MIXED, tokens=29, lengths=(29, 0, 3), starts=(0, 9, 32)),
    "filled_to_capacity": Case(MIXED, tokens=61, lengths=(61, 30, 5), starts=(0, 31, 56)),
    "a_band_wider_than_a_block": Case(
        (False, True), tokens=70, capacity=120, lengths=(70, 66, 9), starts=(0, 7, 41), recent_size=29
    ),
    "default_blocks": Case((True, False), tokens=700, capacity=1500, starts=(800, 0), lengths=(700, 130), blocks=""),
}
# Head dims and groups of other kinds of heads are in the full matrix.
TRITON = CASES.keys() - {
    "gqa_3_head_dim_80_no_sinks",
    "gqa_4_head_dim_96_bfloat16",
    "gqa_5_streaming_only_after_many_wraps",
    "gqa_6_retrieval_only",
    "head_dim_256",
    "head_dim_256_bfloat16",
    "bfloat16_cache_with_float32_rings",
    "int8_cache_head_dim_256",
    "int8_cache_short_chunk_bfloat16",
    "int4_rings",
}
each_case = pytest.mark.parametrize(("backend", "case"), on_each_backend(CASES, TRITON))


@functools.cache
def jitted(operation: str, backend: str | None, blocks: str) -> Callable[..., jax.Array]:
    """One operation compiled with small or default blocks, which are read while it is traced.

    With small ones, quantized pools have several segments in prefill; "packed": the chunk is short, and there are none.
    """

    def traced(*args, **sizes):
        with pytest.MonkeyPatch.context() as patch:
            if blocks:
                for name, size in SMALL_BLOCKS.items():
                    patch.setattr(xla, name, size)
                patch.setattr(tiles, "_default", lambda kernel, *_: SMALL_TILES[kernel])
            # Of 61 tokens in a slot, the first segment has 13.
            with segments_of(None if blocks == "packed" else 16):
                return CALLS[operation](*args, **sizes, backend=backend)

    return jax.jit(traced, static_argnames="window")


class Problem:
    """Random keys and values of whole rows, pools filled from them token by token, and the expected output.

    Everything that is no token is `garbage`: the rest of a slot, other slots, the padding of a chunk.
    """

    def __init__(self, case: Case, *, garbage: float = np.nan, seed: int = 0):
        self.case, self.garbage = case, garbage
        rng = np.random.default_rng(seed)
        self.starts, self.lengths = np.array(case.starts, np.int32), np.array(case.lengths, np.int32)
        batch, num_kv_heads = len(case.starts), len(case.is_retrieval)
        total = max(case.starts) + case.tokens
        self.window = Window(case.sink_size, case.recent_size)
        ring_dtype = case.ring_dtype or (case.dtype if case.pool_dtype in BITS else case.pool_dtype)
        self.like = {
            is_retrieval: [empty((1, case.head_dim), dtype or case.dtype, values=values) for values in (False, True)]
            for is_retrieval, dtype in ((True, case.pool_dtype), (False, ring_dtype))
        }
        normal = functools.partial(rng.normal, size=(batch, total, num_kv_heads, case.head_dim))
        q = rng.normal(size=(batch, total, num_kv_heads * case.group, case.head_dim))
        self.q, self.k, self.v = (x.astype(jnp.dtype(case.dtype)) for x in (q, normal(), normal()))
        # Pools round keys and values to their type, the chunk's own included.
        self.kept = {
            kind: [self.kept_as(x, like) for x, like in zip((self.k, self.v), self.like[kind], strict=True)]
            for kind in (True, False)
        }
        # This layer's slots lie among those of other layers, in no order.
        self.is_retrieval, self.slot = np.array(case.is_retrieval), np.zeros(num_kv_heads, np.int32)
        ring = case.sink_size + case.recent_size
        self.pools = []
        for kind, size in ((True, case.capacity), (False, ring)):
            here = np.flatnonzero(self.is_retrieval == kind)
            count = len(here) + 2 if len(here) else 0
            self.slot[here] = rng.permutation(count)[: len(here)]
            shape = (count, batch, size, case.head_dim)
            self.pools += [(rng.normal(size=shape) * garbage).astype(jnp.dtype(case.dtype)) for _ in "kv"]

    def kept_as(self, x: np.ndarray, like: Stored) -> np.ndarray:
        kept = read(store(jnp.asarray(x), like), jnp.dtype(self.case.dtype))
        return np.asarray(hadamard(kept) if isinstance(like, Quantized) else kept)

    def fill(self, counts: np.ndarray) -> tuple[Pools, Heads]:
        """The pools once `counts[b]` tokens are in, each token put where a plain loop says."""
        pools = [pool.copy() for pool in self.pools]
        sink, recent = self.case.sink_size, self.case.recent_size
        for head, retrieves in enumerate(self.is_retrieval):
            pool_k, pool_v = pools[:2] if retrieves else pools[2:]
            for row, count in enumerate(counts):
                for p in range(count):
                    index = p if retrieves or p < sink else sink + (p - sink) % recent
                    pool_k[self.slot[head], row, index] = self.k[row, p, head]
                    pool_v[self.slot[head], row, index] = self.v[row, p, head]
        stored = (store(jnp.asarray(pool), self.like[i < 2][i % 2]) for i, pool in enumerate(pools))
        return Pools(*stored), Heads(jnp.asarray(self.is_retrieval), jnp.asarray(self.slot))

    def expected(self, row: int, position: int) -> np.ndarray:
        """Output `[N, H]` of one token: a softmax over the keys that each head may see, in float64."""
        sink, recent = self.case.sink_size, self.case.recent_size
        out = []
        for head in range(self.q.shape[2]):
            kv_head = head // self.case.group
            every, window = range(position + 1), range(max(0, position + 1 - recent), position + 1)
            keys = every if self.is_retrieval[kv_head] else sorted({*range(min(sink, position + 1)), *window})
            kept = self.kept[bool(self.is_retrieval[kv_head])]
            k, v = (x[row, list(keys), kv_head].astype(np.float64) for x in kept)
            scores = k @ self.q[row, position, head].astype(np.float64) / np.sqrt(self.case.head_dim)
            weights = np.exp(scores - scores.max())
            out.append(weights @ v / weights.sum())
        return np.stack(out)

    def prefill(self, backend: str | None, pools: Pools | None = None) -> np.ndarray:
        own = self.starts[:, None] + np.arange(self.case.tokens)
        q, k, v = (np.stack([x[b, own[b]] for b in range(len(own))]) for x in (self.q, self.k, self.v))
        for row, length in enumerate(self.lengths):
            k[row, length:] = v[row, length:] = self.garbage
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        filled, heads = self.fill(self.starts)
        traced = {"start": jnp.asarray(self.starts), "lengths": jnp.asarray(self.lengths)}
        run = jitted("prefill", backend, self.case.blocks)
        return np.asarray(run(q, k, v, pools or filled, heads, **traced, window=self.window)).astype(np.float64)

    def decode(self, backend: str | None, counts: np.ndarray, pools: Pools | None = None) -> np.ndarray:
        filled, heads = self.fill(counts)
        q = jnp.asarray(self.q[np.arange(len(counts)), np.maximum(counts - 1, 0)])
        run = jitted("decode", backend, self.case.blocks)
        return np.asarray(
            run(q, pools or filled, heads, lengths=jnp.asarray(counts.astype(np.int32)), window=self.window)
        ).astype(np.float64)


def check_prefill(problem: Problem, backend: str, *, every: int = 1) -> None:
    out = problem.prefill(backend)
    assert np.isfinite(out).all()  # Padding too.
    for row, (start, length) in enumerate(zip(problem.starts, problem.lengths, strict=True)):
        for t in range(0, length, every):
            expected = problem.expected(row, start + t)
            np.testing.assert_allclose(out[row, t], expected, rtol=0, atol=TOLERANCE[problem.case.dtype])


def check_decode(problem: Problem, backend: str, counts: np.ndarray) -> None:
    out = problem.decode(backend, counts)
    assert np.isfinite(out).all()
    for row in np.flatnonzero(counts):
        expected = problem.expected(row, counts[row] - 1)
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=TOLERANCE[problem.case.dtype])


@each_case
def test_prefill_equals_the_mask_written_out(case, backend):
    check_prefill(Problem(case), backend, every=23 if case.tokens > 100 else 1)


@each_case
def test_decode_equals_the_mask_written_out(case, backend):
    problem = Problem(case)
    check_decode(problem, backend, problem.starts + problem.lengths)


@backends
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_start_and_length_in_one_program(backend, data):
    """The whole range of lengths of one shape; rows of a batch differ."""
    starts = data.draw(st.lists(st.integers(0, 48), min_size=3, max_size=3))
    lengths = data.draw(st.lists(st.integers(0, 13), min_size=3, max_size=3))
    shape = Case(MIXED, starts=(48, 48, 48))
    check_prefill(Problem(shape._replace(starts=tuple(starts), lengths=tuple(lengths))), backend)
    check_decode(Problem(shape), backend, np.array(starts) + np.array(lengths))


@backends
def test_heads_are_data(backend):
    """Any table with these slots runs in the same program, whatever the types of the heads."""
    run = jitted("decode", backend, "small")
    heads = [(True, False, False), (False, True, False), (False, False, True)]
    problems = [Problem(Case(is_retrieval, head_dim=8)) for is_retrieval in heads]
    counts = problems[0].starts + problems[0].lengths
    # Twice: what the first trace imports adds settings to jax, and so a program.
    for _ in range(2):
        check_decode(problems[0], backend, counts)
    before = run._cache_size()
    for problem in problems[1:]:
        check_decode(problem, backend, counts)
    assert run._cache_size() == before


@backends
@pytest.mark.parametrize("name", ["gqa_2_one_row", "fewer_tokens_than_sinks", "int4_cache_int8_rings"])
def test_infinity_where_no_token_is_stored_changes_nothing(name, backend):
    """NaN does not either, in every other test of this file."""
    problem = Problem(CASES[name], garbage=np.inf)
    check_prefill(problem, backend)
    check_decode(problem, backend, problem.starts + problem.lengths)


@pytest.mark.parametrize("backend", ["triton", "xla"])
def test_a_row_of_a_batch_has_the_bits_that_it_has_among_any_others(backend):
    """Decode: the parts of a row's keys do not depend on the other rows."""
    problem = Problem(Case(MIXED))
    found = [problem.decode(backend, np.array(counts))[1] for counts in ((54, 44, 3), (0, 44, 54), (17, 44, 44))]
    assert len({out.tobytes() for out in found}) == 1 and np.isfinite(found).all()


@pytest.mark.parametrize("operation", CALLS)
def test_blocks_beyond_the_filled_ones_are_never_read(operation, monkeypatch):
    loads = []
    load = xla.Slot.load

    def counted(slot: xla.Slot, *args):
        jax.debug.callback(lambda: loads.append(slot.size))
        return load(slot, *args)

    monkeypatch.setattr(xla.Slot, "load", counted)
    jitted.cache_clear()
    problem = Problem(Case((True, False), starts=(0, 5, 12), lengths=(1, 1, 1), tokens=1, recent_size=40, sink_size=8))
    problem.prefill("xla") if operation == "prefill" else problem.decode("xla", problem.starts + 1)
    jax.effects_barrier()
    jitted.cache_clear()
    # The longest row fills two blocks of 8 keys, of 61 and of 48; in prefill, a ring is read at once. In decode, each
    # row has its own blocks.
    assert [loads.count(size) for size in (61, 48)] == ([2, 1] if operation == "prefill" else [4, 4])


@pytest.mark.parametrize("operation", CALLS)
def test_one_kv_head_costs_the_work_of_its_own_type_only(operation):
    """What a loop over one head computes does not depend on its step, and XLA may move it to where it always runs."""
    case = Case((True,), tokens=8)
    problem = Problem(case)
    pools = Pools(*(jnp.zeros((2, 3, size, case.head_dim)) for size in (4096, 4096, 24, 24)))
    q, k, v = (jnp.asarray(x[:, :8]) for x in (problem.q, problem.k, problem.v))
    start, heads = jnp.asarray(problem.starts), Heads(jnp.ones(1, bool), jnp.zeros(1, jnp.int32))
    arguments = (q, k, v, pools, heads) if operation == "prefill" else (q[:, 0], pools, heads)
    lengths = {"start": start, "lengths": start} if operation == "prefill" else {"lengths": start}
    run = jax.jit(functools.partial(CALLS[operation], window=Window(8, 16), backend="xla"))
    text = run.lower(*arguments, **lengths).compile().as_text()
    assert " while(" not in text[text.index("\nENTRY") :]


@pytest.mark.parametrize("name", ["gqa_2_one_row", "int8_cache", "default_blocks"])
def test_rows_are_read_together_where_steps_of_a_loop_are_slow(name, monkeypatch):
    """Decode as it is compiled for a GPU, in which all rows take the steps of the longest one."""
    problem = Problem(CASES[name])
    jitted.cache_clear()
    monkeypatch.setattr(xla, "device_kind", lambda: "NVIDIA H200")
    check_decode(problem, "xla", problem.starts + problem.lengths)
    jitted.cache_clear()


class Shapes(NamedTuple):
    """Arguments without values, for programs that are compiled and not run."""

    tokens: int = 2048
    capacity: int = 4096
    num_retrieval: int = 1
    num_streaming: int = 1

    def lower(self, operation: str) -> jax.stages.Compiled:
        heads, head_dim, kv_heads = 4, 16, 2
        f32, i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        retrieval = f32((self.num_retrieval, 1, self.capacity, head_dim))
        streaming = f32((self.num_streaming, 1, 128, head_dim))
        pools = Pools(retrieval, retrieval, streaming, streaming)
        table = Heads(jax.ShapeDtypeStruct((kv_heads,), bool), jax.ShapeDtypeStruct((kv_heads,), jnp.int32))
        sizes = {"lengths": i32, "window": Window(64, 64)}
        if operation == "decode":
            return jitted("decode", "xla", "").lower(f32((1, heads, head_dim)), pools, table, **sizes).compile()
        own = f32((1, self.tokens, kv_heads, head_dim))
        q = f32((1, self.tokens, heads, head_dim))
        return jitted("prefill", "xla", "").lower(q, own, own, pools, table, start=i32, **sizes).compile()


def temporary_bytes(program: jax.stages.Compiled) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize("heads", [(1, 0), (0, 1), (1, 1)], ids=["retrieval", "streaming", "mixed"])
def test_prefill_memory_is_linear_in_the_chunk(heads):
    once, twice = (Shapes(tokens, 4096, *heads).lower("prefill") for tokens in (2048, 4096))
    assert temporary_bytes(twice) <= 2.1 * temporary_bytes(once)
    largest = max(
        np.prod([int(n) for n in found.split(",")]) for found in re.findall(r"f32\[([\d,]+)\]", twice.as_text())
    )
    assert largest < 4096 * 4096


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize("operation", CALLS)
def test_memory_does_not_depend_on_the_capacity(operation):
    short, long = (Shapes(capacity=capacity).lower(operation) for capacity in (2048, 65536))
    assert temporary_bytes(short) == temporary_bytes(long)


@settings(max_examples=15, deadline=None)
@given(sink_size=st.integers(0, 6), recent_size=st.integers(1, 9), length=st.integers(0, 60))
def test_a_ring_holds_the_sinks_and_the_newest_tokens(sink_size, recent_size, length):
    window = Window(sink_size, recent_size)
    ring = [-1] * (sink_size + recent_size)
    for position in range(length):
        index = position if position < sink_size else sink_size + (position - sink_size) % recent_size
        ring[index] = position
    # One program for each window, not for each operation.
    of_length = jax.jit(lambda length: (window.index(jnp.arange(60)), window.positions(length)))
    index, found = of_length(np.array([length], np.int32))
    assert all(index[position] == at for at, position in enumerate(ring) if position >= 0)
    assert found.tolist() == [ring]
    newest = range(max(0, length - recent_size), length)
    assert sorted(p for p in ring if p >= 0) == sorted({*range(min(sink_size, length)), *newest})


def test_visible_is_the_mask_of_the_method():
    q = jnp.arange(7)[:, None]
    seen = Window(1, 2).visible(q, jnp.arange(7)[None, :])
    assert seen.astype(jnp.int32).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1],
    ]


def arguments(operation: str, **changed: object) -> Callable[[], jax.Array]:
    """A valid call, except for the changed arguments."""
    pool, ring = jnp.zeros((1, 2, 16, 8)), jnp.zeros((1, 2, 5, 8))
    given = {
        "q": jnp.zeros((2, 3, 4, 8) if operation == "prefill" else (2, 4, 8)),
        "pools": Pools(pool, pool, ring, ring),
        "heads": Heads(jnp.array([True, False]), jnp.zeros(2, jnp.int32)),
        "lengths": jnp.ones(2, jnp.int32),
        "window": Window(2, 3),
    }
    if operation == "prefill":
        given |= {"k": jnp.zeros((2, 3, 2, 8)), "v": jnp.zeros((2, 3, 2, 8)), "start": jnp.zeros(2, jnp.int32)}
    return functools.partial(CALLS[operation], **(given | changed))


@pytest.mark.parametrize("operation", CALLS)
def test_arguments_that_do_not_fit_raise(operation):
    arguments(operation)()  # Valid, so that each change below is the only fault.
    with pytest.raises(ValueError, match=r"unknown attention backend 'cuda'; there are .*reference.*xla"):
        arguments(operation, backend="cuda")()
    three = Heads(jnp.ones(3, bool), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"multiple of KV heads.*num_heads=4 and num_kv_heads=3"):
        arguments(operation, heads=three)()
    with pytest.raises(ValueError, match=r"a ring must have window.size entries"):
        arguments(operation, window=Window(2, 4))()
    for shape in ((1, 3, 16, 8), (1, 2, 16, 4)):
        pool, ring = jnp.zeros(shape), jnp.zeros((1, shape[1], 5, shape[3]))
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            arguments(operation, pools=Pools(pool, pool, ring, ring))()


@pytest.mark.parametrize("changed", [{"k": (2, 2, 2, 8)}, {"k": (2, 3, 1, 8)}, {"v": (2, 3, 2, 4)}])
def test_a_chunk_of_another_shape_raises(changed):
    # The annotations refuse some of these first, where they are executed; without them the check does.
    prefill = getattr(ops.prefill_part, "__wrapped__", ops.prefill_part)
    call = arguments("prefill", **{name: jnp.zeros(shape) for name, shape in changed.items()})
    with pytest.raises(ValueError, match=r"k and v must be \[B, T, K, H\]"):
        prefill(**call.keywords)


class Paged(NamedTuple):
    """The pages of a problem's retrieval heads, in any order among unused ones."""

    page: int
    seed: int

    def of(self, pools: Pools) -> Pools:
        """Pools with the contents of `pools`, whose retrieval heads have their tokens in pages."""
        slots, batch, capacity, _ = pools.full_k.shape
        count = -(-capacity // self.page)
        rng = np.random.default_rng(self.seed)
        pages = rng.permutation(batch * count + 3)[: batch * count].reshape(batch, count).astype(np.int32)

        def paged(x: jax.Array) -> jax.Array:
            padded = np.pad(
                np.asarray(x), ((0, 0), (0, 0), (0, count * self.page - capacity)) + ((0, 0),) * (x.ndim - 3)
            )
            unused = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
            out = np.full((slots, batch * count + 3, self.page, *x.shape[3:]), unused, x.dtype)
            out[:, pages.ravel()] = padded.reshape(slots, batch * count, self.page, *x.shape[3:])
            return jnp.asarray(out)

        full = [jax.tree.map(paged, pool) for pool in pools.full]
        return Pools(*full, *pools.ring, pages=jnp.asarray(pages))


@pytest.mark.parametrize("backend", ["reference", "xla"])
@settings(max_examples=12, deadline=None)
@given(page=st.sampled_from([4, 8, 24]), seed=st.integers(0, 99), data=st.data())
def test_pages_in_any_order_equal_contiguous_pools(backend, page, seed, data):
    """Pages smaller and larger than a block of keys; a last page partly used; any order, unused pages between."""
    starts = data.draw(st.lists(st.integers(0, 48), min_size=3, max_size=3))
    assert_pages_change_nothing(backend, page, seed, starts)


@pytest.mark.parametrize(("page", "starts"), [(8, (0, 8, 48)), pytest.param(24, (5, 47, 24), marks=FULL_MATRIX)])
def test_kernels_look_up_a_page_for_each_tile(page, starts):
    assert_pages_change_nothing("triton", page, 0, starts)


def assert_pages_change_nothing(backend, page, seed, starts):
    problem = Problem(Case(MIXED, starts=(48, 48, 48))._replace(starts=tuple(starts)))
    filled, _ = problem.fill(problem.starts)
    pools = Paged(page, seed).of(filled)
    np.testing.assert_allclose(problem.prefill(backend, pools), problem.prefill(backend), rtol=0, atol=2e-6)
    counts = problem.starts + problem.lengths
    filled, _ = problem.fill(counts)
    decoded = problem.decode(backend, counts, Paged(page, seed).of(filled))
    np.testing.assert_allclose(decoded, problem.decode(backend, counts), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("triton", marks=FULL_MATRIX)])
def test_quantized_pages_equal_contiguous_pools(backend):
    problem = Problem(CASES["int4_cache_int8_rings"])
    counts = problem.starts + problem.lengths
    filled, _ = problem.fill(counts)
    decoded = problem.decode(backend, counts, Paged(16, 0).of(filled))
    np.testing.assert_allclose(decoded, problem.decode(backend, counts), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [pytest.param("gqa_2_one_row", marks=FULL_MATRIX), "int8_cache_short_chunk_bfloat16"])
def test_tiles_are_halved_until_they_divide_a_page(name):
    """Tiles of 32 keys, pages of 48: a tile has 16."""
    problem = Problem(CASES[name])
    filled, _ = problem.fill(problem.starts)
    counts = problem.starts + problem.lengths
    later, _ = problem.fill(counts)
    with trying("flash", FlashTiles(4, 32, 4, 2)), ExitStack() as decodes:
        for kernel in ("decode", "short"):
            decodes.enter_context(trying(kernel, DecodeTiles(32, 32, 8, 4, 2)))
        chunk = problem.prefill("triton", Paged(48, 0).of(filled))
        decoded = problem.decode("triton", counts, Paged(48, 0).of(later))
    bound = {"rtol": 0, "atol": TOLERANCE[problem.case.dtype]}
    np.testing.assert_allclose(chunk, problem.prefill("triton"), **bound)
    np.testing.assert_allclose(decoded, problem.decode("triton", counts), **bound)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("triton", "takes pages that are a multiple of 8 tokens, got 4"),
        ("jax_triton", "takes pages that are a multiple of 8 tokens, got 4"),
    ],
)
def test_kernels_refuse_pages(backend, reason):
    problem = Problem(CASES["gqa_2_one_row"])
    filled, _ = problem.fill(problem.starts + 1)
    with pytest.raises(Unsupported, match=f"the {backend} backend {reason}: use backend="):
        problem.decode(backend, problem.starts + 1, Paged(4, 0).of(filled))


def test_a_page_table_of_other_rows_raises():
    with pytest.raises(ValueError, match="the page table must have a row for each of 2 rows"):
        pools = arguments("decode").keywords["pools"]
        arguments("decode", pools=pools._replace(pages=jnp.zeros((3, 4), jnp.int32)))()


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_log_sums_equal_those_of_the_reference(backend):
    """Parts over different keys merge by them."""
    problem = Problem(Case(MIXED, starts=(20, 5, 41), lengths=(9, 1, 7)))
    own = problem.starts[:, None] + np.arange(problem.case.tokens)
    q, k, v = (jnp.asarray(np.stack([x[b, own[b]] for b in range(3)])) for x in (problem.q, problem.k, problem.v))
    counts = {"start": jnp.asarray(problem.starts), "lengths": jnp.asarray(problem.lengths)}
    (filled, heads), window = problem.fill(problem.starts), problem.window

    def parts(name: str) -> tuple[np.ndarray, np.ndarray]:
        prefill, decode = ops.find_backend(name).prefill, ops.find_backend(name).decode
        chunk = jax.jit(functools.partial(prefill, **counts, window=window))(q, k, v, filled, heads)
        token = jax.jit(functools.partial(decode, lengths=counts["start"], window=window))(q[:, 0], filled, heads)
        is_valid = np.arange(q.shape[1]) < problem.lengths[:, None]
        return np.asarray(chunk.log_sum)[is_valid], np.asarray(token.log_sum)

    for found, expected in zip(parts(backend), parts("reference"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cudnn_merges_slot_and_chunk(dtype):
    """By jax's own implementation of the function that calls cuDNN, which a CPU does not have."""
    problem = Problem(Case(MIXED, starts=(20, 0, 41), lengths=(9, 13, 7), dtype=dtype))
    own = problem.starts[:, None] + np.arange(problem.case.tokens)
    q, k, v = (jnp.asarray(np.stack([x[b, own[b]] for b in range(3)])) for x in (problem.q, problem.k, problem.v))
    counts = {"start": jnp.asarray(problem.starts), "lengths": jnp.asarray(problem.lengths)}
    (filled, heads), window = problem.fill(problem.starts), problem.window
    run = functools.partial(cudnn.prefill, **counts, window=window, implementation="xla")
    with jax.numpy_dtype_promotion("standard"):  # jax's implementation has products of two types.
        found = jax.jit(run)(q, k, v, filled, heads)
    assert np.isfinite(found.out).all() and found.out.dtype == q.dtype
    # The function rounds the log-sum-exp to the type of the queries.
    tolerance = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    expected = ops.find_backend("reference").prefill(q, k, v, filled, heads, **counts, window=window)
    for row, length in enumerate(problem.lengths):
        for x, right in zip(found, expected, strict=True):
            x, right = (np.asarray(each[row, :length], np.float64) for each in (x, right))
            np.testing.assert_allclose(x, right, rtol=0, atol=tolerance)


def test_cudnn_is_called_for_retrieval_heads(monkeypatch):
    """Lowered for a GPU that is not here, with what is asked of one answered: cuDNN itself was not run."""
    for name, answer in (
        ("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", 91200),
        ("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", True),
        # Not `tracing_for`: jax 0.12 refuses to lower the call under an abstract mesh.
        ("pallas_kernels.gpus.device_kind", find_gpu("h200").name),
        ("pallas_kernels.ops.device_kind", find_gpu("h200").name),
    ):
        monkeypatch.setattr(name, lambda *_, answer=answer: answer)
    function, shapes = program("prefill", "cudnn", tokens=500, capacity=1000)
    text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # One call for the slot, one for the chunk, each with a log-sum-exp.
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax", text)) == 2
