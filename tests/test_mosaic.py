"""The Mosaic kernels in their interpreter, which models barriers and copies, against the reference.

From jax 0.11 on, the interpreter detects races too.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Heads, Pools, Window, decode_attention, gated_attention, prefill_attention, works
from pallas_kernels.certify import cases
from pallas_kernels.mosaic import pipeline
from pallas_kernels.ops import find_backend
from pallas_kernels.quantized import Quantized, empty
from pallas_kernels.segments import segments_of
from pallas_kernels.tiles import DecodeTiles, trying
from tests.stored import store

WINDOW = Window(16, 64)
# On a CPU, "mosaic" is the kernel for Hopper.
AMPERE = "pallas_kernels.mosaic.ampere"
INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"


def problem(*, tokens, starts, head_dim=64, is_retrieval=(True, False), capacity=248, dtype=jnp.bfloat16):
    """Two query heads per KV head, pools with one unused slot."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    batch, kinds = len(starts), np.array(is_retrieval)
    counts = [int(kinds.sum()), int((~kinds).sum())]
    slots = [count + 1 if count else 0 for count in counts]
    pools = [normal(slots[i], batch, size, head_dim) for i, size in ((0, capacity), (1, 80)) for _ in "kv"]
    slot = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)).astype(np.int32)
    heads = Heads(jnp.asarray(kinds), jnp.asarray(slot))
    q = normal(batch, tokens, 2 * len(kinds), head_dim)
    return q, *(normal(batch, tokens, len(kinds), head_dim) for _ in "kv"), Pools(*pools), heads


def poisoned(pools, lengths, value=jnp.nan):
    """NaN in the unused slot and where a row has no token: a ring fills from its first index too."""

    def poison(pool):
        is_token = jnp.arange(pool.shape[2])[None, :] < jnp.asarray(lengths)[:, None]
        is_token = is_token[None, :, :, None] & (jnp.arange(pool.shape[0]) > 0)[:, None, None, None]
        if isinstance(pool, Quantized):
            return cases.poisoned(pool, ~is_token)
        return jnp.where(is_token, pool, jnp.asarray(value, pool.dtype))

    return Pools(*(poison(pool) if pool.shape[0] else pool for pool in pools.stored))


def in_pages(pools, page, seed=0):
    """The same pools, with the tokens of retrieval heads in pages in any order, and unused pages of NaN."""
    slots, batch, capacity, head_dim = pools.full_k.shape
    count = capacity // page
    pages = np.random.default_rng(seed).permutation(batch * count + 2)[: batch * count].astype(np.int32)

    def paged(pool):
        unused = jnp.full((slots, batch * count + 2, page, head_dim), jnp.nan, pool.dtype)
        return unused.at[:, pages].set(pool.reshape(slots, -1, page, head_dim))

    return Pools(*map(paged, pools.full), *pools.ring, jnp.asarray(pages.reshape(batch, count)))


def stored_as(pool, dtype, values):
    """A pool in few bits."""
    return store(pool, empty((1, pool.shape[3]), dtype, values=values))


@pytest.mark.full_matrix
@pytest.mark.parametrize(
    "case",
    [
        # A pool's last tile partly filled and reaching over its end; sinks, window and diagonal of a streaming head.
        {"tokens": 128, "starts": (200,)},
        # A first chunk: nothing cached; padding to whole tiles; a row that ends early.
        {"tokens": 150, "starts": (0,), "is_retrieval": (False,), "lengths": (140,)},
        # A ring that is partly filled.
        {"tokens": 128, "starts": (37,)},
        # Queries of a group in one tile, keys of it in three parts; a row with fewer parts.
        {"tokens": 20, "starts": (248, 70), "cores": 8},
        # Tiles in pages of their own; the same with several parts.
        {"tokens": 128, "starts": (300,), "capacity": 384, "page": 128},
        {"tokens": 20, "starts": (512, 200), "capacity": 512, "cores": 8, "page": 256},
        # Quantized pools are unpacked in two segments; one row has tokens in the first one only, one has none.
        {"tokens": 20, "starts": (248, 70, 0), "quantized": ("int4", "int8")},
    ],
    ids=["after_a_cache", "first_chunk", "after_few_tokens", "short_chunk", "pages", "parts_in_pages", "quantized"],
)
@pytest.mark.parametrize("backend", ["mosaic", AMPERE])
def test_prefill_equals_the_reference(case, backend, monkeypatch):
    """Programs have several works each, if `cores` does not say otherwise."""
    case = dict(case)
    cores, quantized = case.pop("cores", 2), case.pop("quantized", None)
    monkeypatch.setattr(works, "multiprocessors", lambda: cores)
    monkeypatch.setattr(works, "LEAST_KEYS", 64)
    lengths = case.pop("lengths", (case["tokens"],) * len(case["starts"]))
    page = case.pop("page", None)
    q, k, v, pools, heads = problem(**case)
    if quantized:
        pools = Pools(*(stored_as(pool, quantized[i // 2], i % 2 == 1) for i, pool in enumerate(pools.stored)))
    pools = poisoned(pools, case["starts"])
    arrays = q, k, v, pools if page is None else in_pages(pools, page), heads
    rows = {"start": jnp.asarray(case["starts"], jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32)}

    def attend(backend):
        run = jax.jit(functools.partial(find_backend(backend).prefill, **rows, window=WINDOW))
        with segments_of(128):
            return [np.asarray(x, np.float32) for x in run(*arrays)]

    # Output and log-sum-exp.
    for found, expected in zip(attend(backend), attend("reference"), strict=True):
        assert np.isfinite(found).all()
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(found[row, :length], expected[row, :length], rtol=0, atol=2e-2)


def test_prefill_on_ampere_is_the_reference_where_tiles_end_with_their_slots():
    """Of 73 tokens in a slot and 80 in a ring, the second tile of 64 begins earlier, and shows only its own keys."""
    q, k, v, pools, heads = problem(tokens=20, starts=(71,), capacity=73)
    pools, rows = (
        poisoned(pools, (71,)),
        {"start": jnp.asarray([71], jnp.int32), "lengths": jnp.asarray([20], jnp.int32)},
    )
    found, expected = (
        jax.jit(functools.partial(find_backend(name).prefill, **rows, window=WINDOW))(q, k, v, pools, heads)
        for name in (AMPERE, "reference")
    )
    for part, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (part, exact)), rtol=0, atol=2e-2)


@pytest.mark.full_matrix
@pytest.mark.parametrize(
    ("is_retrieval", "page"),
    [((True, False), None), ((False,), None), ((True, False), 128)],
    ids=["both", "only_streaming", "pages"],
)
def test_decode_equals_the_reference(is_retrieval, page):
    """Two parts of the first row, one of the second; stages used again; a last tile partly filled."""
    capacity = 304 if page is None else 3 * page
    q, _, _, pools, heads = problem(tokens=1, starts=(0, 0), capacity=capacity, is_retrieval=is_retrieval)
    lengths = jnp.asarray([299, 33], jnp.int32)
    pools = poisoned(pools, lengths)
    pools = pools if page is None else in_pages(pools, page)

    def attend(backend):
        run = jax.jit(functools.partial(find_backend(backend).decode, lengths=lengths, window=WINDOW))
        return [np.asarray(x, np.float32) for x in run(q[:, 0], pools, heads)]

    # A program of each head takes two of the three parts.
    programs = 2 * len(is_retrieval)
    tiles = DecodeTiles(block_k=32, min_split=160, max_programs=programs, num_warps=4, num_stages=2)
    with trying("mosaic_decode", tiles):
        found = attend("mosaic")
    for part, expected in zip(found, attend("reference"), strict=True):
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-2)


class Without:
    """Mosaic without a fence."""

    def __getattr__(self, name):
        return (lambda: None) if name == "commit_smem" else getattr(plgpu, name)


@pytest.mark.full_matrix
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 detects no race")
@pytest.mark.parametrize("operation", ["prefill", "decode"])
def test_a_kernel_without_a_fence_before_its_output_is_copied_has_a_race(operation, monkeypatch):
    monkeypatch.setattr(pipeline, "plgpu", Without())
    q, k, v, pools, heads = problem(tokens=128, starts=(32,), is_retrieval=(True,), capacity=64)
    lengths = jnp.asarray([32], jnp.int32)
    function = find_backend("mosaic")
    try:
        with pytest.raises(Exception, match="RACE DETECTED"):
            if operation == "prefill":
                out = function.prefill(q, k, v, pools, heads, start=lengths, lengths=4 * lengths, window=WINDOW)
            else:
                out = function.decode(q[:, 0], pools, heads, lengths=lengths, window=WINDOW)
            jax.block_until_ready(out)
    finally:
        importlib.import_module(INTERPRETER).reset_gpu_interpret_mode_state()


def test_refusals_name_the_reason():
    count = jnp.ones(1, jnp.int32)
    rows = {"start": count, "lengths": count, "window": WINDOW, "backend": "mosaic"}
    with pytest.raises(NotImplementedError, match=r"takes bfloat16 or float16.* got float32: use"):
        prefill_attention(*problem(tokens=4, starts=(0,), dtype=jnp.float32), **rows)
    with pytest.raises(NotImplementedError, match="head dims of 64 or 128, got 80"):
        prefill_attention(*problem(tokens=4, starts=(0,), head_dim=80), **rows)
    q, k, v, pools, heads = problem(tokens=4, starts=(0,))
    with pytest.raises(NotImplementedError, match="up to 64 query heads a KV head, got 65"):
        many = jnp.tile(q[:, 0], (1, 33, 1))[:, :130]
        decode_attention(many, pools, heads, lengths=count, window=WINDOW, backend="mosaic")
    with pytest.raises(NotImplementedError, match="the mosaic backend has no kernel for training: use backend='xla'"):
        gated_attention(q, k, v, jnp.ones(2), window=WINDOW, backend="mosaic")
    with pytest.raises(NotImplementedError, match="multiples of 8, and at least 32, got 8, 80"):
        prefill_attention(*problem(tokens=4, starts=(0,), capacity=8), **rows)
    with pytest.raises(NotImplementedError, match="takes pages that are a multiple of 128 tokens, got 8: use"):
        paged = in_pages(pools._replace(full_k=pools.full_k[:, :, :16], full_v=pools.full_v[:, :, :16]), 8)
        prefill_attention(q, k, v, paged, heads, **rows)
    with pytest.raises(NotImplementedError, match=r"multiples of 8.* got 300"):
        prefill_attention(*problem(tokens=4, starts=(0,), capacity=300), **rows)
