"""The kernels as the compiler made them, executed from their PTX, against softmax written out in float64.

What this shows: that the PTX which XLA and Triton generate for an A100 computes the right numbers, from every address
that it may read and no other, whatever the order in which warps and blocks run. What it does not: that `ptxas` makes
the right machine code of it; that a launch is possible (registers, shared memory); Hopper's asynchronous instructions,
which code for newer chips contains; anything about time. Sums are rounded in another order than on a GPU.
"""

import functools
import importlib
import re
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.ampere import LEAST_KEYS
from pallas_kernels.mosaic.compat import TILE_LAYOUT
from pallas_kernels.mosaic.warps import Warps, is_available
from pallas_kernels.ops import find_backend
from pallas_kernels.quantized import BITS
from pallas_kernels.schedule import Seen, Sizes
from pallas_kernels.segments import segments_of
from pallas_kernels.tiles import PipelineTiles, tiles_for, trying
from pallas_kernels.types import Pools, TokenShards
from pallas_kernels.window import Window
from tests.ptx.launch import Change, Launch, executing, executing_pallas_calls
from tests.ptx.machine import Failure
from tests.ptx.parse import parse
from tests.test_append import CASES as APPEND
from tests.test_append import Problem as Token
from tests.test_attention import CALLS, MIXED, TOLERANCE, Case, Paged, Problem
from tests.test_gated import dense, masks

try:
    PLUGIN = version("jax-cuda12-plugin")
except PackageNotFoundError:
    PLUGIN = ""
pytestmark = [pytest.mark.aot, pytest.mark.skipif(not PLUGIN, reason="needs jax's CUDA plugin: make test-aot")]

BOUND = TOLERANCE | {"float16": 5e-3}
BF16 = {"dtype": "bfloat16", "head_dim": 64}
# Prefill: tiles have 128 queries and 64 keys. Rows are ragged, one is empty; pools
# have whole tiles and a tail, and end in a tile; rings are empty, partly filled, and wrapped.
LONG = {"tokens": 150, "capacity": 260, "starts": (0, 70, 110), "lengths": (150, 0, 77), "recent_size": 70}
PREFILL = {
    "bfloat16": Case(MIXED, **BF16, **LONG),
    "window_of_one_no_sinks": Case(MIXED, **BF16, **LONG | {"recent_size": 1, "sink_size": 0}),
    "sinks_longer_than_a_tile": Case((False, True), **BF16, **LONG | {"sink_size": 67}),
    "streaming_only_after_many_wraps": Case((False, False), **BF16, starts=(48, 37, 26), recent_size=5),
    "retrieval_only_gqa_7": Case((True, True), group=7, **BF16, starts=(48, 0, 41)),
    "head_dim_128": Case(MIXED, dtype="bfloat16", head_dim=128, starts=(0, 5, 41)),
    "head_dim_96_gqa_1": Case(MIXED, group=1, dtype="bfloat16", head_dim=96),
    "head_dim_256": Case((False, True), dtype="bfloat16", head_dim=256),
    "int8": Case(MIXED, **BF16, **LONG, pool_dtype="int8"),
    "int4": Case(MIXED, dtype="bfloat16", head_dim=128, **LONG, pool_dtype="int4"),
    "int4_int8_rings": Case(MIXED, group=1, **BF16, pool_dtype="int4", ring_dtype="int8"),
    "float16": Case(MIXED, dtype="float16", head_dim=64, starts=(0, 5, 41)),
    "float32": Case(MIXED, head_dim=64, **LONG),
    "bfloat16_cache_of_float32": Case(MIXED, head_dim=32, pool_dtype="bfloat16"),
}
# Decode: a tile of 64 keys is a part of its own, but for the longest row; a program takes several parts.
ROWS = {"tokens": 1, "capacity": 330, "starts": (329, 0, 0, 63, 64, 130), "lengths": (1, 0, 1, 1, 1, 1)}
DECODE = {
    "bfloat16": Case(MIXED, **BF16, **ROWS),
    "ring_longer_than_a_tile": Case(MIXED, **BF16, **ROWS, recent_size=130),
    "streaming_only": Case((False, False), **BF16, **ROWS),
    "head_dim_128_gqa_8": Case(MIXED, group=8, dtype="bfloat16", head_dim=128, **ROWS),
    "head_dim_80_gqa_1": Case(MIXED, group=1, dtype="bfloat16", head_dim=80, **ROWS),
    "head_dim_256": Case((True, False), dtype="bfloat16", head_dim=256, **ROWS),
    "int8": Case(MIXED, dtype="bfloat16", head_dim=128, **ROWS, pool_dtype="int8"),
    "int4": Case(MIXED, **BF16, **ROWS, pool_dtype="int4"),
    "int4_int8_rings": Case(MIXED, **BF16, **ROWS, pool_dtype="int4", ring_dtype="int8"),
    "float16": Case(MIXED, dtype="float16", head_dim=64, **ROWS),
    "float32": Case(MIXED, head_dim=64, **ROWS),
    "float32_int4": Case(MIXED, head_dim=64, **ROWS, pool_dtype="int4"),
    "float16_int8": Case(MIXED, dtype="float16", head_dim=64, **ROWS, pool_dtype="int8"),
}
# Training: tokens, query heads, KV heads, head dim, window. Tiles have 64 and 128 queries, 32 and 64 keys.
TRAINING = {
    "bfloat16": ((150, 4, 2, 64), Window(3, 70), "bfloat16"),
    "head_dim_128_gqa_1": ((77, 2, 2, 128), Window(0, 1), "bfloat16"),
    "sinks_longer_than_a_tile": ((130, 2, 1, 64), Window(67, 9), "bfloat16"),
    "shorter_than_the_sinks": ((5, 4, 2, 64), Window(7, 3), "bfloat16"),
    "float32_head_dim_40": ((70, 2, 1, 40), Window(3, 9), "float32"),
}


def needs(backend: str = "jax_triton") -> None:
    if backend == "mosaic" and not is_available():
        pytest.skip("needs jax 0.11.2 or newer")
    if backend == "jax_triton" and not (find_spec("jax_triton") and find_spec("triton")):
        pytest.skip("needs triton and jax_triton: make test-aot")


backends = pytest.mark.parametrize("backend", ["triton", "jax_triton"])
of_prefill = pytest.mark.parametrize("backend", ["triton", "jax_triton", "mosaic"])


def of_mosaic(case: Case) -> Case:
    """A case with a ring that is not too short for a tile."""
    if case.head_dim not in (64, 128) or {case.dtype, case.pool_dtype} & {"float32"}:
        pytest.skip("mosaic takes bfloat16 and float16, and head dims of 64 and 128")
    return case._replace(recent_size=max(case.recent_size, LEAST_KEYS - case.sink_size))


def print_counts(launches: list[Launch]) -> None:
    for launch in launches:
        kernel, run = parse(launch.program.text), launch.run
        print(
            f"{kernel.name}, {' x '.join(map(str, launch.program.grid))} blocks: {run.count():,} instructions of "
            f"warps, {run.count('mma'):,} of them products; "
            f"{len(run.executed)} of the kernel's {len(kernel.instructions)} were executed"
        )
        assert run.count()


@functools.lru_cache(maxsize=1)
def problem_of(case: Case, tokens: tuple[tuple[int, int, int], ...]) -> tuple[Problem, np.ndarray]:
    """A problem, and the output of some (row, index, position).

    Weights are peaked, so that each key matters. Not those of quantized keys: kernels round these to bfloat16 again,
    and the error of a score grows with it.
    """
    problem = Problem(case)
    if not {case.pool_dtype, case.ring_dtype} & {"int8", "int4"}:
        problem.q = (problem.q * 4).astype(problem.q.dtype)
    return problem, np.stack([problem.expected(row, position) for row, _, position in tokens])


def max_error(out: jax.Array, tokens: tuple[tuple[int, int, int], ...], expected: np.ndarray) -> float:
    """The largest error over these tokens; nothing may be infinite or NaN, padding included."""
    numbers = np.asarray(out).astype(np.float64)
    assert np.isfinite(numbers).all()
    numbers = numbers.reshape(len(numbers), -1, *numbers.shape[-2:])
    return float(np.abs(np.stack([numbers[row, index] for row, index, _ in tokens]) - expected).max())


def prefill(
    case: Case,
    change: Change | None = None,
    page: int | None = None,
    segment: int | None = 136,
    backend: str = "triton",
) -> tuple[float, list[Launch]]:
    """The largest error of a prefill, and its launches; with `page`, retrieval heads have their tokens in pages.

    Quantized slots have two segments, or none, which short chunks need not.
    """
    rows = enumerate(zip(case.starts, case.lengths, strict=True))
    tokens = tuple((row, t, start + t) for row, (start, length) in rows for t in range(length))
    problem, expected = problem_of(case, tokens)
    at = problem.starts[:, None] + np.arange(case.tokens)
    q, k, v = (np.stack([x[row, at[row]] for row in range(len(at))]) for x in (problem.q, problem.k, problem.v))
    for row, length in enumerate(problem.lengths):
        k[row, length:] = v[row, length:] = problem.garbage
    settings = {"start": jnp.asarray(problem.starts), "lengths": jnp.asarray(problem.lengths)}
    pools, heads = problem.fill(problem.starts)
    pools = pools if page is None else Paged(page, 0).of(pools)
    with executing(change) as launches, segments_of(segment):
        own = map(jnp.asarray, (q, k, v))
        out = CALLS["prefill"](*own, pools, heads, **settings, window=problem.window, backend=backend)
    return max_error(out, tokens, expected), launches


def decode(
    case: Case, backend: str, change: Change | None = None, programs: int = 4, page: int | None = None
) -> tuple[float, list[Launch]]:
    """The largest error of a decode step, and its launches; `programs` for each head."""
    counts = np.add(case.starts, case.lengths, dtype=np.int32)
    tokens = tuple((int(row), 0, int(counts[row]) - 1) for row in np.flatnonzero(counts))
    problem, expected = problem_of(case, tokens)
    pools, heads = problem.fill(counts)
    pools = pools if page is None else Paged(page, 0).of(pools)
    q = jnp.asarray(problem.q[np.arange(len(counts)), np.maximum(counts - 1, 0)])
    with executing(change) as launches:
        quantized = case.pool_dtype in ("int8", "int4")
        tiles = tiles_for("decode", case.head_dim, q.dtype.itemsize, quantized=quantized)
        most = programs * len(case.is_retrieval)
        with trying("decode", replace(tiles, min_split=tiles.block_k, max_programs=most)):
            out = CALLS["decode"](q, pools, heads, lengths=jnp.asarray(counts), window=problem.window, backend=backend)
    return max_error(out, tokens, expected), launches


@of_prefill
@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL)
def test_prefill(case, backend):
    needs(backend)
    if backend == "mosaic":
        case = of_mosaic(case)
    if backend == "jax_triton" and case.pool_dtype not in (case.dtype, None, *BITS):
        pytest.skip("jax_triton takes one data type for queries and cache")
    error, launches = prefill(case, backend=backend)
    print_counts(launches)
    assert error < BOUND[case.dtype]


@backends
@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE)
def test_decode(case, backend):
    needs(backend)
    error, launches = decode(case, backend)
    print_counts(launches)
    assert error < BOUND[case.dtype]


@of_prefill
@pytest.mark.parametrize("name", ["bfloat16", "head_dim_128", "int4"])
def test_prefill_from_pages(name, backend):
    """Tiles of one page and of the next; the last page is partly filled, unused ones are NaN."""
    needs(backend)
    case = of_mosaic(PREFILL[name]) if backend == "mosaic" else PREFILL[name]
    error, launches = prefill(case, page=128, backend=backend)
    print_counts(launches)
    assert error < BOUND["bfloat16"]


def test_prefill_of_mosaic_with_three_stages():
    """Copies are two tiles ahead."""
    needs("mosaic")
    with trying("mosaic_flash", PipelineTiles(block_k=32, num_stages=3)):
        error, launches = prefill(PREFILL["bfloat16"], backend="mosaic")
    print_counts(launches)
    assert error < BOUND["bfloat16"]


@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        (r"cp\.async\.wait_group\s+1;", "reads what a copy is still writing"),
        (r"cp\.async\.wait_group\s+0;", "reads what a copy is still writing"),
        (r"bar\.sync\s+%r\d+, 128;", "without a barrier between"),
    ],
)
def test_a_kernel_of_mosaic_that_does_not_wait_is_refused(removed, reason):
    needs("mosaic")

    def without(program):
        text, count = re.subn(removed, "", program.text)
        assert count
        return replace(program, text=text)

    with pytest.raises(Failure, match=reason):
        prefill(of_mosaic(PREFILL["retrieval_only_gqa_7"]), without, backend="mosaic")


def test_the_mask_of_a_tile_whose_kind_is_known_on_the_device():
    """On Hopper, that of the first tile: for its kernel, the executor has no instructions, but for the mask."""
    needs("mosaic")
    sizes = Sizes(200, 64, 64, Window(5, 70))

    def mask(at, columns, rows):
        tile, start, filled, is_retrieval, is_full, is_ring = (at[i] for i in range(6))
        own = tile, start, is_retrieval == 1, sizes, filled
        full, ring, chunk = (Seen.of(source, *own) for source in ("full", "ring", "own"))
        return Seen.either(is_full == 1, full, is_ring == 1, ring, chunk).mask(columns, rows, (64, 64))

    def mask_kernel(at_ref, out_ref):
        warps, at = Warps(False, jnp.bfloat16), at_ref.at[lax.axis_index("case")]
        keep = mask(at, warps.columns(64), warps.rows(64))
        seen = jnp.where(keep, warps.full((64, 64), 1.0, TILE_LAYOUT), 0.0)
        warps.store(out_ref.at[lax.axis_index("case")], seen, is_tiled=False)

    kinds = [(1, 1, 0), (0, 0, 1), (0, 0, 0), (1, 0, 0)]  # is_retrieval, is_full, is_ring
    places = [(tile, start, filled) for tile in (0, 1) for start, filled in ((0, 0), (37, 37), (300, 100))]
    cases = jnp.asarray([(*place, *kind) for kind in kinds for place in places], jnp.int32)
    with executing():
        (found,) = plgpu.kernel(
            functools.partial(mask_kernel),
            out_type=(jax.ShapeDtypeStruct((len(cases), 64, 64), jnp.float32),),
            grid=(len(cases),),
            grid_names=("case",),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
        )(cases)
    index = jnp.arange(64, dtype=jnp.int32)
    expected = jax.vmap(lambda at: mask(at, index, index))(cases)
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_array_equal(np.asarray(found) == 1, expected)


@pytest.mark.parametrize("page", [None, 128], ids=["contiguous", "pages"])
@pytest.mark.parametrize(("cache", "head_dim", "dtype"), [("int4", 128, "bfloat16"), ("int8", 64, "bfloat16")])
def test_prefill_of_a_short_chunk(cache, head_dim, dtype, page):
    """It reads packed keys: 140 queries of a KV head are two tiles; keys are in up to two parts."""
    rows = {"tokens": 35, "capacity": 600, "starts": (565, 0, 70), "lengths": (35, 0, 7), "recent_size": 70}
    case = Case((True, False), 4, dtype=dtype, head_dim=head_dim, **rows, pool_dtype=cache)
    error, launches = prefill(case, page=page, segment=None)
    print_counts(launches)
    assert len(launches) == 3 and error < BOUND[dtype]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "triton") for name in ("bfloat16", "head_dim_128_gqa_8", "int8", "int4")]
    + [(name, "jax_triton") for name in ("bfloat16", "int4")],
)
def test_decode_from_pages(name, backend):
    needs(backend)
    error, launches = decode(DECODE[name], backend, page=128)
    print_counts(launches)
    assert error < BOUND["bfloat16"]


@pytest.mark.parametrize("case", APPEND.values(), ids=APPEND)
def test_append(case):
    """Pools as XLA writes them on the CPU, and nothing else is touched."""
    token = Token(case)
    with executing() as launches:
        found = token.append("triton", is_jitted=False)
    print_counts(launches)
    assert len(launches) == case.shards
    token.check(found)


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_in_one_program(seed):
    """Any starts and lengths; the kernels are compiled for the first of them only."""
    rng = np.random.default_rng(seed)
    starts, lengths = (tuple(map(int, rng.integers(0, most, 3))) for most in (210, 71))
    rows = {"starts": starts, "lengths": lengths, "tokens": 70, "capacity": 280, "recent_size": 67}
    error, launches = prefill(Case(MIXED, **BF16, **rows))
    print_counts(launches)
    assert error < BOUND["bfloat16"]
    error, launches = decode(Case(MIXED, **BF16, **rows), "triton")
    print_counts(launches)
    assert error < BOUND["bfloat16"]


@backends
@pytest.mark.parametrize("operation", ["prefill", "decode"])
def test_two_devices_that_share_the_tokens(operation, backend):
    """Each computes its part; the parts are merged here."""
    needs(backend)
    tokens = {"tokens": 13, "lengths": (13, 2, 7)} if operation == "prefill" else {"tokens": 1, "lengths": (1, 1, 1)}
    case = Case(MIXED, **BF16, **tokens, starts=(0, 70, 131), capacity=160)
    problem = Problem(case)
    counts = problem.starts if operation == "prefill" else problem.starts + 1
    pools, heads = problem.fill(counts)
    at = problem.starts[:, None] + np.arange(case.tokens)
    q, k, v = (
        jnp.asarray(np.stack([x[row, at[row]] for row in range(len(at))])) for x in (problem.q, problem.k, problem.v)
    )
    attend, parts = getattr(find_backend(backend), operation), []
    for number in range(2):

        class Device(TokenShards):
            index = property(lambda self, number=number: jnp.int32(number))

        rows = {"window": problem.window, "shards": Device("tokens", 2)}
        stored = Pools(pools.full_k[:, :, number::2], pools.full_v[:, :, number::2], *pools.ring)
        with executing() as launches:
            if operation == "decode":
                parts.append(attend(q[:, 0], stored, heads, lengths=jnp.asarray(counts), **rows))
            else:
                lengths = {"start": jnp.asarray(counts), "lengths": jnp.asarray(problem.lengths)}
                parts.append(attend(q, k, v, stored, heads, **lengths, **rows))
        print_counts(launches)
    logs = np.stack([np.asarray(part.log_sum, np.float64) for part in parts])
    weights = np.exp(logs - logs.max(0))[..., None]
    out = sum(
        w * np.asarray(part.out).astype(np.float64) for w, part in zip(weights, parts, strict=True)
    ) / weights.sum(0)
    rows = enumerate(zip(case.starts, case.lengths, strict=True))
    tokens = tuple((row, t, start + t) for row, (start, length) in rows for t in range(length))
    expected = np.stack([problem.expected(row, position) for row, _, position in tokens])
    assert max_error(out, tokens, expected) < BOUND["bfloat16"]


def gradients(q, k, v, grad, keep):
    """Of `dense` (tests/test_gated.py), for the gradient of its output."""
    group = q.shape[2] // k.shape[2]
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.where(keep, np.einsum("btnh,bsnh->bnts", q, wide_k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", grad, wide_v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, wide_k)
    d_k, d_v = np.einsum("bnts,btnh->bsnh", d_scores, q), np.einsum("bnts,btnh->bsnh", weights, grad)
    return d_q, *(x.reshape(*k.shape[:3], group, -1).sum(3) for x in (d_k, d_v))


def training(
    shape: tuple[int, int, int, int],
    window: Window | None,
    dtype: str,
    change: Change | None = None,
    backend: str = "triton",
) -> tuple[float, list[Launch]]:
    """The largest error of the output and the gradients, in units of what is tolerated, and the launches."""
    tokens, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    q, k, v, grad = (
        jnp.asarray(rng.normal(size=(2, tokens, count, head_dim)), dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    keep = masks(tokens, window or Window(0, 1))[window is not None]
    attend = find_backend(backend).training
    with executing(change) as launches:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, window).out, q, k, v)
        outputs = out, *back(grad)
    assert len(launches) == 3
    errors = []
    for x, y in zip(outputs, (dense(q, k, v, keep), *gradients(q, k, v, grad, keep)), strict=True):
        # Over a window of one token, the gradient of queries and keys is zero.
        bound = {"bfloat16": 1e-2, "float32": 1e-5}[dtype] * np.linalg.norm(y) + 1e-6 * grad.size**0.5
        errors.append(np.linalg.norm(np.asarray(x).astype(np.float64) - y) / bound)
    return float(np.max(errors)), launches


@backends
@pytest.mark.parametrize("kind", ["retrieval", "streaming"])
@pytest.mark.parametrize(("shape", "window", "dtype"), TRAINING.values(), ids=TRAINING)
def test_training(shape, window, dtype, kind, backend):
    needs(backend)
    error, launches = training(shape, window if kind == "streaming" else None, dtype, backend=backend)
    print_counts(launches)
    assert error < 1


# jax's own kernels, as a control: they are known to be right.


def control(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Later versions of jax recommend tokamax.
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_jax(causal):
    rng = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(rng.normal(size=(1, 128, 2, 64)), jnp.bfloat16) for _ in range(4))
    attention = control("attention")
    blocks = attention.BlockSizes(64, 64, 64, 64, 64, 64)

    def mha(q, k, v):
        return attention.mha(q, k, v, None, sm_scale=64**-0.5, causal=causal, block_sizes=blocks)

    with executing_pallas_calls() as launches, jax.disable_jit():
        out, back = jax.vjp(mha, q, k, v)
        outputs = out, *back(grad)
    print_counts(launches)
    keep = masks(128, Window(0, 128))[0] if causal else np.ones((128, 128), bool)
    for x, y in zip(outputs, (dense(q, k, v, keep), *gradients(q, k, v, grad, keep)), strict=True):
        assert np.linalg.norm(np.asarray(x).astype(np.float64) - y) < 1e-2 * np.linalg.norm(y)


def test_decode_attention_of_jax():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(count, 64)), jnp.bfloat16) for count in (16, 256, 256))
    settings = {"block_h": 16, "block_k": 64, "k_splits": 2, "num_warps": None, "num_stages": 2, "grid": None}
    settings |= {"interpret": False, "debug": False, "return_residuals": False, "normalize_output": True}
    with executing_pallas_calls() as launches, jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        out = control("decode_attention").decode_attn_unbatched(q, k, v, None, None, sm_scale=64**-0.5, **settings)
    print_counts(launches)
    wanted = dense(q[None, None], k[None, :, None], v[None, :, None], np.ones((1, 256), bool))[0, 0]
    assert np.linalg.norm(np.asarray(out).astype(np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)
