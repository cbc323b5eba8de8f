"""cuDNN's attention as an engine: this library's decoder around `jax.nn.dot_product_attention`, on a GPU.

A plain cache, every head with every token, and a prompt in one piece: what jax offers without this library.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.engines.base import Engine
from duo_jax import HeadPattern, Model
from pallas_kernels.timing import compile_seconds
from pallas_kernels.window import consecutive

Cache = tuple[list[Float[Array, "B S K H"]], list[Float[Array, "B S K H"]]]


class Cudnn(Engine):
    """Full attention by cuDNN's flash kernels."""

    # Jax's name for it; its plain XLA attention takes the same arguments, so tests need no GPU.
    implementation = "cudnn"

    def __init__(self, model: BenchModel, pattern: HeadPattern, *, room: int) -> None:
        """See `Engine`."""
        if pattern.num_streaming:
            raise NotImplementedError("cuDNN has no streaming heads: leave the pattern out")
        if pattern.window_layers:
            raise NotImplementedError("the cuDNN engine has no layers with a window: measure another model")
        if model.config.sink_logits:
            raise NotImplementedError("the cuDNN engine has no learned sinks: measure another model")
        if self.implementation == "cudnn" and jax.default_backend() != "gpu":
            raise NotImplementedError("cuDNN runs on GPUs")
        self.compile_seconds = {}
        self.kv_bytes = 0
        self._model, self._room = model.load(), room
        self._cache: Cache | None = None
        self._length = 0

    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """See `Engine`; the whole prompt is one program."""
        self.compile_seconds = {
            "prefill": compile_seconds(lambda: self.prefill(tokens)),
            "decode": compile_seconds(lambda: self.decode(tokens[:, 0])),
        }

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        self._cache = None
        config = self._model.config
        shape = len(tokens), tokens.shape[1] + self._room, config.num_kv_heads, config.head_dim
        cache = tuple([jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)] for _ in "kv")
        self.kv_bytes = sum(pool.nbytes for pools in cache for pool in pools)
        self._length = 0
        return self._run(tokens, cache)

    def decode(self, token: Int[np.ndarray, "B"]) -> Float[Array, "B V"]:
        """See `Engine`."""
        return self._run(token[:, None], self._cache)

    def _run(self, tokens: Int[np.ndarray, "B T"], cache: Any) -> Float[Array, "B V"]:
        begin = jnp.full(len(tokens), self._length, jnp.int32)
        logits, self._cache = _append(self._model, jnp.asarray(tokens, jnp.int32), cache, begin, self.implementation)
        self._length += tokens.shape[1]
        return jax.block_until_ready((logits, self._cache))[0]


@functools.partial(jax.jit, static_argnums=4, donate_argnums=2)
def _append(
    model: Model, tokens: Int32[Array, "B T"], cache: Any, begin: Int32[Array, "B"], implementation: Any
) -> tuple[Float[Array, "B V"], Any]:
    """A whole prompt into an empty cache, or one token after the others."""
    is_prompt = tokens.shape[1] > 1

    def attend(state: Any, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        put = jax.lax.dynamic_update_slice_in_dim
        pools = [put(p[layer], x, begin[0], 1) for p, x in zip(state, (k, v), strict=True)]
        attention = functools.partial(jax.nn.dot_product_attention, q, implementation=implementation)
        out = attention(k, v, is_causal=True) if is_prompt else attention(*pools, key_value_seq_lengths=begin + 1)
        return out, tuple([*p[:layer], new, *p[layer + 1 :]] for p, new in zip(state, pools, strict=True))

    hidden, cache = model.decoder.hidden(tokens, consecutive(begin, tokens.shape[1]), attend, cache)
    return model.decoder.logits(hidden[:, -1]), cache
