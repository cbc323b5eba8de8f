"""Generation as commands show it: compile, prefill and decode apart, each with its time, on one cache."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from duo_jax.cache.cache import KVCache
from duo_jax.generate import stream
from duo_jax.infer import chunk_width
from duo_jax.model import Model
from duo_jax.sampling import Greedy, Sampler


@dataclass
class Timings:
    """What a run took; filled in as it goes."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode rate."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prefill rate."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0


def timed_stream(
    model: Model,
    tokens: np.ndarray,
    timings: Timings,
    *,
    cache: KVCache,
    history: np.ndarray | None = None,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),
    eos_ids: tuple[int, ...] = (),
    key: int | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, float]]:
    """Token ids and log-probabilities of one continuation, one by one; `status` hears what is going on.

    `cache` is empty, or holds the text before the prompt, whose tokens are `history`.

    Both programs are compiled first, on the head of the prompt, and the cache is rewound: the times that follow are
    of the work alone.
    """
    length = len(tokens)
    timings.prompt_tokens, timings.kv_bytes = length, cache.nbytes
    timings.kv_bytes_full = KVCache.bytes_for(model.config, None, 1, cache.max_length)
    options: dict[str, Any] = {"sampler": sampler, "eos_ids": eos_ids, "key": key}
    options["history"] = None if history is None else history[None]

    status("compiling")
    begin = time.perf_counter()
    width = chunk_width(length)
    mark = cache.mark()
    warm = stream(model, tokens[None, :width], cache=cache, chunk_size=width, max_new_tokens=1, **options)
    next(warm)
    cache = warm.cache.rewind(mark)
    timings.compile_seconds = time.perf_counter() - begin

    begin = time.perf_counter()
    running = stream(
        model,
        tokens[None],
        cache=cache,
        chunk_size=width,
        max_new_tokens=max_new_tokens,
        progress=lambda done: status(f"prefill {done}/{length} tokens"),
        **options,
    )
    timings.prefill_seconds = time.perf_counter() - begin

    status("decoding")
    while True:
        begin = time.perf_counter()
        step = next(running, None)
        if step is None:
            return
        timings.decode_seconds += time.perf_counter() - begin
        timings.new_tokens += 1
        yield int(step.token[0]), float(step.logprob[0])


def show_status(text: str) -> None:
    """Show what is going on, in place, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
