"""Global and shared memory as bytes, with shadows that say who wrote and read them. Knows no instruction.

Every access is by lanes of one block, at addresses `[L]`, of `width` numbers of `itemsize` bytes each.
"""

import numpy as np

# Addresses of global memory: beyond 32 bits, so that a truncated one is not in any array.
GLOBAL = 0x7F00_0000_0000
# XLA aligns arrays to that many bytes at least, and the compilers know it.
LEAST_ALIGNMENT = 16
# Bytes that belong to no array, between two.
GAP = 4096
# Of shared memory: a block's first KiB is the system's, from sm_80 on.
SHARED = 1024
# Shared memory that was never written; in a shadow of readers: no reader, more than one warp.
NEVER, NOBODY, MANY = 0, 0, 0xFFFF
# What a copy that has not landed yet leaves in the shadow of writers.
IN_FLIGHT = np.int64(1) << 62


class Fault(Exception):
    """What a GPU leaves undefined: the reason, and the lane that ran into it."""

    def __init__(self, reason: str, lane: int) -> None:
        super().__init__(reason, lane)
        self.reason, self.lane = reason, lane


def _refuse(is_wrong: np.ndarray, lanes: np.ndarray, reason: str) -> None:
    """A fault of the first lane for which something is wrong; `is_wrong` is `[L]` or `[L, n]`."""
    if is_wrong.any():
        raise Fault(reason, int(lanes[np.argmax(is_wrong.reshape(len(lanes), -1).any(1))]))


def _check_alignment(addresses: np.ndarray, lanes: np.ndarray, size: int) -> None:
    _refuse((addresses & (size - 1)) != 0, lanes, f"an access of {size} bytes that is not aligned")


class Global:
    """The arrays of a launch, each as little aligned as its parameter says.

    A byte is the host's, nobody's yet, or of the block that wrote it: blocks run in any order, so none may touch what
    another wrote.
    """

    HOST, NOBODY = -1, -2

    def __init__(self, inputs: list[np.ndarray], outputs: list[tuple[tuple[int, ...], np.dtype]], aligned) -> None:
        self.addresses, self.sizes, end = [], [], GAP
        sizes = [x.nbytes for x in inputs] + [int(np.prod(shape)) * dtype.itemsize for shape, dtype in outputs]
        for size, align in zip(sizes, (max(LEAST_ALIGNMENT, align) for align in aligned), strict=False):
            begin = -(-end // (2 * align)) * 2 * align + align
            self.addresses.append(GLOBAL + begin)
            self.sizes.append(size)
            end = begin + size + GAP
        # Numbers that were never written are NaN.
        self.bytes = np.full(-(-end // 16) * 16, 0xFF, np.uint8)
        self.is_array = np.zeros(self.bytes.shape, bool)
        self.owner = np.full(self.bytes.shape, self.NOBODY, np.int32)
        self._outputs = outputs
        for i in range(len(sizes)):
            at = self._at(i)
            self.is_array[at] = True
            if i < len(inputs):
                self.bytes[at] = np.ascontiguousarray(inputs[i]).reshape(-1).view(np.uint8)
                self.owner[at] = self.HOST

    def _at(self, i: int) -> slice:
        begin = self.addresses[i] - GLOBAL
        return slice(begin, begin + self.sizes[i])

    def outputs(self) -> list[np.ndarray]:
        """The arrays that the kernel writes."""
        first = len(self.addresses) - len(self._outputs)
        return [
            self.bytes[self._at(first + i)].copy().view(dtype).reshape(shape)
            for i, (shape, dtype) in enumerate(self._outputs)
        ]

    def _places(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        _check_alignment(addresses, lanes, size)
        at = addresses.astype(np.int64) - GLOBAL
        is_outside = (at < 0) | (at > len(self.bytes) - size)
        _refuse(is_outside | ~self.is_array[np.where(is_outside, 0, at)], lanes, "outside of every array")
        places = at[:, None] + np.arange(size)
        _refuse(~self.is_array[places], lanes, "over the end of an array")
        return places

    def load(self, addresses: np.ndarray, lanes: np.ndarray, size: int, block: int) -> np.ndarray:
        """Bytes `[L, size]`."""
        places = self._places(addresses, lanes, size)
        owner = self.owner[places]
        _refuse(owner == self.NOBODY, lanes, "reads what was never written")
        _refuse((owner != self.HOST) & (owner != block), lanes, "reads what another block writes")
        return self.bytes[places]

    def store(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray, block: int) -> None:
        """Write bytes `[L, size]`, each once: two lanes may write the same number to one place."""
        places = self._places(addresses, lanes, values.shape[1])
        owner = self.owner[places]
        _refuse(owner == self.HOST, lanes, "writes to an input")
        _refuse((owner >= 0) & (owner != block), lanes, "writes what another block writes")
        _refuse((owner == block) & (self.bytes[places] != values), lanes, "writes another number to the same place")
        self.bytes[places] = values
        self.owner[places] = block
        _refuse(self.bytes[places] != values, lanes, "writes another number to the same place as another lane")


class Shared:
    """A block's shared memory. Its shadows have a word for each two bytes, the smallest access.

    A stamp is the barrier that a block has passed, the barriers that a warp has passed by itself, and a lane. What a
    lane wrote, others may read after a barrier of both; what a warp read, others may overwrite after one of both.
    """

    GRAIN = 2

    def __init__(self, size: int, threads: int) -> None:
        self.words = np.full(-(-size // 16) * 8, 0xFFFF, np.uint16)
        self.size = size
        self.writer = np.full(self.words.shape, NEVER, np.int64)
        self.reader = np.full(self.words.shape, NOBODY, np.int64)
        self.epoch = 1
        self.warp_epoch = np.zeros(-(-threads // 32), np.int64)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.committed = np.zeros(threads, np.int64)

    def _places(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        _check_alignment(addresses, lanes, size)
        at = addresses.astype(np.int64) - SHARED
        _refuse((at < 0) | (at > self.size - size), lanes, f"outside of the block's {self.size} bytes of shared memory")
        return (at >> 1)[:, None] + np.arange(size // self.GRAIN)

    def _stamps(self, lanes: np.ndarray) -> np.ndarray:
        return ((self.epoch << 32) | (self.warp_epoch[lanes >> 5] << 16) | lanes)[:, None]

    def _check_writers(self, places: np.ndarray, lanes: np.ndarray, what: str) -> np.ndarray:
        """No other lane wrote there since a barrier of both."""
        writer = self.writer[places]
        _refuse(writer == IN_FLIGHT, lanes, f"{what} what a copy is still writing")
        is_now = (writer >> 32) == self.epoch
        if is_now.any():
            other = writer & 0xFFFF
            in_warp = (other >> 5) == (lanes >> 5)[:, None]
            is_earlier = in_warp & (((writer >> 16) & 0xFFFF) < self.warp_epoch[lanes >> 5][:, None])
            is_race = is_now & (other != lanes[:, None]) & ~is_earlier
            if is_race.any():
                _refuse(is_race, lanes, f"{what} what lane {other[is_race][0]} wrote, without a barrier between")
        return writer

    def _check_readers(self, places: np.ndarray, lanes: np.ndarray) -> None:
        """No other warp read there since a barrier of both."""
        reader = self.reader[places]
        is_race = ((reader >> 32) == self.epoch) & ((reader & 0xFFFF) != (lanes >> 5)[:, None])
        if is_race.any():
            warp = int(reader[is_race][0] & 0xFFFF)
            who = "several warps" if warp == MANY else f"warp {warp}"
            _refuse(is_race, lanes, f"writes what {who} read, without a barrier between")

    def load(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """Words `[L, size / 2]`."""
        places = self._places(addresses, lanes, size)
        writer = self._check_writers(places, lanes, "reads")
        _refuse(writer == NEVER, lanes, "reads shared memory that was never written")
        warp = np.broadcast_to((lanes >> 5)[:, None], places.shape)
        self._read_by(places, warp)
        return self.words[places]

    def _read_by(self, places: np.ndarray, warp: np.ndarray) -> None:
        old, new = self.reader[places], (self.epoch << 32) | warp
        self.reader[places] = np.where((old >> 32 == self.epoch) & (old != new), self.epoch << 32 | MANY, new)
        # Several warps in this access.
        differs = (self.reader[places] & 0xFFFF) != warp
        self.reader[places[differs]] = self.epoch << 32 | MANY

    def store(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        """Write words `[L, size / 2]`; two lanes may write the same number to one place."""
        places = self._places(addresses, lanes, 2 * values.shape[1])
        changes = ((self.words[places] != values) | (self.writer[places] == IN_FLIGHT)).any(1)
        self._check_writers(places[changes], lanes[changes], "overwrites")
        self._check_readers(places, lanes)
        self._write(places, lanes, values)
        _refuse(self.words[places] != values, lanes, "writes another number to the same place as another lane")

    def _write(self, places: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        self.words[places] = values
        self.writer[places] = self._stamps(lanes)

    def copy(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        """Begin an asynchronous copy of words `[L, size / 2]`; until it has landed, nothing may touch the place."""
        places = self._places(addresses, lanes, 2 * values.shape[1])
        self._check_writers(places, lanes, "overwrites")
        self._check_readers(places, lanes)
        self.writer[places] = IN_FLIGHT
        self.copies.append((self.committed[lanes], places, lanes, values))

    def commit(self, lanes: np.ndarray) -> None:
        """Later copies of these lanes belong to a new group."""
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, pending: int) -> None:
        """Let all groups of these lanes land but the newest `pending`."""
        waits = np.zeros(self.committed.shape, bool)
        waits[lanes] = True
        copies = []
        for group, places, by, values in self.copies:
            lands = waits[by] & (group < self.committed[by] - pending)
            self._write(places[lands], by[lands], values[lands])
            if not lands.all():
                copies.append((group[~lands], places[~lands], by[~lands], values[~lands]))
        self.copies = copies

    def barrier(self) -> None:
        """All lanes of the block have come here."""
        self.epoch += 1

    def warp_barrier(self, warps: np.ndarray) -> None:
        """All lanes of these warps have come here."""
        self.warp_epoch[warps] += 1
