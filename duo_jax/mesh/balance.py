"""Assigns KV heads to devices so that all have the same number of retrieval heads. Arithmetic on head tables only.

In every layer, each of `tensor` devices gets the same number of retrieval heads. Those left over go to devices in turn,
one each, and turns continue through all layers. So the devices' numbers differ by at most one, in every layer and in
total, and a full pool that is sized for the device with the most heads wastes at most one slot on each. Heads keep
their order on a device. On one device nothing moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32


@dataclass(frozen=True)
class Balance:
    """The heads of a model on `tensor` devices.

    The table has `C` columns: the KV heads of the first device, then those of the second, and so on. There are `K` of
    them or, with more devices than KV heads, one for each device: a head then has several columns, which share its
    queries.

    Attributes:
        order: the KV head of each column.
        is_retrieval: head table, True where the column's head is in the full pool.
        slot: head table, the slot in its pool on its device.
        num_retrieval: retrieval heads of each device, over all layers.
        ring_slots: slots of each ring pool of a device: as many as the device with the most such heads needs.
    """

    order: Int32[np.ndarray, "L C"]
    is_retrieval: Bool[np.ndarray, "L C"]
    slot: Int32[np.ndarray, "L C"]
    num_retrieval: Int32[np.ndarray, "devices"]
    ring_slots: tuple[int, ...]

    @property
    def retrieval_slots(self) -> int:
        """Slots of each device's full pool: as many as the device with the most retrieval heads needs."""
        return int(self.num_retrieval.max())

    @property
    def streaming_slots(self) -> int:
        """Slots of all ring pools of a device."""
        return sum(self.ring_slots)


def balance(is_retrieval: Bool[np.ndarray, "L K"], tensor: int, rings: Sequence[int] | None = None) -> Balance:
    """Assign the KV heads of every layer to devices.

    Args:
        is_retrieval: head table of the model.
        tensor: devices; it divides the KV heads of a layer, or is a multiple of their number.
        rings: for each layer, which ring pool its streaming heads use; by default all use one.
    """
    rings = (0,) * len(is_retrieval) if rings is None else rings
    copies = max(1, tensor // is_retrieval.shape[1])
    heads = np.repeat(np.arange(is_retrieval.shape[1], dtype=np.int32), copies)
    each, turn, order = len(heads) // tensor, 0, []
    for row in is_retrieval:
        full, rest = heads[row[heads]], heads[~row[heads]]
        counts = np.full(tensor, len(full) // tensor)
        counts[(turn + np.arange(len(full) % tensor)) % tensor] += 1
        turn = (turn + len(full)) % tensor
        ends, others = np.cumsum(counts), np.cumsum(each - counts)
        parts = zip(np.split(full, ends[:-1]), np.split(rest, others[:-1]), strict=True)
        order.append(np.concatenate([np.sort(np.concatenate(part)) for part in parts]))
    placed = np.stack(order)
    table = np.take_along_axis(is_retrieval, placed, axis=1)
    # The pool of each head: 0 is the full pool, then the rings.
    pools = np.split(np.where(table, 0, 1 + np.asarray(rings)[:, None]), tensor, axis=1)
    counts = np.asarray([np.bincount(part.ravel(), minlength=2 + max(rings)) for part in pools], np.int32)
    slot = np.concatenate([_number_slots(part) for part in pools], axis=1)
    return Balance(placed, table, slot, counts[:, 0], tuple(int(n) for n in counts[:, 1:].max(0)))


def _number_slots(pool: np.ndarray) -> np.ndarray:
    """Slots are numbered within each pool, layer by layer."""
    slot = np.zeros(pool.shape, np.int32)
    for number in np.unique(pool):
        slot[pool == number] = np.arange((pool == number).sum(), dtype=np.int32)
    return slot


def query_heads(order: Int32[np.ndarray, "C"], num_heads: int, num_kv_heads: int) -> Int32[np.ndarray, "N"]:
    """The query head at each place when the KV heads of a layer are in this order; copies of one share its queries."""
    group, each = num_heads // num_kv_heads, num_heads // len(order)
    # Index of each column among the copies of its head.
    copy = np.asarray([(order[:column] == head).sum() for column, head in enumerate(order)], np.int32)
    first = order * group + copy * each
    return (first[:, None] + np.arange(each, dtype=np.int32)).ravel()
