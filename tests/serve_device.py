"""A device of the scheduler without arrays: pages hold the history of every token, so that wrong sharing is found.

A token depends on all tokens before it and on the request's seed, as a model's do.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from duo_jax.serve.device import Chosen
from duo_jax.serve.jobs import Action, Admit, Assign, Copy, Fill, First, Job, Load, Save, Step
from duo_jax.serve.requests import Likely
from duo_jax.serve.scheduler import Sizes

VOCABULARY = 90
# The numbers of a prompt that begins with this token are not finite from the length that its second token is.
POISON = 93


def after(history: int, token: int) -> int:
    """A number for a text that ends with a token."""
    return zlib.crc32(bytes([token]), history)


def history_of(tokens: list[int]) -> int:
    history = 0
    for token in tokens:
        history = after(history, token)
    return history


def next_token(history: int, seed: int) -> int:
    return 3 + zlib.crc32(b"next", history ^ seed) % VOCABULARY


def reply_of(prompt: list[int], seed: int, count: int) -> list[int]:
    """The reply to a prompt when it is served alone, computed without pages."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(history_of(tokens), seed))
    return tokens[len(prompt) :]


@dataclass
class Row:
    pages: list[int] = field(default_factory=list)
    length: int = 0
    history: int = 0
    token: int | None = None


class HistoryDevice:
    """Carries out actions. An entry of a page is the history up to its token; rings are a length and a history."""

    page_bytes, ring_bytes, full_bytes, dtype = 100, 30, 80, "float32"

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.filled = sizes, 0
        self.loaded: set[int] = set()  # Lengths of texts that were computed elsewhere.
        self.reset()

    def reset(self) -> None:
        """See `Device`."""
        sizes = self.sizes
        self.pages = [[-1] * sizes.page_size for _ in range(sizes.pages)]
        self.rows = [Row() for _ in range(sizes.rows)]
        self.snapshots: list[tuple[int, int] | None] = [None] * sizes.snapshots

    def do(self, action: Action) -> list[Chosen]:
        """See `Device`."""
        match action:
            case Admit(_, row, pages, snapshot):
                length, history = (0, 0) if snapshot is None else self.snapshots[snapshot]
                self.rows[row] = Row(list(pages), length, history)
            case Fill(row, tokens):
                start = self.rows[row].length
                assert 0 < len(tokens) <= self.sizes.chunk_size
                assert start % self.sizes.chunk_size == 0 or start in self.loaded, "chunks are cut at fixed positions"
                for token in tokens:
                    self._append(self.rows[row], token)
                self.filled += len(tokens)
            case Load(row, length, saved):
                for token in saved[:length]:
                    self._append(self.rows[row], token)
                self.loaded.add(length)
            case First(job, row, forced):
                assert self.rows[row].length == job.prompt
                return [self._choose(job, row, forced)]
            case Step(entries):
                assert len({entry.row for entry in entries}) == len(entries)
                for entry in entries:
                    self._append(self.rows[entry.row], self.rows[entry.row].token)
                return [self._choose(*entry) for entry in entries]
            case Assign(row, number, page):
                pages = self.rows[row].pages
                pages[number : number + 1] = [page]
            case Copy(source, target):
                self.pages[target] = list(self.pages[source])
            case Save(row, snapshot):
                self.snapshots[snapshot] = self.rows[row].length, self.rows[row].history
            case _:
                raise AssertionError(action)
        return []

    def compile(self) -> Iterator[str]:
        """See `Device`."""
        yield "step"

    def _append(self, row: Row, token: int) -> None:
        size, history = self.sizes.page_size, 0
        if row.length:  # What attention reads: the newest entry suffices, as each depends on all before it.
            history = self.pages[row.pages[(row.length - 1) // size]][(row.length - 1) % size]
        assert history == row.history, "the pages have the text of the rings"
        row.history = after(row.history, token)
        self.pages[row.pages[row.length // size]][row.length % size] = row.history
        row.length += 1

    def _choose(self, job: Job, number: int, forced: int | None) -> Chosen:
        row, request = self.rows[number], job.owner.request
        token = next_token(row.history, request.seed + job.owner.number)
        assert forced in (None, token), "a reply that is computed again is the same"
        row.token = token
        is_finite = request.prompt[0] != POISON or row.length < request.prompt[1]
        return Chosen(job, token, -float(token), (Likely(token, -float(token)),), is_finite)

    def check_pages(self, pages: list[int], tokens: list[int]) -> None:
        """Pages have these tokens, whoever wrote them and whoever else has them."""
        history, size = 0, self.sizes.page_size
        for place, token in enumerate(tokens):
            history = after(history, token)
            assert self.pages[pages[place // size]][place % size] == history
