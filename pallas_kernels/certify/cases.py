"""Inputs on which a backend must be right: one set of shapes for each request, several hostile contents.

Every number that an operation must not read is NaN: slots of other layers, tokens beyond a row's length, entries of a
ring that were never written. The inputs of a request run in a loop of one program, so that a kernel is compiled once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import ops
from pallas_kernels.gpus import device_kind
from pallas_kernels.merge import log_copies, merge_parts
from pallas_kernels.quantized import Quantized, empty, read, store
from pallas_kernels.segments import MOST_TILES_ELSEWHERE, segments_of
from pallas_kernels.tiles import MOST_ROWS
from pallas_kernels.types import MOST_KEYS, Heads, Partial, Pools, Request, TokenShards, keys_of_page
from pallas_kernels.window import Window

# Relative error in the Euclidean norm that counts as right. Of `log_sum`, the error itself: that of an output with a
# learned sink is at most as large.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
# Of a token that is written: nothing, or a step of a number that is between two, as sums are rounded in another order.
EQUAL, STEP = 1e-6, 0.05
# Tokens over which an error is a relative one.
TOKENS = 64
# The outputs of an operation; in training, gradients are named after their inputs.
PART = ("out", "log_sum")
OUTPUTS = {"prefill": PART, "decode": PART, "append": ("pools",), "training": (*PART, "q", "k", "v")}
# Queries of a KV head that a chunk is short with on every GPU, two tiles of them, and rows of its batch.
SHORT_QUERIES, SHORT_ROWS = MOST_TILES_ELSEWHERE * MOST_ROWS - 1, 2
# Devices that share the tokens of retrieval heads. One computes all of their parts here: it may be the only one.
SHARDS = 2
# Tokens of a row are a multiple of the largest tile of keys, also on each device.
UNIT = MOST_KEYS


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are: on a GPU several programs a head, and long enough to be timed."""

    prefill: int
    """Most tokens of a chunk; no multiple of a tile."""
    past: int
    """Least tokens of a slot in prefill."""
    decode: int
    """Least tokens of a slot in decode, and before a short chunk."""
    training: int
    """Tokens of a sample."""
    rounds: int
    """Times that a program runs all inputs."""


GPU = Sizes(prefill=397, past=4096, decode=16384, training=701, rounds=4)
# Interpreted kernels are slow.
SMALL = Sizes(prefill=45, past=64, decode=160, training=77, rounds=1)

# KV heads of each input by type; the last two inputs have one type. A model decides which while it runs.
MIXES = ((True, False, True), (False, True, False), (True, True, True), (False, False, False))
# Values at the edges of tiles are this large: one of many thousand keys that is missing, or counted twice, then shows.
LOUD, EDGE = 8.0, 64
# Bytes of the reference's scores of one input, about.
MOST_SCORES = 1 << 28


class Inputs(NamedTuple):
    """The inputs of all cases of a request, one along the first axis; `pools` are shared, each case has its slots.

    There is one of `pools` for each device that shares tokens.
    """

    arrays: tuple[Any, ...]
    heads: Heads | None
    start: Any
    lengths: Any
    pools: tuple[Pools, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """A request's inputs, hostile ones and the same without what must not be read, and what is compared."""

    request: Request
    inputs: Inputs
    clean: Inputs
    rounds: int

    @property
    def count(self) -> int:
        """Inputs."""
        return int(self.inputs.arrays[0].shape[0])

    def program(self, backend: str) -> Any:
        """A function of `Inputs` that returns the outputs of every input; those that are unspecified are 0."""
        return partial(_run, self.request, backend, self.rounds)

    def exact(self) -> list[np.ndarray]:
        """The reference's outputs in float32, from contiguous pools on one device."""
        plain, raised = replace(self.request, page=None, is_sharded=False), self.clean
        if self.request.operation != "append":  # What is written is rounded to the pools' type.
            raised = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, raised)
        with jax.default_matmul_precision("highest"):  # Without this, GPUs multiply float32 with fewer bits.
            return _outputs(jax.jit(partial(_run, plain, "reference", 1), compiler_options=run_once())(raised))

    def errors(self, outputs: Any, exact: list[np.ndarray]) -> dict[str, float]:
        """The largest relative error of each output; of `log_sum`, the largest error."""
        pairs = zip(OUTPUTS[self.request.operation], _outputs(outputs), exact, strict=True)
        return {name: farthest(*pair) if name == "log_sum" else max(map(worst, *pair)) for name, *pair in pairs}

    @property
    def tolerance(self) -> float:
        """Error that counts as right; a quantized pool is read through queries and keys that are rounded once more."""
        if self.request.operation == "append":
            return STEP if self.request.bits else EQUAL
        return TOLERANCE[self.request.q] * (2 if self.request.bits else 1)


def run_once() -> dict[str, Any] | None:
    """Compiler options of a program that runs only once: on a CPU, LLVM's optimizations would take longer than that."""
    if device_kind() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make(request: Request, sizes: Sizes, seed: int = 0) -> Case:
    """The inputs for a request."""
    rng = np.random.default_rng(seed)
    if request.operation == "training":
        shapes = [(3, 2, sizes.training, heads, request.head_dim) for heads in _heads_of(request, 2)]
        own = tuple(_normal(rng, shape, request.q) for shape in (*shapes, shapes[0]))
        # Gradients of the output and of `log_sum`.
        own = (*own, _normal(rng, shapes[0][:-1], "float32"))
        inputs = Inputs(own, None, None, None, ())
        return Case(request, inputs, inputs, sizes.rounds)
    assert request.window is not None
    kinds = [name for name in ("full", "ring") if getattr(request, name) is not None]
    mixes = [[(is_full if len(kinds) == 2 else kinds == ["full"]) for is_full in mix] for mix in MIXES]
    is_retrieval = np.array(mixes if len(kinds) == 2 else mixes[:3])
    if request.operation == "prefill":
        tokens, room, start, lengths = _chunks(request, request.window, sizes)
    elif request.operation == "append":
        room, _, filled = _rows(request.window, replace(sizes, decode=UNIT))
        # One row of each input has no token.
        tokens, start, lengths = 1, filled - 1, 1 - np.eye(4, dtype=np.int32)
    else:
        tokens, room, start, lengths = 1, *_rows(request.window, sizes)
    count, rows = len(is_retrieval), start.shape[1]
    q, k, v = (
        _normal(rng, (count, rows, tokens, heads, request.head_dim), request.q)
        for heads in _heads_of(request, is_retrieval.shape[1])
    )
    slots, owners = _slots(rng, is_retrieval)
    before = (start if request.operation == "prefill" else lengths)[:count]
    made = [
        _pool(rng, request, is_full, len(owners[is_full]), rows, room, values)
        for is_full in (True, False)
        for values in (False, True)
    ]
    hidden = {is_full: _hidden(request.window, owners[is_full], before, room, is_full) for is_full in (True, False)}
    hostile = [poisoned(pool, hidden[is_full]) for pool, is_full in zip(made, (True, True, False, False), strict=True)]
    arrays: tuple[Any, ...] = {"prefill": (q, k, v), "decode": (q[:, :, 0],), "append": (k[:, :, 0], v[:, :, 0])}[
        request.operation
    ]
    if request.operation == "append":  # All of the pools are compared.
        hostile = made
    heads = Heads(jnp.asarray(is_retrieval), jnp.asarray(slots))
    at = jnp.asarray(start[:count]), jnp.asarray(lengths[:count])
    inputs, clean = (Inputs(arrays, heads, *at, pools) for pools in (_arranged(request, hostile), (Pools(*made),)))
    return Case(request, inputs, clean, sizes.rounds)


def farthest(outputs: np.ndarray, expected: np.ndarray) -> float:
    """The largest error."""
    error = np.abs(outputs - expected)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def worst(outputs: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative error over rows, heads and blocks of `TOKENS` tokens; vectors count as a whole."""
    squares = [np.square(x).sum(-1) for x in (outputs - expected, expected)]
    if outputs.ndim == 4:  # [B, T, N, H]
        edges = np.arange(0, outputs.shape[1], TOKENS)
        squares = [np.add.reduceat(x, edges, axis=1) for x in squares]
    error, size = squares
    ratios = np.sqrt(error / np.where(size > 0, size, 1.0))
    return float(ratios.max()) if np.isfinite(ratios).all() else float("inf")


def _run(request: Request, backend: str, rounds: int, inputs: Inputs) -> Any:
    if request.operation == "append":
        return _append(request, backend, rounds, inputs)
    count = inputs.arrays[0].shape[0]

    @jax.jit  # Traced once, for its shapes and for the loop.
    def one(index: Any, inputs: Inputs) -> Any:
        case = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), inputs._replace(pools=()))
        return _operation(request, backend, case._replace(pools=inputs.pools))

    def step(i: Any, outputs: Any) -> Any:
        index = lax.rem(i, jnp.int32(count))
        return jax.tree.map(
            lambda x, new: lax.dynamic_update_index_in_dim(x, new, index, 0), outputs, one(index, inputs)
        )

    shapes = jax.eval_shape(one, jnp.int32(0), inputs)
    empty_outputs = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    return lax.fori_loop(jnp.int32(0), jnp.int32(rounds * count), step, empty_outputs)


def _append(request: Request, backend: str, rounds: int, inputs: Inputs) -> tuple[Any]:
    """All pools as rows of numbers, `[1, n, H]`, once the tokens of every input are in, in place."""
    count = inputs.arrays[0].shape[0]

    def step(i: Any, pools: tuple[Pools, ...]) -> tuple[Pools, ...]:
        index = lax.rem(i, jnp.int32(count))
        case = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), inputs._replace(pools=()))
        assert case.heads is not None and request.window is not None
        k, v = case.arrays
        return tuple(
            ops.append_token(
                each,
                case.heads,
                k,
                v,
                start=case.start,
                active=case.lengths > 0,
                window=request.window,
                shards=TokenShards("tokens", SHARDS, number) if request.is_sharded else None,
                backend=backend,
            )
            for number, each in enumerate(pools)
        )

    pools = lax.fori_loop(jnp.int32(0), jnp.int32(rounds * count), step, inputs.pools)
    rows = [read(pool, jnp.dtype(jnp.float32)).astype(jnp.float32) for pool in _in_order(pools)]
    return (jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in rows])[None],)


def _operation(request: Request, backend: str, case: Inputs) -> Any:
    if request.operation == "training":
        *inputs, slope, slope_of_sum = case.arrays
        chosen = ops.choose(request, backend).training
        assert chosen is not None
        # Not the gates' gradient: no kernel computes it. XLA sums it over tokens with atomic additions, in any order.
        part, back = jax.vjp(lambda q, k, v: chosen(q, k, v, request.window), *inputs)
        return *part, *back(Partial(slope, slope_of_sum))

    parts = []
    for number, pools in enumerate(case.pools):
        shards = TokenShards("tokens", SHARDS, number) if request.is_sharded else None
        options: dict[str, Any] = {"window": request.window, "shards": shards, "backend": backend}
        options["score_cap"] = request.score_cap
        arguments: tuple[Any, ...] = (*case.arrays, pools, case.heads)
        if request.operation == "decode":
            parts.append(ops.decode_part(*arguments, lengths=case.lengths, **options))
        else:
            # Two segments of quantized slots, of which short rows have one; for short chunks, none.
            with segments_of(None if request.is_short else -(-pools.capacity // (2 * UNIT)) * UNIT):
                parts.append(ops.prefill_part(*arguments, start=case.start, lengths=case.lengths, **options))
    out, log_sum = parts[0] if len(parts) == 1 else _merged(parts, case.heads)
    if request.operation == "prefill":  # Beyond a row's tokens they are unspecified.
        is_token = jnp.arange(out.shape[1], dtype=jnp.int32)[None, :] < case.lengths[:, None]
        out, log_sum = (
            jnp.where(is_token.reshape(*is_token.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
            for x in (out, log_sum)
        )
    return out.astype(request.q), log_sum


def _merged(parts: list[Partial], heads: Heads | None) -> Partial:
    assert heads is not None
    part = merge_parts(parts)
    copies = log_copies(heads, len(parts), part.log_sum.shape[-1])
    return part._replace(log_sum=part.log_sum - jnp.broadcast_to(copies, part.log_sum.shape))


def _heads_of(request: Request, num_kv_heads: int) -> tuple[int, int, int]:
    """Query heads, KV heads, KV heads."""
    return num_kv_heads * request.group, num_kv_heads, num_kv_heads


def _chunks(request: Request, window: Window, sizes: Sizes) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Tokens of a chunk, tokens of a slot, and for each input and row, where the chunk starts and how long it is."""
    past = sizes.decode if request.is_short else sizes.past
    room = _multiple(max(past, window.size + 2 * sizes.prefill))
    affordable = MOST_SCORES // (4 * 9 * request.group * (room + sizes.prefill))
    tokens = max(21, min(sizes.prefill, affordable))
    if request.is_short:
        tokens = max(1, min(tokens, SHORT_QUERIES // request.group))
    last = room - tokens
    start = [[0, 1, last], [window.size + 3, 7, window.size], [13, room // 2 + 1, 0], [window.sink, last - 5, 64]]
    lengths = [[tokens] * 3, [1, tokens - 7, tokens], [tokens // 2 + 1, 17, 2], [tokens, 0, tokens - 1]]
    rows = SHORT_ROWS if request.is_short else len(start[0])
    begins, counts = (np.array(x, np.int32)[:, :rows] for x in (start, lengths))
    return tokens, room, np.clip(begins, 0, last), np.clip(counts, 0, tokens)


def _rows(window: Window, sizes: Sizes) -> tuple[int, np.ndarray, np.ndarray]:
    """Tokens of a slot, and how many of them are filled, for each input and row."""
    room, ring = _multiple(max(sizes.decode, 2 * window.size)), window.size
    filled = [[1, room, 17, room // 2 + 1], [ring, ring + 1, ring - 1, room - 1], [255, 256, 257, 3]]
    filled.append([window.sink, window.sink + 1, 2, room])
    return room, np.zeros((4, 4), np.int32), np.clip(np.array(filled, np.int32), 1, room)


def _multiple(tokens: int) -> int:
    """Rounded up to what devices can share."""
    unit = UNIT * SHARDS
    return -(-tokens // unit) * unit


def _slots(rng: np.random.Generator, is_retrieval: np.ndarray) -> tuple[np.ndarray, dict[bool, list[int | None]]]:
    """A slot for each head of each input, and the input that owns each slot of either pool; one slot has no owner."""
    slots = np.zeros(is_retrieval.shape, np.int32)
    owners: dict[bool, list[int | None]] = {}
    for is_full in (True, False):
        at = np.argwhere(is_retrieval == is_full)
        order = rng.permutation(len(at) + 1)[: len(at)]
        slots[tuple(at.T)] = order
        owners[is_full] = [None] * (len(at) + 1 if len(at) else 0)
        for (index, _), slot in zip(at, order, strict=True):
            owners[is_full][slot] = int(index)
    return slots, owners


def _pool(
    rng: np.random.Generator, request: Request, is_full: bool, slots: int, rows: int, room: int, values: bool
) -> Any:
    """Keys or values of one type of head, all of them finite."""
    assert request.window is not None
    dtype = (request.full if is_full else request.ring) or request.q
    shape = (slots, rows, room if is_full else request.window.size, request.head_dim)
    blank = empty((1, request.head_dim), dtype, values=values)
    numbers = _normal(rng, shape, "float32")
    if values and is_full:
        is_edge = np.isin(np.arange(room) % EDGE, (0, EDGE - 1))
        numbers = numbers * jnp.asarray(np.where(is_edge, LOUD, 1.0), jnp.float32)[None, None, :, None]
    return jax.jit(lambda x: store(x, blank))(numbers) if slots else empty(shape, dtype, values=values)


def _hidden(window: Window, owners: list[int | None], before: np.ndarray, room: int, is_full: bool) -> np.ndarray:
    """Which entries `[P, B, S, 1]` of a pool no head may read."""
    index = np.arange(room if is_full else window.size)
    everything = np.ones((before.shape[1], len(index)), bool)
    # The entries of a ring fill in order, and then are written again.
    filled = [everything if owner is None else index >= before[owner][:, None] for owner in owners]
    return (np.stack(filled) if filled else np.zeros((0, *everything.shape), bool))[..., None]


def poisoned(pool: Any, where: Any) -> Any:
    """NaN where nothing may be read: as numbers, or as scales of quantized ones; `where` is broadcast."""
    if isinstance(pool, Quantized):
        nan = jnp.uint32(0x7FC00000)
        return Quantized(pool.words, jnp.where(where, nan, pool.grid), pool.head_dim, pool.bits)
    return jnp.where(where, jnp.asarray(jnp.nan, pool.dtype), pool)


def _arranged(request: Request, pools: list[Any]) -> tuple[Pools, ...]:
    """As the cache of the request stores them: in pages in any order, or the tokens of each device by themselves."""
    if request.is_sharded:
        return tuple(
            Pools(*(jax.tree.map(lambda x, i=i: x[:, :, i::SHARDS], pool) for pool in pools[:2]), *pools[2:])
            for i in range(SHARDS)
        )
    if request.page is None:
        return (Pools(*pools),)
    (_, rows, room), page = pools[0].shape[:3], keys_of_page(request.page)
    pages = np.random.default_rng(1).permutation(rows * room // page).astype(np.int32)

    def paged(x: Any) -> Any:
        in_order = x.reshape(x.shape[0], rows * room // page, page, *x.shape[3:])
        return in_order[:, np.argsort(pages)]

    full = (jax.tree.map(paged, pool) for pool in pools[:2])
    return (Pools(*full, *pools[2:])._replace(pages=jnp.asarray(pages.reshape(rows, -1))),)


def _in_order(parts: tuple[Pools, ...]) -> Iterator[Any]:
    """What `_arranged` arranged; of several devices, the first one's rings."""
    if len(parts) > 1:
        for pools in zip(*(part.full for part in parts), strict=True):
            yield jax.tree.map(lambda *x: lax.collapse(jnp.stack(x, 3), 2, 4), *pools)
    elif (pages := parts[0].pages) is not None:
        for pool in parts[0].full:
            yield jax.tree.map(lambda x: lax.collapse(x[:, pages], 2, 4), pool)
    else:
        yield from parts[0].full
    yield from parts[0].ring


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    # Drawn on the host: jax would compile a program for each shape.
    return jax.device_put(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _outputs(outputs: Any) -> list[np.ndarray]:
    """On the host, in float64."""
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in outputs]
