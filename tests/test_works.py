"""Which tiles of keys the programs of prefill visit, which of them need a mask, and how many programs are busy."""

from itertools import product

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Heads, Window, works
from pallas_kernels.schedule import Seen, Sizes, steps_of
from pallas_kernels.works import Queries, Scope

WINDOW = Window(64, 256)


def planned(*, tokens, start, retrieval, cores=132, kv_heads=8, group=4, lengths=None):
    """The plan of a chunk of rows that begin at `start`, as numpy arrays [turns, programs], and its `Queries`."""
    q = jax.ShapeDtypeStruct((len(start), tokens, kv_heads * group, 128), jnp.bfloat16)
    queries = Queries.of(q, kv_heads, 128, 1 << 20)
    is_retrieval = jnp.arange(kv_heads) % 8 < retrieval
    heads = Heads(is_retrieval, jnp.zeros(kv_heads, jnp.int32))
    sizes = Sizes(-(-tokens // 128) * 128, queries.tile_tokens, 128, WINDOW)
    rows = {"start": jnp.asarray(start, jnp.int32), "lengths": jnp.asarray(lengths or [tokens] * len(start), jnp.int32)}
    plan = queries.plan(heads, queries.parts(heads), sizes, **rows, scope=Scope(rows["start"]))
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, queries.programs), plan), queries


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(works, "multiprocessors", lambda: 132)


@pytest.mark.parametrize("retrieval", range(1, 9))
def test_a_short_question_over_a_long_cache_keeps_the_multiprocessors_busy(retrieval, cores):
    plan, _ = planned(tokens=32, start=[1_000_000], retrieval=retrieval)
    steps = (plan.place.span_end - plan.place.span_begin).sum(axis=0)
    assert steps.sum() / (132 * steps.max()) >= 0.9


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 32, "start": [1_000_000]},
        {"tokens": 5, "start": [0, 3000], "lengths": [5, 2]},
        {"tokens": 300, "start": [10, 70_000, 0], "lengths": [300, 1, 200]},
    ],
)
def test_every_step_belongs_to_one_work(case, cores):
    plan, queries = planned(**case, retrieval=3)
    tiles, place, work = plan.steps, plan.place, plan.work
    total = tiles.whole + tiles.tail + tiles.ring + tiles.sinks + (tiles.inner - tiles.left) + (tiles.end - tiles.inner)
    steps = {}
    for index in zip(*np.nonzero(place.span_begin < place.span_end), strict=True):
        at = work.row[index], work.head[index], work.tile[index]
        steps.setdefault(at, []).append((place.span_begin[index], place.span_end[index], total[index]))
        assert place.span_masked[index] <= place.span_end[index]
    assert len(steps) == queries.rows * queries.heads * queries.tiles
    lengths = case.get("lengths", [case["tokens"]] * len(case["start"]))
    for (row, _, tile), parts in steps.items():
        parts.sort()
        if tile * 128 // queries.packed < lengths[row]:
            assert [begin for begin, _, _ in parts] == [0, *(end for _, end, _ in parts[:-1])]
            assert parts[-1][1] == parts[-1][2]
        else:  # Padding.
            assert all(end - begin == 1 for begin, end, _ in parts)


def test_long_chunks_are_not_split(cores):
    plan, queries = planned(tokens=8192, start=[100_000], retrieval=4)
    assert (queries.packed, queries.most_parts, plan.work.part.max()) == (1, 1, 0)
    steps = (plan.place.span_end - plan.place.span_begin).sum(axis=0)
    assert steps.sum() / (132 * steps.max()) >= 0.9


def test_packing_is_undone():
    q = jnp.arange(2 * 5 * 6 * 3, dtype=jnp.float32).reshape(2, 5, 6, 3)
    queries = Queries(2, 5, 2, 1, 3, 128, 4)
    np.testing.assert_array_equal(queries.unpack(queries.pack(q)), q)
    np.testing.assert_array_equal(queries.pack(q)[0, :, 1], q[0, :, 3:].reshape(15, 3))


@pytest.mark.parametrize("window", [Window(8, 24), Window(0, 16), Window(20, 40)])
def test_the_steps_show_each_visible_key_once(window):
    """All tiles of queries, with one rule of visibility for the full pool, the ring and the chunk."""
    length, block_q, block_k = 64, 16, 16
    sizes = Sizes(length, block_q, block_k, window)

    @jax.jit
    def tile(first, is_retrieval, start):
        """For each step: whether it exists and needs a mask, which keys are seen, and which ought to be."""
        steps = steps_of(first, start, is_retrieval, sizes)
        i, q = jnp.arange(block_k, dtype=jnp.int32), first + jnp.arange(block_q, dtype=jnp.int32)

        def step(number):
            is_full, is_ring, place = steps.place(number)
            index = place * block_k + i
            held = window.position_at(index, start)
            held = jnp.where(is_full, jnp.where(index < start, index, -1), jnp.where(is_ring, held, start + index))
            q_pos, held = (start + q)[:, None], held[None, :]
            sees = jnp.where(is_retrieval, held <= q_pos, window.visible(q_pos, held)) & (held >= 0)
            full, ring, own = (Seen.of(name, place, start, is_retrieval, sizes) for name in ("full", "ring", "own"))
            shown = Seen.either(is_full, full, is_ring, ring, own).mask(i, q, (block_q, block_k))
            # Where the kind of tile is known, the mask is the same.
            for seen, is_here in ((full, is_full), (ring, is_ring), (own, ~is_full & ~is_ring)):
                shown = shown & (~is_here | seen.mask(i, q, (block_q, block_k)))
            return number < steps.total, number < steps.masked, shown, sees

        return jax.vmap(step)(jnp.arange(24, dtype=jnp.int32))

    for start, is_retrieval, first in product([0, 3, 12, 29, 57, 144], (True, False), range(0, length, block_q)):
        exists, masked, shown, sees = map(np.asarray, tile(jnp.int32(first), jnp.bool_(is_retrieval), jnp.int32(start)))
        np.testing.assert_array_equal(shown[exists], sees[exists])
        assert sees[exists & ~masked].all() and not exists[-1]
        q, keys = start + np.arange(first, first + block_q)[:, None], np.arange(start + length)[None, :]
        visible = (keys <= q) & (is_retrieval | (keys < window.sink) | (keys > q - window.recent))
        assert sees[exists].sum() == visible.sum()


@pytest.mark.parametrize("source", ["full", "ring", "own", None])
def test_no_integers_of_a_mask_have_a_constant_as_their_first_choice(source):
    """Mosaic would compare them without their sign: in `where(..., -5, x) < 3`, -5 is large."""

    def mask(*at):
        *at, i, q = at
        sizes = Sizes(64, 16, 16, Window(8, 24))
        full, ring, own = (Seen.of(name, *at, sizes) for name in ("full", "ring", "own"))
        either = Seen.either(at[2], full, at[2], ring, own)
        return {"full": full, "ring": ring, "own": own, None: either}[source].mask(i, q, (16, 16))

    def choices(jaxpr, is_constant):
        """Whether the first choice is one, for each choice among integers; which results are constants."""
        known, found = dict(zip(jaxpr.invars, is_constant, strict=True)), []
        for eqn in jaxpr.eqns:
            constant = [isinstance(x, jax.extend.core.Literal) or not x.aval.ndim or known[x] for x in eqn.invars]
            if inner := eqn.params.get("jaxpr"):
                of_inner, results = choices(inner.jaxpr, constant)
                found += of_inner
            else:
                results = [all(constant)] * len(eqn.outvars)
            known.update(zip(eqn.outvars, results, strict=True))
            if eqn.primitive.name == "select_n" and eqn.outvars[0].aval.ndim and eqn.outvars[0].aval.dtype == jnp.int32:
                found.append(constant[2])
        return found, [isinstance(x, jax.extend.core.Literal) or known[x] for x in jaxpr.outvars]

    scalar, indices = jnp.int32(3), jnp.arange(16, dtype=jnp.int32)
    jaxpr = jax.make_jaxpr(mask)(scalar, scalar, jnp.bool_(True), indices, indices).jaxpr
    found, _ = choices(jaxpr, [not x.aval.ndim for x in jaxpr.invars])
    assert not any(found) and bool(found) == (source != "full")


def test_stretches_are_the_runs_in_pieces():
    """The same tiles in the same order, for kernels that cannot compute a tile from its step."""
    rng = np.random.default_rng(0)
    for first, start, filled, is_retrieval in zip(*rng.integers(0, 900, (3, 16)), rng.random(16) < 0.5, strict=True):
        sizes = Sizes(1000, 128, 32, Window(*map(int, rng.integers(1, 200, 2))))
        place = jnp.int32(first // 128 * 128), jnp.int32(start), jnp.bool_(is_retrieval)
        steps = steps_of(*place, sizes, filled=jnp.int32(filled))
        expected = [
            (run.source, run.is_masked, number)
            for run in steps.runs
            for number in steps.tile(run, jnp.arange(run.begin, run.end, dtype=jnp.int32)).tolist()
        ]
        found = [
            (each.source, each.is_masked, int(each.first) + i) for each in steps.stretches for i in range(each.tiles)
        ]
        assert found == expected and len(found) == steps.total
