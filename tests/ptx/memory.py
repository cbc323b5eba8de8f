"""Global and shared memory, with shadows that record who wrote and read each place. Knows no instruction.

An access is of lanes `[L]` at addresses `[L]`, all of one size in bytes, a power of two. Addresses are multiples of it,
so an array viewed as rows of that size has one row for each access. The smallest access has two bytes, a word: numbers
are passed as words `[L, size / 2]`, and shadows have an entry for each word.
"""

import numpy as np

# Addresses of global memory: beyond 32 bits, so that a truncated one is in no array.
GLOBAL = 0x7F00_0000_0000
# XLA aligns arrays to at least that many bytes, and its compilers rely on it.
LEAST_ALIGNMENT = 16
# Bytes between two arrays, which belong to neither.
GAP = 4096
# The address of shared memory: from sm_80 on, the system uses the first KiB of a block.
SHARED = 1024

# A stamp in a shadow of shared memory: barriers that the block has passed, barriers that the warp has passed by itself,
# and a lane or a warp of the block. The numbers of barriers have 25 bits each, lanes 12.
MOST_BARRIERS = (1 << 25) - 2
_WARP_EPOCH, _EPOCH = 12, 37
_LANES, _EPOCHS = (1 << 12) - 1, (1 << 25) - 1
# Was not written, or not read; was read by several warps; a copy was started and nobody has waited for it.
NEVER, MANY, IN_FLIGHT = 0, _LANES, np.int64(1) << 62


class Fault(Exception):
    """Behavior that PTX leaves undefined: the reason, and a lane that causes it."""

    def __init__(self, reason: str, lane: int) -> None:
        super().__init__(reason, lane)
        self.reason, self.lane = reason, lane


def _refuse(is_wrong: np.ndarray, lanes: np.ndarray, reason: str) -> None:
    """A fault of the first lane for which `is_wrong`, `[L]` or `[L, n]`, is true."""
    if is_wrong.any():
        raise Fault(reason, int(lanes[np.argmax(is_wrong.reshape(len(lanes), -1).any(1))]))


def _check_alignment(addresses: np.ndarray, lanes: np.ndarray, size: int) -> None:
    _refuse((addresses & np.uint64(size - 1)) != 0, lanes, f"an access of {size} bytes that is not aligned")


def _rows(array: np.ndarray, size: int) -> np.ndarray:
    """An array with an entry for each word as rows of `size` bytes of memory, a view."""
    return array.reshape(-1, size // 2)


class Global:
    """The arrays of a launch, each no better aligned than its parameter declares.

    A word belongs to the host, to the block that wrote it, or to nobody yet. Blocks run in any order, so none may touch
    what another writes.
    """

    HOST, NOBODY = -1, -2

    def __init__(
        self,
        inputs: list[np.ndarray],
        outputs: list[tuple[tuple[int, ...], np.dtype]],
        aligned: list[int],
        before: list[np.ndarray] | None = None,
    ) -> None:
        self.addresses, self.sizes, end = [], [], GAP
        sizes = [x.nbytes for x in inputs] + [int(np.prod(shape)) * dtype.itemsize for shape, dtype in outputs]
        for size, align in zip(sizes, (max(LEAST_ALIGNMENT, align) for align in aligned), strict=False):
            begin = -(-end // (2 * align)) * 2 * align + align
            self.addresses.append(GLOBAL + begin)
            self.sizes.append(size)
            end = begin + size + GAP
        # Numbers that were never written are NaN.
        self.bytes = np.full(-(-end // 16) * 16, 0xFF, np.uint8)
        self.words = self.bytes.view(np.uint16)
        self.is_array = np.zeros(self.bytes.shape, bool)
        self.owner = np.full(self.words.shape, self.NOBODY, np.int32)
        self._outputs = outputs
        # Nobody may read an output, whatever was in its place before.
        contents = [*inputs, *(before or ())]
        for i in range(len(sizes)):
            at = self._at(i)
            self.is_array[at] = True
            if i < len(contents):
                self.bytes[at] = np.ascontiguousarray(contents[i]).reshape(-1).view(np.uint8)
            if i < len(inputs):
                self.owner[at.start // 2 : -(-at.stop // 2)] = self.HOST

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
        """Indices of rows of `size` bytes."""
        _check_alignment(addresses, lanes, size)
        at = addresses.astype(np.int64) - GLOBAL
        is_outside = (at < 0) | (at > len(self.bytes) - size)
        _refuse(is_outside | ~self.is_array[np.where(is_outside, 0, at)], lanes, "outside of every array")
        # A gap is longer than any access, so no access begins in one array and ends in another.
        _refuse(~self.is_array[at + (size - 1)], lanes, "over the end of an array")
        return at // size

    def load(self, addresses: np.ndarray, lanes: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
        """Words `[L, size / 2]`, for lanes of `blocks [L]`."""
        places = self._places(addresses, lanes, size)
        owner = _rows(self.owner, size)[places]
        if not (owner == self.HOST).all():
            _refuse(owner == self.NOBODY, lanes, "reads what was never written")
            _refuse((owner != self.HOST) & (owner != blocks[:, None]), lanes, "reads what another block writes")
        return _rows(self.words, size)[places]

    def store(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray, blocks: np.ndarray) -> None:
        """Write words `[L, size / 2]`, each once: two lanes of a block may write the same number to one place."""
        size, block = 2 * values.shape[1], blocks[:, None]
        places = self._places(addresses, lanes, size)
        words, owners = _rows(self.words, size), _rows(self.owner, size)
        owner = owners[places]
        _refuse(owner == self.HOST, lanes, "writes to an input")
        _refuse((owner >= 0) & (owner != block), lanes, "writes what another block writes")
        _refuse((owner == block) & (words[places] != values), lanes, "writes another number to the same place")
        words[places] = values
        owners[places] = block
        _refuse(owners[places] != block, lanes, "writes what another block writes")
        _refuse(words[places] != values, lanes, "writes another number to the same place as another lane")


class Shared:
    """Shared memory of the blocks of a batch, one after the other.

    What a lane wrote, other lanes may read after a barrier of both. What a warp read, other warps may overwrite after
    a barrier of both. The shadows have the stamp of the last lane that wrote a word, and of the last warp that read it.
    """

    def __init__(self, size: int, threads: int, blocks: int = 1) -> None:
        self.size, stride = size, -(-size // 16) * 16
        self.words = np.full(blocks * stride // 2, 0xFFFF, np.uint16)
        self.writer = np.full(self.words.shape, NEVER, np.int64)
        self.reader = np.full(self.words.shape, NEVER, np.int64)
        # Barriers that blocks, and warps by themselves, have passed: [lane].
        self.epoch = np.ones(blocks * threads, np.int64)
        self.warp_epoch = np.zeros(blocks * threads, np.int64)
        self.lane = np.arange(blocks * threads) % threads
        self.begin = np.repeat(np.arange(blocks) * stride, threads)
        # Groups of copies that lanes have committed; started copies: their group, size, places, lanes and numbers.
        self.committed = np.zeros(blocks * threads, np.int64)
        self.copies: list[tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]] = []

    def _places(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """Indices of rows of `size` bytes."""
        _check_alignment(addresses, lanes, size)
        at = addresses.astype(np.int64) - SHARED
        _refuse((at < 0) | (at > self.size - size), lanes, f"outside of the block's {self.size} bytes of shared memory")
        return (self.begin[lanes] + at) // size

    def _check_writers(self, writer: np.ndarray, lanes: np.ndarray, verb: str) -> None:
        """No other lane wrote there since a barrier of both; `writer [L, n]` are stamps."""
        is_now = (writer >> _EPOCH) == self.epoch[lanes][:, None]
        if not is_now.any() and not (writer == IN_FLIGHT).any():
            return
        _refuse(writer == IN_FLIGHT, lanes, f"{verb} what a copy is still writing")
        lane, other = self.lane[lanes][:, None], writer & _LANES
        is_earlier = (writer >> _WARP_EPOCH & _EPOCHS) < self.warp_epoch[lanes][:, None]
        is_race = is_now & (other != lane) & ~((other >> 5 == lane >> 5) & is_earlier)
        if is_race.any():
            _refuse(is_race, lanes, f"{verb} what lane {other[is_race][0]} wrote, without a barrier between")

    def _check_readers(self, reader: np.ndarray, lanes: np.ndarray) -> None:
        """No other warp read there since a barrier of both; `reader [L, n]` are stamps."""
        is_race = ((reader >> _EPOCH) == self.epoch[lanes][:, None]) & (
            (reader & _LANES) != self.lane[lanes][:, None] >> 5
        )
        if is_race.any():
            warp = int(reader[is_race][0] & _LANES)
            readers = "several warps" if warp == MANY else f"warp {warp}"
            _refuse(is_race, lanes, f"overwrites what {readers} read, without a barrier between")

    def load(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """Words `[L, size / 2]`."""
        places = self._places(addresses, lanes, size)
        writer = _rows(self.writer, size)[places]
        self._check_writers(writer, lanes, "reads")
        _refuse(writer == NEVER, lanes, "reads shared memory that was never written")
        readers, epoch = _rows(self.reader, size), (self.epoch[lanes] << _EPOCH)[:, None]
        new, many, old = epoch | (self.lane[lanes] >> 5)[:, None], epoch | MANY, readers[places]
        readers[places] = np.where((old >> _EPOCH == new >> _EPOCH) & (old != new), many, new)
        # Where several warps read one place in this access, only one of them is recorded so far.
        is_other = readers[places] & _LANES != new & _LANES
        if is_other.any():
            row, column = np.nonzero(is_other)
            readers[places[row], column] = many[row, 0]
        return _rows(self.words, size)[places]

    def store(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        """Write words `[L, size / 2]`; two lanes may write the same number to one place."""
        size = 2 * values.shape[1]
        places = self._places(addresses, lanes, size)
        words, writer = _rows(self.words, size)[places], _rows(self.writer, size)[places]
        changes = ((words != values) | (writer == IN_FLIGHT)).any(1)
        self._check_writers(writer[changes], lanes[changes], "overwrites")
        self._check_readers(_rows(self.reader, size)[places], lanes)
        self._write(size, places, lanes, values)
        _refuse(
            _rows(self.words, size)[places] != values, lanes, "writes another number to the same place as another lane"
        )

    def _write(self, size: int, places: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        _rows(self.words, size)[places] = values
        stamps = self.epoch[lanes] << _EPOCH | self.warp_epoch[lanes] << _WARP_EPOCH | self.lane[lanes]
        _rows(self.writer, size)[places] = stamps[:, None]

    def copy(self, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        """Start an asynchronous copy of words `[L, size / 2]`; until it has landed, nothing may touch the place."""
        size = 2 * values.shape[1]
        places = self._places(addresses, lanes, size)
        self._check_writers(_rows(self.writer, size)[places], lanes, "overwrites")
        self._check_readers(_rows(self.reader, size)[places], lanes)
        _rows(self.writer, size)[places] = IN_FLIGHT
        self.copies.append((self.committed[lanes], size, places, lanes, values))

    def commit(self, lanes: np.ndarray) -> None:
        """Later copies of these lanes belong to a new group."""
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, pending: int) -> None:
        """Let all groups of these lanes land but the newest `pending`."""
        waits = np.zeros(self.committed.shape, bool)
        waits[lanes] = True
        copies = []
        for group, size, places, by, values in self.copies:
            lands = waits[by] & (group < self.committed[by] - pending)
            if lands.all():
                self._write(size, places, by, values)
                continue
            if lands.any():
                self._write(size, places[lands], by[lands], values[lands])
                group, places, by, values = (x[~lands] for x in (group, places, by, values))
            copies.append((group, size, places, by, values))
        self.copies = copies

    def need_no_copies(self, lanes: np.ndarray) -> None:
        """Refuse that lanes of the mask return while a copy of theirs has not landed.

        The manual gives a copy no other end than a wait: shared memory may have a new owner when it arrives.
        """
        for *_, by, _ in self.copies:
            _refuse(lanes[by], by, "returns before a copy has landed: nothing has waited for it")

    def barrier(self, lanes: np.ndarray) -> None:
        """These lanes, whole blocks, have arrived."""
        self.epoch[lanes] += 1

    def warp_barrier(self, lanes: np.ndarray) -> None:
        """These lanes, whole warps, have arrived."""
        self.warp_epoch[lanes] += 1
