"""ModelDevice: carries out the scheduler's actions with a model's compiled programs."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.cache.cache import NO_PAGE
from duo_jax.cache.spec import CacheSpec
from duo_jax.cache.store import Stored
from duo_jax.model.model import Model
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.serve.choice import Choice, Sampling
from duo_jax.serve.device import Chosen
from duo_jax.serve.jobs import Action, Admit, Assign, Copy, Fill, First, Load, Save, Step
from duo_jax.serve.programs import Programs, Snapshot, with_pages
from duo_jax.serve.requests import MOST_TOP, Likely
from pallas_kernels.gpus import device_kind

# Rows that a step computes at a time on a CPU. Two take as long as four, eight a third longer.
GROUP = 4


class ModelDevice:
    """A `Device`: weights, and rows of a paged cache."""

    def __init__(self, model: Model, spec: CacheSpec, chunk_size: int, *, backend: str | None = None) -> None:
        """Allocate the cache. A model stored `Model.by_output` computes a few rows of a step at a time.

        Raises:
            ValueError: it does not fit into memory.
        """
        self._model, is_grouped = model, model.decoder.is_by_output
        top = min(MOST_TOP, model.config.vocab_size)
        self._programs = Programs(chunk_size, top=top, backend=backend, group=GROUP if is_grouped else None)
        self._spec, self._snapshots = spec, dict[int, Snapshot]()
        self._start()
        self.dtype = model.dtype
        self.page_bytes, self.ring_bytes = page_bytes(spec), ring_bytes(spec)
        self.full_bytes = page_bytes(replace(spec, pattern=HeadPattern.full(spec.config))) // (spec.page_size or 1)

    def compile(self) -> Iterator[str]:
        """See `Device`."""
        yield from self._programs.compile(self._model, self._rows)
        _give_back()

    def reset(self) -> None:
        """See `Device`."""
        del self._rows  # Their memory is needed for the new ones.
        self._snapshots.clear()
        self._start()

    def _start(self) -> None:
        self._rows = self._programs.rows(self._model, self._spec)
        pages = self._rows.cache.pages
        assert pages is not None
        self._table = np.full(pages.shape, NO_PAGE, np.int32)
        self._is_table_new = True

    def do(self, action: Action) -> list[Chosen]:
        """See `Device`."""
        match action:
            case Admit():
                self._admit(action)
            case Fill(row, tokens):
                self._send_table()
                self._rows = self._programs.prefill(self._model, self._rows, row, np.asarray(tokens, np.int32))
            case Load(row, length, saved):
                self._load(row, length, saved)
            case First(_, row, forced):
                self._rows, choice = self._programs.first(self._model, self._rows, row, _number(forced))
                return _chosen(jax.device_get(choice), [(action, 0)])
            case Step(rows):
                return self._step(rows)
            case Assign(row, number, page):
                self._table[row, number], self._is_table_new = page, True
            case Copy(source, target):
                self._rows = self._programs.copy_page(self._rows, source, target)
            case Save(row, snapshot):
                self._snapshots[snapshot] = self._programs.snapshot(self._rows, row)
        return []

    def _admit(self, action: Admit) -> None:
        job, row, pages, snapshot = action
        request = job.owner.request
        self._table[row] = NO_PAGE
        self._table[row, : len(pages)] = pages
        self._is_table_new = True
        seen = np.zeros(self._model.config.vocab_size, bool)
        seen[job.tokens[: job.prompt]] = True
        penalties = {"presence": request.presence_penalty, "frequency": request.frequency_penalty}
        sampling = Sampling.of(request.sampling, **penalties)
        options: dict[str, Any] = {"seed": request.seed, "index": job.owner.number, "sampling": sampling, "seen": seen}
        self._rows = self._programs.admit(self._rows, row, **options)
        if snapshot is not None:
            self._rows = self._programs.restore(self._rows, row, self._snapshots[snapshot])

    def _load(self, row: int, length: int, saved: Stored) -> None:
        """Copy a cache of one row from the host page by page: the device has no second copy."""
        cache = self._rows.cache
        size = cache.full.k.shape[2]

        def page_of(number: int, pool: np.ndarray) -> np.ndarray:
            part = pool[:, :, number * size : min((number + 1) * size, length)]
            return np.pad(part, [(0, 0), (0, 0), (0, size - part.shape[2]), *((0, 0),) * (part.ndim - 3)])

        full, rings = saved.pools()
        for number, page in enumerate(self._table[row][: -(-length // size)].tolist() if len(full.k) else ()):
            keys = jax.tree.map(functools.partial(page_of, number), full)
            self._rows = self._programs.load_page(self._rows, page, keys)
        # Never read: a prompt that continues a prefix has at least one more token.
        last = np.zeros((1, self._model.config.embed_dim), self._model.dtype)
        snapshot = Snapshot(jax.tree.map(jnp.asarray, rings), jnp.asarray([length], jnp.int32), jnp.asarray(last))
        self._rows = self._programs.restore(self._rows, row, snapshot)

    def _step(self, rows: tuple[First, ...]) -> list[Chosen]:
        self._send_table()
        active = np.zeros(len(self._table), bool)
        forced = np.full(len(self._table), -1, np.int32)
        for entry in rows:
            active[entry.row], forced[entry.row] = True, _number(entry.forced)
        self._rows, choice = self._programs.step(self._model, self._rows, active, forced)
        return _chosen(jax.device_get(choice), [(entry, entry.row) for entry in rows])

    def _send_table(self) -> None:
        if self._is_table_new:
            self._rows = with_pages(self._rows, self._table)
            self._is_table_new = False


def in_groups(model: Model) -> bool:
    """Whether a step computes a few rows at a time, with weights `Model.by_output`.

    Elsewhere than on a CPU a step takes as long for one row as for several, and in other formats weights are converted
    each time that they are read: once for all rows.
    """
    return device_kind() == "cpu" and model.is_plain and model.dtype == jnp.float32


def page_bytes(spec: CacheSpec) -> int:
    """Bytes of keys and values of a page, on each device."""
    one, two = (replace(spec, num_pages=count).nbytes for count in (1, 2))
    return two - one


def ring_bytes(spec: CacheSpec) -> int:
    """Bytes of keys and values of a row's rings, on each device."""
    return (replace(spec, num_pages=1).nbytes - page_bytes(spec)) // spec.batch_size


def _give_back() -> None:
    """Give the memory that compilation took back to the system. glibc would keep it: 180 MB of four layers."""
    with suppress(AttributeError):  # Another C library.
        ctypes.CDLL(None).malloc_trim(0)


def _number(forced: int | None) -> int:
    return -1 if forced is None else forced


def _chosen(choice: Choice, entries: list[tuple[First, int]]) -> list[Chosen]:
    """The choice of each entry, which is in this row of the results."""
    chosen = []
    for entry, row in entries:
        count = entry.job.owner.request.top
        top = zip(choice.top[row, :count].tolist(), choice.top_logprobs[row, :count].tolist(), strict=True)
        numbers = int(choice.token[row]), float(choice.logprob[row])
        chosen.append(Chosen(entry.job, *numbers, tuple(Likely(*each) for each in top), bool(choice.is_finite[row])))
    return chosen
