"""Engines that a benchmark times side by side on the same weights: this library, and transformers on torch.

An engine prefills a batch of prompts, then decodes one token a row at a time; both calls return when the work is done.
"""

import time
from typing import Any, Protocol

import jax
import numpy as np

from duo_jax import HeadPattern, KVCache, decode_step, load_model, prefill
from duo_jax.checkpoint.load import open_source


class Engine(Protocol):
    """What a benchmark needs of an engine."""

    compile_seconds: dict[str, float]
    kv_bytes: int

    def prefill(self, tokens: np.ndarray) -> None:
        """Start over and compute `[B, T]` prompts."""
        ...

    def decode(self, token: np.ndarray) -> None:
        """Append one token a row."""
        ...


class Duo:
    """This library, with full attention or a head pattern."""

    def __init__(self, model: str, pattern: HeadPattern | None, *, room: int) -> None:
        """Load the weights; `room` is how many tokens will be decoded after a prompt."""
        self.compile_seconds: dict[str, float] = {}
        self.kv_bytes = 0
        self._model, self._pattern, self._room = load_model(model, dtype="float32"), pattern, room
        self._cache: KVCache | None = None

    def warm_up(self, tokens: np.ndarray) -> None:
        """Compile what these prompts need; the time of a first call beside that of a second is the compilation's."""
        for name, call in (("prefill", self._first_chunk), ("decode", self._first_step)):
            times = [seconds(call, tokens) for _ in range(2)]
            self.compile_seconds[name] = times[0] - times[1]

    def prefill(self, tokens: np.ndarray) -> None:
        """See `Engine`."""
        self._cache = None  # Free the last one first: two would count as this engine's memory.
        logits, self._cache = prefill(self._model, tokens, self._new_cache(tokens))
        jax.block_until_ready((logits, self._cache))

    def decode(self, token: np.ndarray) -> None:
        """See `Engine`."""
        assert self._cache is not None
        logits, self._cache = decode_step(self._model, token, self._cache)
        jax.block_until_ready((logits, self._cache))

    def _new_cache(self, tokens: np.ndarray) -> KVCache:
        batch, length = tokens.shape
        cache = KVCache.init(self._model.config, self._pattern, batch, length + self._room, dtype="float32")
        self.kv_bytes = cache.nbytes
        return cache

    def _first_chunk(self, tokens: np.ndarray) -> None:
        from duo_jax.phases import chunk_width

        width = chunk_width(tokens.shape[1])
        _, self._cache = prefill(self._model, tokens[:, :width], self._new_cache(tokens), chunk_size=width)
        jax.block_until_ready(self._cache)

    def _first_step(self, tokens: np.ndarray) -> None:
        self.decode(tokens[:, 0])


class Transformers:
    """Hugging Face transformers on torch (scaled-dot-product attention, its default cache), float32."""

    def __init__(self, model: str, pattern: HeadPattern | None, *, room: int) -> None:
        """Give torch's model the weights that this library loads from the same file."""
        try:
            import torch
            import transformers
        except ImportError:
            raise ValueError("the transformers engine needs torch: pip install 'duo-jax[bench]'") from None
        if pattern is not None:
            raise NotImplementedError("transformers has no streaming heads: leave the pattern out")
        self.compile_seconds: dict[str, float] = {}
        self.kv_bytes = 0
        self._torch, self._cache_class = torch, transformers.DynamicCache
        self._model = torch_model(model)
        self._cache: Any = None

    def warm_up(self, tokens: np.ndarray) -> None:
        """Nothing is compiled; a short call makes torch allocate what it keeps."""
        self.prefill(tokens[:, :64])
        self.decode(tokens[:, 0])

    def prefill(self, tokens: np.ndarray) -> None:
        """See `Engine`."""
        self._cache = self._cache_class()
        self._run(tokens)
        self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def decode(self, token: np.ndarray) -> None:
        """See `Engine`."""
        self._run(token[:, None])

    def _run(self, tokens: np.ndarray) -> None:
        ids = self._torch.from_numpy(np.array(tokens, np.int64))
        with self._torch.inference_mode():
            self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


def torch_model(model: str) -> Any:
    """Torch's model with the weights that this library loads from the same file, float32.

    Raises:
        NotImplementedError: a model that is not a Llama.
    """
    import torch
    import transformers

    source = open_source(model)
    config = source.config
    hf = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
    )
    found = transformers.LlamaForCausalLM(hf).eval()
    weights = {name: torch.from_numpy(np.array(source.read(name), np.float32)) for name in source.shapes}
    missing, unexpected = found.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise NotImplementedError(f"only Llama models can be compared; {missing=}, {unexpected=}")
    found.tie_weights()
    return found


ENGINES: dict[str, type] = {"duo": Duo, "transformers": Transformers}


def seconds(call: Any, *args: Any) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin
