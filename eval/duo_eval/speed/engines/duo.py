"""This library as an engine, with full attention or a head pattern."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.engines.base import Engine
from duo_jax import HeadPattern, KVCache, decode_step, prefill
from duo_jax.generation.chunks import chunk_width
from pallas_kernels.timing import compile_seconds


class Duo(Engine):
    """`duo_jax.prefill` and `duo_jax.decode_step`, one call a token."""

    def __init__(
        self,
        model: BenchModel,
        pattern: HeadPattern,
        *,
        room: int,
        chunk_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        """See `Engine`."""
        self.compile_seconds = {}
        self.kv_bytes = 0
        self._model, self._pattern, self._room = model.load(), pattern, room
        self._chunk_size, self._backend = chunk_size, backend
        self._cache: KVCache | None = None

    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """See `Engine`; the first chunk is enough."""
        width = chunk_width(tokens.shape[1], self._chunk_size, rows=len(tokens))
        self.compile_seconds = {
            "prefill": compile_seconds(lambda: self._prefill(tokens[:, :width], tokens.shape[1], width)),
            "decode": compile_seconds(lambda: self.decode(tokens[:, 0])),
        }

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        return self._prefill(tokens, tokens.shape[1], self._chunk_size)

    def decode(self, token: Int[np.ndarray, "B"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        assert self._cache is not None
        logits, self._cache = decode_step(self._model, token, self._cache, backend=self._backend)
        jax.block_until_ready((logits, self._cache))
        return logits

    def _prefill(self, tokens: Int[np.ndarray, "B T"], length: int, chunk_size: int | None) -> Float[Array, "B V"]:
        self._cache = None  # Free the old cache first: two would count as this engine's memory.
        config = self._model.config
        cache = KVCache.init(config, self._pattern, len(tokens), config.room(length + self._room), dtype=config.dtype)
        self.kv_bytes = cache.nbytes
        logits, self._cache = prefill(self._model, tokens, cache, chunk_size=chunk_size, backend=self._backend)
        jax.block_until_ready((logits, self._cache))
        return logits
