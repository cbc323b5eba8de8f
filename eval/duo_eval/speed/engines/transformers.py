"""Hugging Face transformers on torch as an engine: scaled-dot-product attention, its default cache. CPU or GPU."""

import inspect
from typing import Any

import numpy as np
from jaxtyping import Int

from duo_eval.speed import device
from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.engines.base import Engine
from duo_jax import HeadPattern, ModelConfig
from duo_jax.checkpoint.source import Source
from duo_jax.families.layer_settings import FULL, SLIDING


class Transformers(Engine):
    """The model class of transformers, with the weights that this library loads from the same file, or random ones."""

    def __init__(self, model: BenchModel, pattern: HeadPattern, *, room: int) -> None:
        """See `Engine`."""
        try:
            import torch
            import transformers
        except ImportError:
            raise NotImplementedError("the transformers engine needs torch: pip install 'duo-jax[bench]'") from None
        if pattern.num_streaming:
            raise NotImplementedError("transformers has no streaming heads: leave the pattern out")
        if len(model.config.own_windows) > 1:
            raise NotImplementedError("transformers has one window for all layers that have one: measure another model")
        self.compile_seconds = {}
        self.kv_bytes = 0
        self._torch, self._cache_class = torch, transformers.DynamicCache
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = torch_model(model.config, model.tensors(), dtype=model.dtype, device=self._device)
        self._cache: Any = None
        # Newer versions of transformers have another name for it, and warn of the older one.
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """See `Engine`; nothing is compiled, but a short call makes torch allocate its buffers."""
        self.prefill(tokens[:, :64])
        self.decode(tokens[:, 0])

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Any:
        """See `Engine`."""
        self._cache = self._cache_class(config=self._model.config)  # Layers with a window keep only their window.
        logits = self._run(tokens)
        self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)
        return logits

    def decode(self, token: Int[np.ndarray, "B"]) -> Any:
        """See `Engine`."""
        return self._run(token[:, None])

    def memory(self) -> dict[str, int]:
        """See `Engine`."""
        if self._device.type == "cpu":
            return device.process_memory()
        cuda = self._torch.cuda
        return {"peak": cuda.max_memory_allocated(), "now": cuda.memory_allocated()}

    def _run(self, tokens: Int[np.ndarray, "B T"]) -> Any:
        ids = self._torch.from_numpy(np.array(tokens, np.int64)).to(self._device)
        with self._torch.inference_mode():
            options = {self._cache_name: self._cache, "use_cache": True, "logits_to_keep": 1}
            logits = self._model(ids, **options).logits[:, -1]
        if self._device.type != "cpu":
            self._torch.cuda.synchronize()
        return logits.float().cpu().numpy()


def torch_model(config: ModelConfig, source: Source | None, *, dtype: str, device: Any) -> Any:
    """The model class of transformers with the weights of a checkpoint, or random ones.

    Raises:
        NotImplementedError: weights that the model class does not have.
    """
    import torch
    import transformers

    hf = transformers.AutoConfig.for_model(config.family, **fields(config))
    with device:
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=getattr(torch, dtype)).eval()
    if source is not None:
        weights = {name: torch.from_numpy(np.array(source.read(name), np.float32)) for name in source.shapes}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise NotImplementedError(f"the weights of transformers' model differ: {missing=}, {unexpected=}")
        model.tie_weights()
    return model


def fields(config: ModelConfig) -> dict[str, Any]:
    """The shape in Hugging Face's terms. RoPE is not scaled: frequencies do not affect time."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    windows: dict[str, Any] = {"sliding_window": None}
    if config.own_windows:
        is_sliding = [window is not None for window in config.layer_windows]
        windows = {"sliding_window": config.own_windows[0].size, "use_sliding_window": True}
        windows["layer_types"] = [SLIDING if slides else FULL for slides in is_sliding]
    if config.window_rope is not None:
        rope = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": config.window_rope.theta}}
    experts = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_dim,
        "mlp_only_layers": list(config.dense_layers),
    }
    return (experts if config.num_experts else {}) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.activation,
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": round(config.head_dim / config.query_scale**2),
        "rope_parameters": rope,
        **windows,
    }
