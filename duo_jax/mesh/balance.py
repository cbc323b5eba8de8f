"""Which device holds which KV head, so that all hold as many retrieval heads. Arithmetic on head tables alone.

The rule: in every layer, each of `tensor` devices gets as many retrieval heads as the others, and those that are left
over go, one each, to the devices whose turn it is; turns go round through all layers. So the devices' numbers differ by
at most one, in every layer and over all of them, and a pool that is made as large as the fullest device needs wastes at
most one slot on each. Heads keep their order on a device. On one device nothing moves.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from duo_jax.cache.pools import number_slots


@dataclass(frozen=True)
class Balance:
    """The heads of a model on `tensor` devices.

    `C` columns: the KV heads of the first device, then those of the second, and so on. `K` of them, or, where there are
    more devices than KV heads, one for each device: a head then has several columns, which share its queries.

    Attributes:
        order: the KV head of each column.
        is_retrieval: head table, True where the column's head lies in the retrieval pool.
        slot: head table, the slot in its pool on its device.
        num_retrieval: retrieval heads of each device, over all layers.
    """

    order: Int32[np.ndarray, "L C"]
    is_retrieval: Bool[np.ndarray, "L C"]
    slot: Int32[np.ndarray, "L C"]
    num_retrieval: Int32[np.ndarray, "devices"]

    @property
    def retrieval_slots(self) -> int:
        """Slots of each device's retrieval pool: what the fullest needs."""
        return int(self.num_retrieval.max())

    @property
    def streaming_slots(self) -> int:
        """Slots of each device's streaming pool."""
        return self.order.size // len(self.num_retrieval) - int(self.num_retrieval.min())


def balance(is_retrieval: Bool[np.ndarray, "L K"], tensor: int) -> Balance:
    """Assign the KV heads of every layer to devices; `tensor` divides their number, or is a multiple of it."""
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
    by_device = np.split(table, tensor, axis=1)
    slot = np.concatenate([number_slots(part) for part in by_device], axis=1)
    return Balance(placed, table, slot, np.asarray([part.sum() for part in by_device], np.int32))


def query_heads(order: Int32[np.ndarray, "C"], num_heads: int, num_kv_heads: int) -> Int32[np.ndarray, "N"]:
    """The query head at each place, where the KV heads of a layer are ordered so; copies of one share its queries."""
    group, each = num_heads // num_kv_heads, num_heads // len(order)
    # The how-manieth copy of its head a column is.
    copy = np.asarray([(order[:column] == head).sum() for column, head in enumerate(order)], np.int32)
    first = order * group + copy * each
    return (first[:, None] + np.arange(each, dtype=np.int32)).ravel()
