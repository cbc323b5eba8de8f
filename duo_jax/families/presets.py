"""PRESETS: the shapes of well-known models, for plans and for benchmarks with random weights."""

from dataclasses import replace

from duo_jax.model.config import ModelConfig
from duo_jax.model.rope import LinearRope, Llama3Rope, Rope, YarnRope

_GEMMA3 = ModelConfig(
    *("gemma3_text", 262208, 62, 5376, 32, 16, 128, 21504, 131072),
    rope=LinearRope(1e6, factor=8.0),
    norm_eps=1e-6,
    tied_head=True,
    qk_norm=True,
    eos_ids=(1, 106),
    layer_windows=((1024,) * 5 + (None,)) * 10 + (1024, 1024),
    window_rope=Rope(1e4),
    activation="gelu_pytorch_tanh",
    embed_scale=5376**0.5,
    query_scale=(128 / 168) ** 0.5,
    norm_offset=True,
    post_norms=True,
)
_GPT_OSS = ModelConfig(
    *("gpt_oss", 201088, 36, 2880, 64, 8, 64, 2880, 131072),
    rope=YarnRope(150000.0, factor=32.0, original_max_position_embeddings=4096, truncate=False),
    qkv_bias=True,
    out_bias=True,
    eos_ids=(200002, 199999, 200012),
    layer_windows=(128, None) * 18,
    sink_logits=True,
    num_experts=128,
    experts_per_token=4,
    expert_dim=2880,
    expert_bias=True,
    normalize_experts=True,
    swiglu_limit=7.0,
)
_LLAMA3 = ModelConfig("llama", 128256, 32, 4096, 32, 8, 128, 14336, 8192, Rope(500000.0), eos_ids=(128001, 128009))
_LLAMA31_ROPE = Llama3Rope(500000.0, factor=8.0)

PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": ModelConfig("llama", 32000, 32, 4096, 32, 32, 128, 11008, 4096, eos_ids=(2,)),
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": replace(_LLAMA3, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28672),
    "llama-3.1-8b": replace(_LLAMA3, rope=_LLAMA31_ROPE, max_positions=131072),
    "llama-3.1-70b": replace(
        _LLAMA3, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28672, rope=_LLAMA31_ROPE, max_positions=131072
    ),
    "mistral-7b": ModelConfig("mistral", 32768, 32, 4096, 32, 8, 128, 14336, 32768, Rope(1e6), eos_ids=(2,)),
    "qwen2.5-7b": ModelConfig(
        "qwen2", 152064, 28, 3584, 28, 4, 128, 18944, 32768, Rope(1e6), 1e-6, qkv_bias=True, eos_ids=(151645,)
    ),
    "qwen3-8b": ModelConfig(
        "qwen3", 151936, 36, 4096, 32, 8, 128, 12288, 40960, Rope(1e6), 1e-6, qk_norm=True, eos_ids=(151645,)
    ),
    "qwen3-30b-a3b": ModelConfig(
        *("qwen3_moe", 151936, 48, 2048, 32, 4, 128, 6144, 40960, Rope(1e6), 1e-6),
        qk_norm=True,
        eos_ids=(151645,),
        num_experts=128,
        experts_per_token=8,
        expert_dim=768,
        normalize_experts=True,
    ),
    "mixtral-8x7b": ModelConfig(
        *("mixtral", 32000, 32, 4096, 32, 8, 128, 14336, 32768, Rope(1e6)),
        eos_ids=(2,),
        num_experts=8,
        experts_per_token=2,
        expert_dim=14336,
        normalize_experts=True,
    ),
    "gpt-oss-20b": replace(_GPT_OSS, num_layers=24, layer_windows=(128, None) * 12, num_experts=32),
    "gpt-oss-120b": _GPT_OSS,
    "gemma-3-270m": replace(
        _GEMMA3,
        vocab_size=262144,
        num_layers=18,
        embed_dim=640,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=2048,
        max_positions=32768,
        rope=Rope(1e6),
        eos_ids=(1,),  # The base model's; the instruction-tuned one ends a turn with 106.
        layer_windows=((512,) * 5 + (None,)) * 3,
        embed_scale=640**0.5,
        query_scale=1.0,
    ),
    "gemma-3-27b": _GEMMA3,
    "smollm2-135m": ModelConfig(
        "llama", 49152, 30, 576, 9, 3, 64, 1536, 8192, Rope(100000.0), tied_head=True, eos_ids=(2,)
    ),
}
