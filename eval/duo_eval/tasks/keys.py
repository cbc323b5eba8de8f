"""`duo eval keys`: the error of a quantized cache for keys as families have them, on random models.

Weights of these families are not shipped, so their keys are imitated: a random model gets key biases, or weights of the
norm of its keys, as large as reported for trained ones.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_jax import KVCache, Model, ModelConfig, score
from duo_jax.model.precision import ALLOWED, check_name
from duo_jax.model.rope import Rope

FLOAT = "float32"


@dataclass(frozen=True)
class Keys:
    """Score random tokens with quantized caches on random models, and compare with a float32 cache."""

    out: Path = Path("keys.json")
    """File to write."""
    caches: tuple[str, ...] = ("bfloat16", "int8", "int4")
    """Data types of keys and values to compare with float32."""
    head_dims: tuple[int, ...] = (64, 128)
    """Channels of a head."""
    tokens: int = 1024
    """Tokens of the text."""
    models: int = 3
    """Random models of each kind."""

    def run(self) -> None:
        """Measure every kind of keys.

        Raises:
            ValueError: an unknown data type, or numbers below 2 tokens, 1 model or 1 size.
        """
        for cache in self.caches:
            check_name("cache", cache, ALLOWED["kv_dtype"])
        if self.tokens < 2 or self.models < 1 or not self.head_dims:
            raise ValueError(f"need 2 tokens, a model and a head dim at least, got {self}")
        record = Record.open(self.out, {"task": "keys", **asdict(self)}, again=True)
        with record.writing(dtype=FLOAT) as append:
            for head_dim in self.head_dims:
                for keys, make in KINDS.items():
                    by_model = [self._errors(make(head_dim, seed), seed) for seed in range(self.models)]
                    for cache in self.caches:
                        errors, correlations = zip(*(model[cache] for model in by_model), strict=True)
                        result = {"head_dim": head_dim, "keys": keys, "cache": cache}
                        append(None, result | {"error": list(errors), "correlation": list(correlations)})
                        print(f"{head_dim} channels, {keys}, {cache}: {np.mean(errors):.4f} nats a token", flush=True)

    def _errors(self, model: Model, seed: int) -> dict[str, tuple[float, float]]:
        """For each cache: mean distance of a token's log-likelihood from float32's, and their correlation."""
        tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, self.tokens))

        def logprobs(cache: str) -> np.ndarray:
            room = model.config.room(self.tokens)
            found, _ = score(model, tokens, KVCache.init(model.config, None, 1, room, dtype=cache))
            return np.asarray(found.logprobs[0], np.float64)

        exact = logprobs(FLOAT)
        others = {cache: logprobs(cache) for cache in self.caches}
        return {
            cache: (float(np.abs(found - exact).mean()), float(np.corrcoef(found, exact)[0, 1]))
            for cache, found in others.items()
        }


def _random(family: str, head_dim: int, seed: int, **fields: Any) -> Model:
    """A small random model; queries and keys are large enough that attention is not uniform."""
    config = ModelConfig(family, 256, 2, 128, 4, 2, head_dim, 256, 32768, Rope(1e6), dtype=FLOAT, **fields)
    model = Model.random(config, seed=seed)
    decoder = model.decoder
    for layer in decoder.layers:
        kernel = layer.attention.qkv.kernel
        scale = np.ones(kernel.get_value().shape[1], np.float32)
        scale[: 6 * head_dim] = 2
        kernel.set_value(kernel.get_value() * scale[None])
    return Model.from_decoder(decoder)


def _llama(head_dim: int, seed: int) -> Model:
    return _random("llama", head_dim, seed)


def _qwen2(norm: float, pairs: int) -> Callable[[int, int], Model]:
    """Key biases of a given norm a head, in some of the slowest pairs of channels that RoPE rotates."""

    def make(head_dim: int, seed: int) -> Model:
        model, rng = _random("qwen2", head_dim, seed, qkv_bias=True), np.random.default_rng(seed)
        decoder = model.decoder
        for layer in decoder.layers:
            bias = 0.2 * rng.standard_normal((8, head_dim))
            for head in (4, 5):  # Four of queries come before, two of values after.
                slow = head_dim // 2 - 1 - rng.permutation(head_dim // 4)[:pairs]
                large = rng.standard_normal((2, pairs))
                bias[head, np.concatenate([slow, slow + head_dim // 2])] += (
                    norm * large / np.linalg.norm(large)
                ).ravel()
            assert layer.attention.qkv.bias is not None
            layer.attention.qkv.bias.set_value(jnp.asarray(bias.ravel(), jnp.float32))
        return Model.from_decoder(decoder)

    return make


def _qwen3(head_dim: int, seed: int) -> Model:
    """Normalized queries and keys, with weights of which a few are large."""
    model, rng = _random("qwen3", head_dim, seed, qk_norm=True), np.random.default_rng(seed)
    decoder = model.decoder
    for layer in decoder.layers:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            weights = np.exp(0.3 * rng.standard_normal(head_dim))
            weights[head_dim // 2 - 3] = weights[-3] = 10
            assert norm.scale is not None
            norm.scale.set_value(jnp.asarray(weights, jnp.float32))
    return Model.from_decoder(decoder)


# Qwen2.5-7B has key biases of norm 605 and 921 in its first and last layer, and of 22 in the median one
# (ggml-org/llama.cpp#21385).
KINDS: dict[str, Callable[[int, int], Model]] = {
    "llama": _llama,
    "qwen2, bias 22": _qwen2(22.0, 1),
    "qwen2, bias 921": _qwen2(921.0, 1),
    "qwen2, bias 921 in 4 pairs": _qwen2(921.0, 4),
    "qwen3": _qwen3,
}


def keys_table(path: Path) -> str:
    """Mean error of a token's log-likelihood, and its correlation with float32's, by kind of keys."""
    head, results = read(path)
    caches = list(dict.fromkeys(result["cache"] for result in results))
    rows: dict[tuple[int, str], list[Any]] = {}
    for result in results:
        row = rows.setdefault((result["head_dim"], result["keys"]), [])
        row += [f"{np.mean(result['error']):.4f}", f"{np.mean(result['correlation']):.4f}"]
    headers = ["head dim", "keys", *(name for cache in caches for name in (f"{cache}, error", "correlation"))]
    table = rows_to_table([(*key, *row) for key, row in rows.items()], headers, "rl" + "r" * 2 * len(caches))
    models, tokens = head["about"]["models"], head["about"]["tokens"]
    note = f"Means over {models} random models and {tokens} tokens each; errors in nats a token."
    return f"{table}\n\n{note} {origin(head['runs'], head['runs'][-1]['command'])}\n"


RESULT = ResultType("Quantization of keys", of_task("keys"), {"Compared with float32": keys_table}, group="Accuracy")
