"""The schedule of prefill as an array, for kernels that cannot call it: Triton's language is not Python.

A row is everything that a program must know of its work, see `pallas_kernels.schedule`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.schedule import Seen, Sizes
from pallas_kernels.works import Planned

SOURCES = ("full", "own", "ring")
# The fields of `Seen` that a kind of masked tile needs; a key's index counts from the first one of its source.
SEEN = {"full": ("leading",), "own": ("leading", "limit"), "ring": ("leading", "cut", "size", "limit")}


class Row(NamedTuple):
    """Fields of a work, int32: numbers of the first tile of each stretch (`Steps.stretches`), and of that after it."""

    row: Any
    head: Any
    kv_head: Any
    slot: Any
    tile: Any  # of queries
    part: Any
    is_used: Any  # whether it is a work, possibly one without a key
    tail_begin: Any  # of the full pool
    tail_end: Any
    diagonal_begin: Any  # of the chunk
    diagonal_end: Any
    sinks_begin: Any
    sinks_end: Any
    left_begin: Any
    left_end: Any
    ring_begin: Any
    ring_end: Any
    inner_begin: Any
    inner_end: Any
    whole_begin: Any  # of the full pool
    whole_end: Any
    full_leading: Any  # fields of `Seen`
    own_leading: Any
    own_limit: Any
    ring_leading: Any
    ring_cut: Any
    ring_size: Any
    ring_limit: Any


def table(plan: Planned, sizes: Sizes) -> Int32[Array, "W F"]:
    """A row for each work of a plan."""
    work, place = plan.work, plan.place
    is_retrieval = work.is_retrieval == 1
    begin, end = place.span_begin, place.span_end
    tiles, before = [], jnp.zeros_like(begin)
    for stretch in plan.steps.stretches:
        tiles += [stretch.first + jnp.clip(step - before, 0, stretch.tiles) for step in (begin, end)]
        before = before + stretch.tiles
    seen = {
        source: Seen.of(source, jnp.zeros_like(begin), place.start, is_retrieval, sizes, place.filled)
        for source in SOURCES
    }
    fields = [getattr(seen[source], name) for source in SOURCES for name in SEEN[source]]
    ids = work.row, work.head, place.kv_head, place.slot, work.tile, work.part, place.is_used
    row = Row(*ids, *tiles, *fields)
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in row], axis=1)
