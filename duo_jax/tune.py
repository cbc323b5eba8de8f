"""Tuning: time a few tile sizes of each kernel on this GPU and keep the fastest for this user."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.arguments import whole_number
from duo_jax.files import check_output, write_text
from duo_jax.reading import read_json
from pallas_kernels import Unsupported, layer
from pallas_kernels.gpus import chip
from pallas_kernels.mosaic.warps import is_available
from pallas_kernels.segments import is_short
from pallas_kernels.tiles import (
    KINDS,
    DecodeTiles,
    FlashTiles,
    PipelineTiles,
    forget_tuned,
    read_tuned,
    size_key,
    tiles_for,
    trying,
    tuned_file,
    tuned_key,
)
from pallas_kernels.timing import fastest

# Caches that kernels are timed with: quantized keys have tiles of their own. None: the data type of the queries.
CACHES: dict[str, tuple[str | None, ...]] = {"decode": (None, "int4"), "short": ("int4",)}
# Tokens of a short chunk.
QUESTION = 32


def kernels_here() -> tuple[str, ...]:
    """The kernels that this device can run: those of Mosaic on Hopper, that of its prefill on Ampere too."""
    capability = chip().capability or (0, 0)
    has_prefill = capability == (9, 0) or (capability[0] == 8 and is_available())
    runs = {"mosaic_flash": has_prefill, "mosaic_decode": capability == (9, 0)}
    return tuple(kernel for kernel in KINDS if runs.get(kernel, True))


def tune(
    kernels: Sequence[str],
    head_dims: Sequence[int],
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    tokens: int = 16_384,
    context: int = 262_144,
    out: Path | None = None,
    show: Callable[[str], None] = print,
) -> None:
    """Time the candidates of every kernel and write the fastest; those that do not compile or fit are left out.

    Args:
        kernels: names in `pallas_kernels.tiles.KINDS`.
        head_dims: head dims, each tuned by itself.
        dtypes: data types of queries and cache.
        tokens: tokens of the prefill and of the training step that are timed.
        context: tokens in the cache when decode, or a short chunk, is timed.
        out: the file, by default that of this user, which the kernels read; other entries stay.
        show: gets each line of text.

    Raises:
        ValueError: bad arguments, a file that was altered, or no tiles that run.
    """
    if set(kernels) - set(KINDS):
        raise ValueError(f"kernels are among {', '.join(KINDS)}, got {', '.join(kernels)}")
    whole_number("tokens", tokens, 1)
    whole_number("context", context, 1)
    for head_dim in head_dims:
        whole_number("head_dims", head_dim, 1)
    path = out or tuned_file()
    check_output(path)
    table = read_json(path) if path.exists() else {}
    if table:
        read_tuned(path)
    tuned = 0
    wanted = ((kernel, cache) for kernel in kernels for cache in CACHES.get(kernel, (None,)))
    for (kernel, cache), dtype, head_dim in product(wanted, dtypes, head_dims):
        label = f"{kernel}, {dtype}, head dim {head_dim}" + (f", {cache} cache" if cache else "")
        itemsize, kind = jnp.dtype(dtype).itemsize, {"quantized": cache is not None}
        call, results = _timed(kernel, dtype, head_dim, cache, tokens, context), []
        for tiles in candidates(kernel, tiles_for(kernel, head_dim, itemsize, **kind)):
            try:
                with trying(kernel, tiles):
                    results.append((call(), tiles))
            except Exception as error:  # Error types differ; too much shared memory, for example.
                text = (str(error).splitlines() or [""])[0]
                show(f"{label}: {tiles}: {type(error).__name__}: {text}"[:400])
        if not results:
            show(f"{label}: no tiles run here")
            continue
        tuned += 1
        seconds, best = min(results, key=lambda result: result[0])
        sizes = table.setdefault(tuned_key(kernel), {}).setdefault(kernel, {})
        sizes[size_key(head_dim, itemsize, **kind)] = asdict(best)
        write_text(path, json.dumps(table, indent=1) + "\n")
        forget_tuned()
        show(f"{label}: {1e3 * seconds:.3f} ms with {best}")
    if not tuned:
        raise ValueError(f"no tiles of {', '.join(kernels)} run here")


def candidates(kernel: str, shipped: Any) -> Iterator[Any]:
    """At most six tiles to try: those that ship, then changes that other kernels' tuning found worthwhile."""
    others: list[Any]
    if isinstance(shipped, PipelineTiles):
        others = [PipelineTiles(*each) for each in ((128, 2), (64, 2), (64, 3), (64, 4))]
    elif kernel == "short":
        others = [replace(shipped, block_k=block_k) for block_k in (64, 32, 16)]
        others += [replace(shipped, num_stages=shipped.num_stages + 1)]
        others += [replace(shipped, max_programs=max(1, shipped.max_programs // 2))]
    elif isinstance(shipped, DecodeTiles):
        wide = replace(shipped, block_k=128, min_split=512, num_stages=2)
        others = [wide, replace(shipped, num_stages=shipped.num_stages + 1), replace(shipped, block_k=32)]
        others += [replace(each, max_programs=shipped.max_programs // 2) for each in (shipped, wide)]
    elif kernel == "backward":
        sizes = ((64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2))
        others = [FlashTiles(*each) for each in sizes]
    else:
        # tokamax's public table for H100 has 128 x 128 with 3 stages and 8 warps as the best of Triton.
        sizes = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))
        others = [FlashTiles(*each) for each in sizes]
    yield from dict.fromkeys([shipped, *others])


def _timed(kernel: str, dtype: str, head_dim: int, cache: str | None, tokens: int, context: int) -> Callable[[], float]:
    """Seconds of a layer of Llama-3-8B's heads, half of them streaming."""
    backend, _, task = kernel.rpartition("_")
    length = context if task in ("decode", "short") else tokens
    sizes: dict[str, Any] = {"tokens": QUESTION if task == "short" else tokens, "capacity": length, "cache": cache}
    made = layer.make(heads=(32, 8, head_dim), dtype=dtype, streaming=0.5, **sizes)
    backend, count = backend or "triton", jnp.full(1, length, jnp.int32)
    # Traced again for each candidate: tiles are read during tracing.
    if task == "flash":
        rows = {"start": jnp.zeros_like(count), "lengths": count}
        return lambda: layer.seconds_of(lambda made: made.prefill(**rows, backend=backend), made)
    if task == "short":

        def question(made: layer.Layer) -> jax.Array:
            if not is_short(made.q, made.k.shape[2]):
                raise Unsupported(f"a short chunk is read as a long one with {dtype} and head dim {head_dim}")
            return made.prefill(start=count, lengths=jnp.full_like(count, QUESTION), backend=backend)

        return lambda: layer.seconds_of(question, made)
    if task == "decode":
        one = made._replace(q=made.q[:, :1])
        return lambda: layer.seconds_of(lambda made: made.decode(lengths=count, backend=backend), one)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        gates = jnp.full(8, 0.5, jnp.float32)
        return made._replace(q=q, k=k, v=v).gated(gates, backend=backend).astype(jnp.float32).sum()

    return lambda: fastest(jax.jit(jax.grad(loss, (0, 1, 2))), *made[:3], least=0.1)
