"""Makes a golden checkpoint: a small random Hugging Face model, a pattern, and outputs computed in float32 by torch.

Knows nothing of this project's code: the model is Hugging Face's, the method is the paper (arXiv 2410.10819) written
densely. Needs torch, which the project does not, so run it in an environment of its own:

    pip install torch transformers safetensors numpy
    python tests/golden/make.py --family yarn --out tests/golden/yarn    # new weights
    python tests/golden/make.py --from tests/golden/llama                # recompute what is stored, and compare
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
    from torch import Tensor
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
except ImportError as error:
    raise SystemExit(f"{error}. Only this script needs torch: pip install torch transformers safetensors") from error

Array = np.ndarray[Any, Any]
# Other orders of summation differ by up to 5e-6 in float32; one key more or less in a window, by more than 0.1.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Family:
    """One row of the table: a Hugging Face model type, what its configuration changes in `COMMON`, and the run."""

    model_type: str
    config: dict[str, Any]
    tokens: int = 120
    sink_size: int = 4
    recent_size: int = 24

    @classmethod
    def small(cls, model_type: str, **config: Any) -> "Family":
        """A model of less weights and tokens, enough for what a family has besides the parts of llama."""
        return cls(model_type, SMALL | config, 72, sink_size=3, recent_size=13)


COMMON: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
}


def rope(kind: str = "default", theta: float = 10000.0, **parameters: float | list[float]) -> dict[str, Any]:
    """Hugging Face's `rope_parameters`."""
    return {"rope_type": kind, "rope_theta": theta, **parameters}


# Every vocabulary differs, so that no test passes with another family's checkpoint. Sequences are longer than
# `original_max_position_embeddings` and than sink + recent, so that RoPE scaling and the streaming mask both show.
LLAMA3_ROPE = rope(
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN_ROPE = rope("yarn", factor=8.0, original_max_position_embeddings=64)
BY_TURNS = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", {"vocab_size": 97, "num_key_value_heads": 4, "head_dim": 16, "rope_parameters": rope()}, 160
    ),
    "llama31": Family(
        "llama",
        {"vocab_size": 98, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        200,
        sink_size=8,
        recent_size=16,
    ),
    "mistral": Family(
        "mistral",
        {
            "vocab_size": 99,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "sliding_window": None,
            "rope_parameters": rope(),
        },
        130,
    ),
    "qwen2": Family(
        "qwen2",
        {
            "vocab_size": 100,
            "num_attention_heads": 6,  # no head_dim, as in Qwen2's configurations: hidden_size / num_attention_heads
            "tie_word_embeddings": True,
            "rope_parameters": rope(),
        },
        recent_size=20,
    ),
    "qwen3": Family(
        "qwen3", {"vocab_size": 101, "head_dim": 32, "rope_parameters": rope()}, 140, sink_size=2, recent_size=30
    ),
    "yarn": Family("llama", {"vocab_size": 102, "head_dim": 16, "rope_parameters": YARN_ROPE}),
    "linear": Family("llama", {"vocab_size": 103, "head_dim": 16, "rope_parameters": rope("linear", factor=4.0)}),
    "olmo3": Family.small(
        "olmo3",
        vocab_size=112,
        layer_types=BY_TURNS,
        sliding_window=9,
        rope_parameters={"sliding_attention": rope(theta=5e5), "full_attention": YARN_ROPE},
    ),
    "ministral": Family.small(
        "ministral", vocab_size=113, layer_types=BY_TURNS, sliding_window=11, rope_parameters=rope()
    ),
    "ministral3": Family.small(
        "ministral3",
        vocab_size=114,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
        | {"llama_4_scaling_beta": 0.3},
    ),
    "phi3": Family.small(
        "phi3",
        vocab_size=115,
        original_max_position_embeddings=32,
        rope_parameters=rope(
            "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1] * 3, long_factor=[1.0, 1.5, 2, 4, 8, 16]
        ),
    ),
    "phi3_short": Family.small(
        "phi3",
        vocab_size=116,
        original_max_position_embeddings=128,
        rope_parameters=rope("longrope", short_factor=[1.0, 1.1] * 4, long_factor=[2.0] * 8),
    ),
    "granite": Family.small(
        "granite",
        vocab_size=117,
        embedding_multiplier=6.0,
        attention_multiplier=0.375,
        residual_multiplier=0.7,
        logits_scaling=3.0,
        rope_parameters=rope(),
    ),
    "seed_oss": Family.small(
        "seed_oss", vocab_size=118, attention_bias=True, attention_out_bias=True, rope_parameters=rope(theta=1e7)
    ),
    "gpt_oss": Family.small(
        "gpt_oss",
        vocab_size=107,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=11,
        swiglu_limit=0.4,
        rope_parameters=rope(
            "yarn", 150000.0, factor=8.0, original_max_position_embeddings=64, beta_fast=32.0, truncate=False
        ),
    ),
    "gemma2": Family.small(
        "gemma2",
        vocab_size=119,
        layer_types=BY_TURNS,
        sliding_window=11,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
        tie_word_embeddings=True,
        rope_parameters=rope(),
    ),
    "smollm3": Family.small("smollm3", vocab_size=111, no_rope_layers=[1, 0, 1, 1], rope_parameters=rope(theta=2e6)),
    "qwen3_moe": Family.small(
        "qwen3_moe",
        vocab_size=104,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        rope_parameters=rope(),
    ),
    "mixtral": Family.small(
        "mixtral",
        vocab_size=105,
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=32,
        rope_parameters=rope(),
    ),
}


@dataclass(frozen=True)
class Golden:
    """What the outputs are computed from: the model and the inputs that `golden.npz` and `pattern/` store."""

    model: PreTrainedModel
    ids: Array  # [B, T] int32
    pattern: Array  # [L, K], 1: retrieval head, 0: streaming head, or any in a layer with a window of its own
    gates: Array  # [L, K] float32 in [0, 1]
    sink_size: int
    recent_size: int

    @classmethod
    def random(cls, family: Family, seed: int) -> "Golden":
        """Random weights large enough that attention is far from uniform, and a pattern with both extremes.

        Of the layers with full attention, the first has no retrieval head and the last no streaming head; half of the
        heads between are each. Of two such layers, half of the heads of both are each.
        """
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family.model_type, **COMMON | family.config)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                scale, mean = (0.08, 0.0) if weight.ndim >= 2 else (0.2, 0.0 if name.endswith("bias") else 1.0)
                weight.copy_(mean + scale * torch.randn_like(weight))
        rng = np.random.default_rng(seed)
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        half = (np.arange(heads) < heads / 2).astype(np.float64)
        full = np.flatnonzero(~native_layers(model))
        between = full[1:-1] if len(full) > 2 else full
        pattern = np.zeros((layers, heads))
        pattern[between] = [rng.permutation(half) for _ in between]
        if len(full) > 2:
            pattern[full[-1]] = 1
        return cls(
            model.eval(),
            ids=rng.integers(3, model.config.vocab_size, (2, family.tokens), np.int32),  # from 3: no special token
            pattern=pattern,
            gates=rng.random((layers, heads), np.float32),
            sink_size=family.sink_size,
            recent_size=family.recent_size,
        )

    @classmethod
    def load(cls, folder: Path) -> "Golden":
        """The weights, pattern, ids and gates of a golden folder."""
        with np.load(folder / "golden.npz") as stored:
            return cls(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
                ids=stored["ids"],
                pattern=np.loadtxt(folder / "pattern/full_attention_heads.tsv", delimiter="\t", ndmin=2),
                gates=stored["gates"],
                sink_size=int(stored["sink_size"]),
                recent_size=int(stored["recent_size"]),
            )

    def arrays(self) -> dict[str, Array]:
        """Everything that `golden.npz` holds (README.md says what each array is)."""
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}

        def gated(gates: Array, teacher: list[Tensor] | None = None) -> GatedAttention:
            return GatedAttention(torch.from_numpy(gates.astype(np.float32)), teacher=teacher, **sizes)

        full = run(self.model, self.ids)
        duo = run(self.model, self.ids, gated(self.pattern))
        mixed_self = run(self.model, self.ids, gated(self.gates))
        mixed_teacher = run(self.model, self.ids, gated(self.gates, full.attention))
        return {
            "ids": self.ids,
            "full_logits": full.logits,
            "duo_logits": duo.logits,
            "gates": self.gates,
            "full_hidden": full.hidden,
            "gated_hidden_self": mixed_self.hidden,
            "gated_hidden_teacher": mixed_teacher.hidden,
            "sink_size": np.int64(self.sink_size),
            "recent_size": np.int64(self.recent_size),
        } | ({"native": native} if (native := native_layers(self.model)).any() else {})

    def save(self, folder: Path, arrays: dict[str, Array]) -> None:
        """Write the folder: configuration, weights, `pattern/` and `golden.npz`."""
        self.model.save_pretrained(folder)
        (folder / "pattern").mkdir(exist_ok=True)
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        (folder / "pattern/config.json").write_text(json.dumps(sizes) + "\n")
        np.savetxt(folder / "pattern/full_attention_heads.tsv", self.pattern, delimiter="\t")
        np.savez_compressed(folder / "golden.npz", **arrays)


def native_layers(model: PreTrainedModel) -> Array:
    """True for each layer with a window of its own."""
    of_all = getattr(model.config, "sliding_window", None)
    return np.array([bool(getattr(layer.self_attn, "sliding_window", of_all)) for layer in model.model.layers])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Dense softmax attention, float32; query `[B, N, T, H]`, key and value `[B, K, T, H]`; returns `[B, T, N, H]`.

    `sinks`, one of each query head, are scores of a key without a value. `cap` is what scores are capped by.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


@dataclass(frozen=True)
class GatedAttention:
    """An attention for transformers: `gate * full + (1 - gate) * streaming` for every layer and KV head."""

    gates: Tensor  # [L, K]; zeros and ones make a pattern of streaming and retrieval heads
    sink_size: int
    recent_size: int
    teacher: list[Tensor] | None = None  # L x [B, T, N * H]: the full term; None: from the student's own q, k, v

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """One layer's attention before the output projection; transformers passes no mask to an unknown attention."""
        position = torch.arange(query.shape[2])
        i, j = position[:, None], position[None, :]
        causal = j <= i
        if sliding_window:
            return attend(query, key, value, causal & (j > i - sliding_window), scaling, s_aux, softcap), None
        streaming = causal & ((j < self.sink_size) | (j > i - self.recent_size))  # paper section 2.1
        narrow = attend(query, key, value, streaming, scaling, s_aux, softcap)
        if self.teacher is None:
            full = attend(query, key, value, causal, scaling, s_aux, softcap)
        else:
            full = self.teacher[module.layer_idx].view(narrow.shape)
        gate = self.gates[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1])[:, None]  # [N, 1]
        return gate * full + (1 - gate) * narrow, None


@dataclass(frozen=True)
class Outputs:
    """One forward pass: logits `[B, T, V]`, final-norm hidden states `[B, T, D]`, attention outputs of each layer."""

    logits: Array
    hidden: Array
    attention: list[Tensor]  # L x [B, T, N * H], before the output projection


@torch.no_grad()
def run(model: PreTrainedModel, ids: Array, attention: Callable[..., Any] | None = None) -> Outputs:
    """A forward pass with `attention`; with None, plain Hugging Face."""
    if attention is not None:
        AttentionInterface.register("golden", attention)
    model.set_attn_implementation("eager" if attention is None else "golden")
    recorded: list[Tensor] = []
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    hooks = [o_proj.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0])) for o_proj in projections]
    normed: list[Tensor] = []
    hooks.append(model.model.norm.register_forward_hook(lambda _, inputs, output: normed.append(output)))
    logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return Outputs(logits.numpy(), normed[0].numpy(), recorded)


def compare(stored: Path, arrays: dict[str, Array]) -> bool:
    """Print the largest difference of every array from the stored one; whether all are within the tolerance."""
    with np.load(stored) as golden:
        differences = {
            name: float(np.abs(np.subtract(array, golden[name], dtype=np.float64)).max())
            for name, array in arrays.items()
        }
        same = set(golden) == set(arrays) and all(golden[name].dtype == array.dtype for name, array in arrays.items())
    for name, difference in differences.items():
        print(f"{name:22} {difference:.1e}")
    return same and max(differences.values()) < TOLERANCE


def main() -> int:
    """Make a folder of a family, or recompute the outputs of an existing one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--family", choices=FAMILIES, help="make random weights of this row of the table")
    source.add_argument("--from", type=Path, dest="source", metavar="DIR", help="recompute DIR's outputs and compare")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; needed with --family")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("tokens", "sink_size", "recent_size"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=argparse.SUPPRESS, help="with --family; default: the family's")
    arguments = parser.parse_args()
    if arguments.family and not arguments.out:
        parser.error("--family needs --out DIR")
    changes = {key: value for key, value in vars(arguments).items() if key in ("tokens", "sink_size", "recent_size")}
    if arguments.source and changes:
        parser.error(f"--from takes these from the folder: {', '.join(changes)}")

    torch.set_num_threads(1)  # the sums' order, and so the last bits, do not depend on the machine's cores
    if arguments.source:
        golden = Golden.load(arguments.source)
    else:
        golden = Golden.random(replace(FAMILIES[arguments.family], **changes), arguments.seed)
    arrays = golden.arrays()
    if arguments.out:
        golden.save(arguments.out, arrays)
    return 0 if not arguments.source or compare(arguments.source / "golden.npz", arrays) else 1


if __name__ == "__main__":
    raise SystemExit(main())
