"""The device programs of a server: rows of one paged cache are filled, continued, copied. Knows no request and no text.

Each is pure and jitted, donates the rows, and has one shape, so that all are compiled before the first request. The
page table is the host's: `with_pages` replaces it between calls.

What a row computes does not depend on the others. A chunk of a prompt is computed by itself, in a program of one row.
A decode step is one program, in which no operation mixes rows. It computes all rows at once or, on a CPU, four at a
time, in as many groups as the active rows need. So a row meets the same arithmetic whatever its neighbours do, and a
reply by itself does not wait for all rows. A row's place may matter to the last bit on some devices, never to what it
sees.

    rows = programs.rows(spec)
    rows = programs.admit(rows, 3, seed=7, sampling=Sampling.of(settings), seen=seen)
    rows = with_pages(rows, table)                       # row 3 has pages for its prompt
    rows = programs.prefill(model, rows, 3, chunk)       # once for each chunk
    rows, choice = programs.first(model, rows, 3)        # the first token of the reply
    rows, choice = programs.step(model, rows, active)    # the next token of every active row
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32
from numpy.typing import ArrayLike

from duo_jax import pytree
from duo_jax.cache.cache import RING_AXES, KeyValues, KVCache
from duo_jax.cache.spec import CacheSpec
from duo_jax.generation import infer
from duo_jax.generation.token_loop import row_keys
from duo_jax.mesh.mesh import place
from duo_jax.model.model import Model
from duo_jax.model.row_groups import RowGroups
from duo_jax.serve.choice import Choice, Drawn, Sampling, choose

T = TypeVar("T")

# The mesh axis that divides rows, of which a paged cache has one device.
ROW_AXES = PartitionSpec("data")


@pytree.register(arrays=("cache", "last", "token", "drawn", "sampling"), static=())
@dataclass(frozen=True)
class Rows:
    """The rows of a server: everything on the device besides weights. The programs donate it.

    Attributes:
        cache: keys and values; of a row in use, all tokens but its newest one, `token`.
        last: hidden state of the newest token of each row's prompt, from which `first` chooses.
        token: newest token of each row that decodes.
        drawn: what the choice of tokens depends on.
        sampling: how each row chooses.
    """

    cache: KVCache
    last: Float[Array, "B D"]
    token: Int32[Array, "B"]
    drawn: Drawn
    sampling: Sampling


@pytree.register(arrays=("rings", "length", "last"), static=())
@dataclass(frozen=True)
class Snapshot:
    """A row at one point of its text, of constant size: with the pages up to there, another row can go on from it.

    Attributes:
        rings: keys and values of streaming heads, `[P, 1, window.size, H]`.
        length: tokens in the cache.
        last: hidden state of the newest one.
    """

    rings: tuple[KeyValues, ...]
    length: Int32[Array, "1"]
    last: Float[Array, "1 D"]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, over all devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def with_pages(rows: Rows, pages: ArrayLike) -> Rows:
    """The rows with another page table; see `KVCache.with_pages`."""
    return replace(rows, cache=rows.cache.with_pages(pages))


@dataclass(frozen=True)
class Programs:
    """The programs of one server. Hashable, so that it is static under jit.

    Attributes:
        chunk: tokens of a prompt that are computed at a time.
        top: most likely tokens whose log-probabilities `first` and `step` return.
        backend: attention backend; None takes the fastest one that is right on this device.
        group: rows that a decode step computes at a time, of those that are active; None: all.
    """

    chunk: int
    top: int = 20
    backend: str | None = None
    group: int | None = None

    def rows(self, model: Model, spec: CacheSpec) -> Rows:
        """Rows without text, in a new cache.

        Raises:
            ValueError: a cache without pages, or one that does not fit into memory.
        """
        if spec.page_size is None:
            raise ValueError("a server's cache has pages: give CacheSpec a page_size, and num_pages")
        cache = spec.empty()
        batch, config = cache.batch_size, model.config
        zeros = functools.partial(np.zeros, batch)
        sampling = Sampling(*(np.repeat(np.asarray(x), batch) for x in Sampling.of()))
        seen = np.zeros((batch, config.vocab_size), bool)
        last = np.zeros((batch, config.embed_dim), model.dtype)
        drawn = Drawn(jax.random.key_data(row_keys(0, np.arange(batch))), seen, seen.astype(np.int32))
        state = (last, zeros(np.int32), drawn, sampling)
        last, token, drawn, sampling = jax.tree.map(lambda x: _on_devices(model, np.asarray(x)), state)
        return Rows(cache, last, token, drawn._replace(keys=jax.random.wrap_key_data(drawn.keys)), sampling)

    def admit(
        self,
        rows: Rows,
        row: int,
        *,
        seed: int = 0,
        index: int = 0,
        sampling: Sampling = Sampling.of(),
        seen: Bool[np.ndarray, "V"] | None = None,
        counts: Int[np.ndarray, "V"] | None = None,
    ) -> Rows:
        """Prepare a row for a request, without tokens; also what frees a row.

        Args:
            rows: the rows; they are donated.
            row: its number.
            seed: of its random draws. With the same seed and text, the draws are those of row `index` of `generate`.
            index: the number of the reply, where several are drawn for one prompt.
            sampling: how it chooses.
            seen: tokens of its prompt, for a repetition penalty.
            counts: how often each token was generated already, for the other penalties.
        """
        size = rows.drawn.seen.shape[1]
        seen = np.zeros(size, bool) if seen is None else seen
        counts = np.zeros(size, np.int32) if counts is None else counts.astype(np.int32)
        return _admit(rows, np.int32(row), _drawn(seed, index, seen, counts), sampling)

    def prefill(self, model: Model, rows: Rows, row: int, tokens: Int[np.ndarray, "n"]) -> Rows:
        """Append up to `chunk` tokens of a prompt to one row, which needs pages for them.

        Two rows that get the same chunks, cut at the same positions, compute the same bits.

        Args:
            model: the weights.
            rows: the rows; they are donated.
            row: the number of one.
            tokens: from 1 to `chunk` token ids, from the position where the row's text ends.
        """
        padded = np.zeros(self.chunk, np.int32)
        padded[: len(tokens)] = tokens
        return _prefill(self, model, rows, np.int32(row), padded, np.int32(len(tokens)))

    def first(self, model: Model, rows: Rows, row: int, forced: int = -1) -> tuple[Rows, Choice]:
        """Choose the token after a row's prompt; see `step`. The result is of one row."""
        return _first(self, model, rows, np.int32(row), np.int32(forced))

    def step(
        self,
        model: Model,
        rows: Rows,
        active: Bool[np.ndarray, "B"],
        forced: Int32[np.ndarray, "B"] | None = None,
    ) -> tuple[Rows, Choice]:
        """Append the newest token of every active row, which needs a page for it, and choose the next one.

        Args:
            model: the weights.
            rows: the rows; they are donated.
            active: the rows that decode; the others do not change, and their choice is meaningless.
            forced: tokens to take instead of the rows' own choice, which is negative: a reply that is computed again
                passes through the same programs, and so through the same bits.
        """
        forced = np.full(len(active), -1, np.int32) if forced is None else forced
        return _step(self, model, rows, active, forced)

    def snapshot(self, rows: Rows, row: int) -> Snapshot:
        """A copy of what a row has besides its pages; the rows are not donated."""
        return _snapshot(rows, np.int32(row))

    def restore(self, rows: Rows, row: int, snapshot: Snapshot) -> Rows:
        """Continue a row, which was admitted and has the same pages, from a snapshot of any row."""
        return _restore(rows, np.int32(row), snapshot)

    def load_page(self, rows: Rows, page: int, keys: KeyValues) -> Rows:
        """Write the keys and values of one page, `[P, 1, page, H]`, which were computed elsewhere."""
        return _load_page(rows, np.int32(page), keys)

    def copy_page(self, rows: Rows, source: int, target: int) -> Rows:
        """Copy a page, before a row writes to one that others have too."""
        return _copy_page(rows, np.int32(source), np.int32(target))

    def compile(self, model: Model, rows: Rows) -> Iterator[str]:
        """Compile all programs without running them; the name of each, before it is compiled."""
        row, one = np.int32(0), np.int32(-1)
        unseen = np.zeros(rows.drawn.seen.shape[1], bool)
        drawn, sampling = _drawn(0, 0, unseen, unseen.astype(np.int32)), Sampling.of()
        active, forced = np.zeros(len(rows.token), bool), np.full(len(rows.token), -1, np.int32)
        yield "admit"
        infer.compiled(_admit, rows, row, drawn, sampling)
        yield "prefill"
        infer.compiled(_prefill, self, model, rows, row, np.zeros(self.chunk, np.int32), np.int32(1))
        yield "first"
        infer.compiled(_first, self, model, rows, row, one)
        yield "step"
        infer.compiled(_step, self, model, rows, active, forced)
        yield "snapshot"
        infer.compiled(_snapshot, rows, row)
        yield "restore"
        infer.compiled(_restore, rows, row, self.snapshot(rows, 0))
        yield "copy_page"
        infer.compiled(_copy_page, rows, row, row)


def _on_devices(model: Model, array: np.ndarray) -> Array:
    """An array where the model is: on every device of its mesh."""
    return jax.device_put(array) if model.mesh is None else place(model.mesh, array)


def _drawn(seed: int, index: int, seen: Bool[np.ndarray, "V"], counts: Int32[np.ndarray, "V"]) -> Drawn:
    return Drawn(row_keys(seed, np.array([index])), seen[None], counts[None])


def _put(rows: T, row: Int32[Array, ""], new: T) -> T:
    """The arrays of one row in those of all rows."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), row, 0), rows, new)


def _get(rows: T, row: Int32[Array, ""]) -> T:
    """The arrays of one row."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, 0), rows)


class Program:
    """A jitted function of rows. On a mesh, its results are divided like the rows it got.

    A program is compiled for the places of its arguments: rows in other places would need a second one.
    """

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...], static: tuple[int, ...]) -> None:
        """The positions of arguments that are donated, and of static ones, which come first."""
        self.function = function
        self.options: dict[str, Any] = {"donate_argnums": donate, "static_argnums": static}
        self.jitted: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self._for(args)(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self._for(args).lower(*args)

    def _for(self, args: tuple[Any, ...]) -> Any:
        cache = next(arg.cache for arg in args if isinstance(arg, Rows))
        key = None if cache.mesh is None else jax.tree.structure(cache)
        if key not in self.jitted:
            places: dict[str, Any] = {}
            if cache.mesh is not None:
                count = len(self.options["static_argnums"])
                out = jax.eval_shape(functools.partial(self.function, *args[:count]), *args[count:])
                places["out_shardings"] = _places(out, cache.mesh)
            self.jitted[key] = jax.jit(self.function, **self.options, **places)
        return self.jitted[key]


def program(*, donate: tuple[int, ...] = (), static: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Program]:
    """Make a `Program` of a function."""
    return lambda function: Program(function, donate, static)


def _places(out: Any, mesh: Mesh) -> Any:
    """Where the results of a program are: pools with their heads, everything else on every device."""

    def of_part(part: Any) -> Any:
        if isinstance(part, KVCache):
            axes = [NamedSharding(mesh, PartitionSpec() if axes == ROW_AXES else axes) for axes in part.axes()]
            return jax.tree.unflatten(jax.tree.structure(part), axes)
        divided = RING_AXES if isinstance(part, KeyValues) else PartitionSpec()
        return jax.tree.map(lambda _: NamedSharding(mesh, divided), part)

    return jax.tree.map(of_part, out, is_leaf=lambda part: isinstance(part, KVCache | KeyValues))


@program(donate=(0,))
def _admit(rows: Rows, row: Int32[Array, ""], drawn: Drawn, sampling: Sampling) -> Rows:
    length = _put(rows.cache.length, row, jnp.zeros(1, jnp.int32))
    cache = replace(rows.cache, length=length)
    drawn, sampling = _put(rows.drawn, row, drawn), _put(rows.sampling, row, sampling)
    return replace(rows, cache=cache, drawn=drawn, sampling=sampling)


@program(static=(0,), donate=(2,))
def _prefill(
    programs: Programs,
    model: Model,
    rows: Rows,
    row: Int32[Array, ""],
    tokens: Int32[Array, "T"],
    count: Int32[Array, ""],
) -> Rows:
    own, last = rows.cache.row(row), _get(rows.last, row)
    last, own = infer.extend(model, tokens[None], own, count[None], last, programs.backend)
    return replace(rows, cache=rows.cache.with_row(row, own), last=_put(rows.last, row, last))


@program(static=(0,), donate=(2,))
def _first(
    programs: Programs, model: Model, rows: Rows, row: Int32[Array, ""], forced: Int32[Array, ""]
) -> tuple[Rows, Choice]:
    logits = infer.head(model, _get(rows.last, row))
    sampling, drawn = _get(rows.sampling, row), _get(rows.drawn, row)
    choice, drawn = choose(logits, sampling, drawn, jnp.ones(1, bool), forced[None], programs.top)
    rows = replace(rows, token=_put(rows.token, row, choice.token), drawn=_put(rows.drawn, row, drawn))
    return rows, choice


@program(static=(0,), donate=(2,))
def _step(
    programs: Programs,
    model: Model,
    rows: Rows,
    active: Bool[Array, "B"],
    forced: Int32[Array, "B"],
) -> tuple[Rows, Choice]:
    groups = RowGroups.of(active, programs.group or len(active))
    hidden, cache, is_overfull = infer.append(model, rows.token, rows.cache, active, programs.backend, groups.apply)

    def choice_after(
        hidden: Array, is_overfull: Array, sampling: Sampling, drawn: Drawn, active: Array, forced: Array
    ) -> tuple[Choice, Drawn]:
        logits = infer.after(model, hidden, is_overfull)
        return choose(logits, sampling, drawn, active, forced, programs.top)

    blank = Choice.blank(len(active), programs.top)
    state = rows.sampling, rows.drawn, active, forced
    choice, drawn = groups.update((blank, rows.drawn), choice_after, hidden, is_overfull, *state)
    token = jnp.where(active, choice.token, rows.token)
    return replace(rows, cache=cache, token=token, drawn=drawn), choice


@program()
def _snapshot(rows: Rows, row: Int32[Array, ""]) -> Snapshot:
    own = rows.cache.row(row)
    return Snapshot(own.rings, own.length, _get(rows.last, row))


@program(donate=(0,))
def _restore(rows: Rows, row: Int32[Array, ""], snapshot: Snapshot) -> Rows:
    own = replace(rows.cache.row(row), rings=snapshot.rings, length=snapshot.length)
    return replace(rows, cache=rows.cache.with_row(row, own), last=_put(rows.last, row, snapshot.last))


@program(donate=(0,))
def _load_page(rows: Rows, page: Int32[Array, ""], keys: KeyValues) -> Rows:
    def written(pool: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(pool, new, page, 1)

    return replace(rows, cache=replace(rows.cache, full=jax.tree.map(written, rows.cache.full, keys)))


@program(donate=(0,))
def _copy_page(rows: Rows, source: Int32[Array, ""], target: Int32[Array, ""]) -> Rows:
    return replace(rows, cache=rows.cache.copy_page(source, target))
