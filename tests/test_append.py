"""The token of a decode step in the pools: the kernel, interpreted, writes what XLA writes, and nothing else."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Heads, Pools, TokenShards, Window, append_token, ops
from pallas_kernels.quantized import Quantized, empty
from pallas_kernels.types import Backend
from tests.stored import read, store

WINDOW = Window(3, 7)
# Tokens at the first entry, in the sinks, after wraps of the ring; a row that is not active, and one without room.
STARTS, ACTIVE = (0, 2, 17, 9, 10, 24), (True, True, True, True, False, True)
PAGES = ((4, -1, -1), (6, 0, -1), (1, 5, 3), (2, -1, -1), (7, 8, -1), (9, 10, 11))


class Case(NamedTuple):
    """How pools and new keys are stored; slots of a type that no head has are left out."""

    full: str | None
    ring: str | None
    head_dim: int
    dtype: str
    is_paged: bool = False
    shards: int = 1
    is_exact: bool = False


CASES = {
    "bfloat16": Case("bfloat16", "bfloat16", 24, "bfloat16"),
    "float32_in_pages_of_bfloat16": Case("bfloat16", "float32", 16, "float32", is_paged=True),
    "shared_by_devices": Case("float32", "float32", 16, "float32", shards=2),
    "int4_bfloat16_rings": Case("int4", "bfloat16", 64, "bfloat16", is_exact=True),
    "int8_in_pages_int4_rings": Case("int8", "int4", 32, "float32", is_paged=True),
    "streaming_only": Case(None, "int8", 16, "float32", is_exact=True),
    "retrieval_only": Case("int4", None, 128, "float32"),
}


class Problem:
    """Pools full of random numbers, and a new token of each row."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, np.random.default_rng(0)
        kinds = [kind for kind in (True, False) if (case.full if kind else case.ring)]
        is_retrieval = np.array([kinds[i % len(kinds)] for i in range(4)])
        slot = np.zeros(4, np.int32)
        for kind in kinds:
            here = np.flatnonzero(is_retrieval == kind)
            slot[here] = self.rng.permutation(len(here) + 1)[: len(here)]
        self.heads = Heads(jnp.asarray(is_retrieval), jnp.asarray(slot))
        rows, count = len(STARTS), 5 if len(kinds) == 1 else 3
        full = (12, 8) if case.is_paged else (rows, 24 // case.shards)
        shapes = ((case.full, full), (case.ring, (rows, WINDOW.size)))
        stored = (
            store(
                jnp.asarray(self.normal(count if dtype else 0, *shape, case.head_dim), jnp.float32),
                empty((1, case.head_dim), dtype or "float32", values=values),
            )
            for dtype, shape in shapes
            for values in (False, True)
        )
        self.pools = Pools(*stored, jnp.asarray(PAGES, jnp.int32) if case.is_paged else None)
        self.k, self.v = (jnp.asarray(self.normal(rows, 4, case.head_dim), case.dtype) for _ in "kv")

    def normal(self, *shape: int) -> np.ndarray:
        """Random numbers; exact ones have few bits, so that any order of sums gives the same."""
        numbers = self.rng.normal(size=shape)
        return np.round(numbers * 16) / 16 if self.case.is_exact else numbers

    def append(self, backend: str, *, is_jitted: bool = True) -> list[Pools]:
        """The pools of each device after the token."""
        rows: dict[str, Any] = {"start": jnp.asarray(STARTS, jnp.int32), "active": jnp.asarray(ACTIVE)}
        run: Any = partial(append_token, window=WINDOW, backend=backend)
        run = jax.jit(run, static_argnames="shards") if is_jitted else run
        count = self.case.shards
        shards = [TokenShards("tokens", count, number) if count > 1 else None for number in range(count)]
        return [run(self.pools, self.heads, self.k, self.v, **rows, shards=each) for each in shards]

    def check(self, found: list[Pools]) -> None:
        """Compare pools with those that XLA writes."""
        for new, expected in zip(found, self.append("xla"), strict=True):
            for pool, wanted, before in zip(new.stored, expected.stored, self.pools.stored, strict=True):
                numbers, old = (np.asarray(jax.tree.leaves(x)[0], np.float32) for x in (wanted, before))
                # Three to six of the rows have a token that is written, for each head of this type.
                count = len(numbers) - 1
                changed = (numbers != old).any(-1).sum()
                assert count * (1 if self.case.shards > 1 else 3) <= changed <= count * 6 or not len(numbers)
                if not isinstance(wanted, Quantized) or self.case.is_exact:
                    jax.tree.map(np.testing.assert_array_equal, pool, wanted)
                    continue
                # Sums in another order: a number that is half-way between two steps may be rounded to either.
                steps = 2**wanted.bits - 1
                pool, wanted = (np.asarray(read(x, jnp.dtype("float32"))) for x in (pool, wanted))
                differs = np.abs(pool - wanted) > 1e-6
                assert differs.mean() < 1e-3 and np.abs(pool - wanted).max() < 2 * np.abs(wanted).max() / steps


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_writes_what_xla_writes(case):
    problem = Problem(case)
    problem.check(problem.append("triton"))


def test_inactive_rows_other_slots_and_other_pages_keep_their_bits():
    """Entry by entry, as a plain loop says."""
    problem = Problem(CASES["float32_in_pages_of_bfloat16"])
    (new,) = problem.append("triton")
    expected = [np.asarray(pool).copy() for pool in problem.pools.stored]
    for row, (start, active) in enumerate(zip(STARTS, ACTIVE, strict=True)):
        for head, (kind, slot) in enumerate(zip(*map(np.asarray, problem.heads), strict=True)):
            if not active:
                continue
            if not kind:
                at, pools = (slot, row, start if start < 3 else 3 + (start - 3) % 7), expected[2:]
            elif start >= 24 or PAGES[row][start // 8] < 0:
                continue
            else:
                at, pools = (slot, PAGES[row][start // 8], start % 8), expected[:2]
            for pool, x in zip(pools, (problem.k, problem.v), strict=True):
                pool[at] = np.asarray(x[row, head]).astype(pool.dtype)
    for pool, wanted in zip(new.stored, expected, strict=True):
        np.testing.assert_array_equal(pool, wanted)


def test_a_named_backend_without_a_kernel_writes_as_xla(monkeypatch, annotations_off):
    """Its attention is its own; one that has a kernel, and refuses, is reported."""
    problem = Problem(CASES["bfloat16"])
    (expected,) = problem.append("xla")
    for name in ("cudnn", "jax_triton"):
        jax.tree.map(np.testing.assert_array_equal, problem.append(name)[0], expected)
    monkeypatch.setenv("DUO_BACKEND", "mosaic")
    rows = {"start": jnp.asarray(STARTS, jnp.int32), "active": jnp.asarray(ACTIVE)}
    found = append_token(problem.pools, problem.heads, problem.k, problem.v, **rows, window=WINDOW)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    odd = Backend("odd", lambda request: "takes no tokens", append=lambda *_, **__: None)
    monkeypatch.setattr(ops, "find_backend", lambda name: odd)
    with pytest.raises(NotImplementedError, match="the odd backend takes no tokens"):
        append_token(problem.pools, problem.heads, problem.k, problem.v, **rows, window=WINDOW, backend="odd")
    with pytest.raises(ValueError, match=r"k and v must be \[B, K, H\]"):
        append_token(problem.pools, problem.heads, problem.k, problem.v[:, :2], **rows, window=WINDOW)
