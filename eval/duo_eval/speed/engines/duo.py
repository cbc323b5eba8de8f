"""This library as an engine, with full attention or a head pattern."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from duo_eval.speed.ceilings import seconds
from duo_eval.speed.engines import memory
from duo_eval.speed.engines.subject import Subject
from duo_jax import HeadPattern, KVCache, decode_step, prefill
from duo_jax.chunks import chunk_width


class Duo:
    """`duo_jax.prefill` and `duo_jax.decode_step`, one call a token."""

    def __init__(
        self,
        subject: Subject,
        pattern: HeadPattern | None,
        *,
        room: int,
        chunk_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        """See `Engine`."""
        self.compile_seconds: dict[str, float] = {}
        self.kv_bytes = 0
        self._model, self._pattern, self._room = subject.load(), pattern, room
        self._chunk_size, self._backend = chunk_size, backend
        self._cache: KVCache | None = None

    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """Compile; the time of a first call beside that of a second is the compilation's."""
        width = chunk_width(tokens.shape[1], self._chunk_size)
        for name, call in (
            ("prefill", lambda: self._prefill(tokens[:, :width], tokens.shape[1], width)),
            ("decode", lambda: self.decode(tokens[:, 0])),
        ):
            times = [seconds(call) for _ in range(2)]
            self.compile_seconds[name] = times[0] - times[1]

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        return self._prefill(tokens, tokens.shape[1], self._chunk_size)

    def decode(self, token: Int[np.ndarray, "B"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        assert self._cache is not None
        logits, self._cache = decode_step(self._model, token, self._cache, backend=self._backend)
        jax.block_until_ready((logits, self._cache))
        return logits

    def memory(self) -> dict[str, int]:
        """See `Engine`."""
        return memory.of_jax()

    def _prefill(self, tokens: Int[np.ndarray, "B T"], length: int, chunk_size: int | None) -> Float[Array, "B V"]:
        self._cache = None  # Free the last one first: two would count as this engine's memory.
        config = self._model.config
        cache = KVCache.init(config, self._pattern, len(tokens), length + self._room, dtype=config.dtype)
        self.kv_bytes = cache.nbytes
        logits, self._cache = prefill(self._model, tokens, cache, chunk_size=chunk_size, backend=self._backend)
        jax.block_until_ready((logits, self._cache))
        return logits
