"""Pool: numbered entries of a fixed pool, such as pages, and how many hold each. Knows no device and no tokens."""

from collections.abc import Iterable


class Pool:
    """The entries `0 .. size - 1`, each free or held one or more times.

    A page that several sequences share is held by each of them. Who writes to a page must be its only holder: see
    `is_shared`.
    """

    def __init__(self, size: int) -> None:
        """All entries are free."""
        self.size = size
        self._holders = [0] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Entries that nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Entries that somebody holds."""
        return self.size - len(self._free)

    def is_shared(self, entry: int) -> bool:
        """Whether there are several holders."""
        return self._holders[entry] > 1

    def holders(self, entry: int) -> int:
        """How many hold the entry."""
        return self._holders[entry]

    def take(self) -> int:
        """A free entry, which then has one holder.

        Raises:
            RuntimeError: none is free; the caller must know that one is.
        """
        if not self._free:
            raise RuntimeError(f"all {self.size} entries are held")
        entry = self._free.pop()
        self._holders[entry] = 1
        return entry

    def hold(self, entries: Iterable[int]) -> None:
        """Add a holder to each entry, all of which are held already.

        Raises:
            RuntimeError: an entry that is free, and may have lost its content.
        """
        for entry in entries:
            if not self._holders[entry]:
                raise RuntimeError(f"entry {entry} is free: only held entries can be shared")
            self._holders[entry] += 1

    def release(self, entries: Iterable[int]) -> None:
        """Remove a holder from each entry, which is free once nobody holds it.

        Raises:
            RuntimeError: an entry that is free already.
        """
        for entry in entries:
            if not self._holders[entry]:
                raise RuntimeError(f"entry {entry} is free already")
            self._holders[entry] -= 1
            if not self._holders[entry]:
                self._free.append(entry)
