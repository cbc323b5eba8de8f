"""Where the tokens of a retrieval slot are: in a row of the pool, or in the pages that a row's table lists.

Kernels ask once for each tile of keys, which never crosses a page.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.schedule import div
from pallas_kernels.tiles import tiles_of
from pallas_kernels.types import Request


def refused_pages(backend: str, request: Request) -> str | None:
    """The reason why a backend's kernels cannot run a request: even their smallest tile of keys would cross a page."""
    if request.page is None or request.full is None:
        return None
    # Without tiles of keys, any page will do.
    most = max((tiles.block_k for tiles in tiles_of(backend, request).values()), default=1)
    return f"takes pages that are a multiple of {most} tokens, got {request.page}" if request.page % most else None


def in_pool(table: Any, page: int, row: Array, begin: Array) -> tuple[Array, Array]:
    """The second and third index in a full pool of the tile that begins at token `begin` of a row.

    Args:
        table: a reference to the page table `[B, n]`; None: a row's tokens are contiguous, `[P, B, S, H]`.
        page: tokens of a page.
        row: of the batch.
        begin: a multiple of the tile's size.
    """
    if table is None:
        return row, begin
    number = div(begin, page)
    # An entry without a page is -1: a row that has tokens there gives NaN, and must not read outside of the pool.
    return jnp.maximum(table[row, number], jnp.int32(0)), begin - number * page
