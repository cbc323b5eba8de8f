"""RowGroups: rows of a batch that are computed a few at a time, by one program whose loop runs as often as needed.

A product or a sum may be computed in another order where there are more rows, so its last bits depend on their number.
Here each function always meets the same number of rows, and the number of groups is data: what a row computes does not
depend on how many others are computed, and rows that nobody needs cost nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

T = TypeVar("T")


# Calls a function of rows with its arguments.
ByRow: TypeAlias = Callable[..., Any]


def at_once(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, for all rows."""
    return function(*args)


class RowGroups(NamedTuple):
    """The rows to compute, as groups.

    Attributes:
        rows: number of each row, `[groups, G]`; of a group that is not full, the rest are numbers of no row.
        needed: how many groups are computed, the first ones; None: one group has all rows, in their order.
    """

    rows: Int32[Array, "groups G"]
    needed: Int32[Array, ""] | None

    @classmethod
    def of(cls, active: Bool[Array, "B"], size: int) -> "RowGroups":
        """Groups of `size` rows that contain all active ones; one group if there are no more rows than that."""
        batch = len(active)
        if size >= batch:
            return cls(jnp.arange(batch, dtype=jnp.int32)[None], None)
        order = jnp.argsort(~active, stable=True).astype(jnp.int32)
        rows = jnp.pad(order, (0, -batch % size), constant_values=batch).reshape(-1, size)
        return cls(rows, (active.sum(dtype=jnp.int32) + size - 1) // size)

    def apply(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, of which each row depends on that row of every argument; zeros in rows not computed."""
        if self.needed is None:
            return function(*args)
        shapes = jax.eval_shape(function, *args)
        return self.update(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), function, *args)

    def update(self, old: T, function: Callable[..., T], *args: Any) -> T:
        """Like `apply`; rows that are not computed are those of `old`."""
        if self.needed is None:
            return function(*args)

        def compute(number: Array, out: T) -> T:
            rows = self.rows[number]
            new = function(*jax.tree.map(lambda x: x.at[rows].get(mode="clip"), args))
            return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), out, new)

        return lax.fori_loop(jnp.int32(0), self.needed, compute, old)
