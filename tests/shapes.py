"""The models that tests share, and so their compiled programs: a test that needs no other uses `TINY`."""

from pathlib import Path

import pytest

from duo_jax import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
# Attention backends that do everything on a CPU, fast enough for tests.
ON_CPU = ("reference", "xla", "triton")
# Golden checkpoints: those with the parts of llama, and those of `Family.small` in tests/golden/make.py.
SMALL_FAMILIES = (
    "smollm3",
    "olmo3",
    "ministral",
    "ministral3",
    "phi3",
    "phi3_short",
    "granite",
    "seed_oss",
    "gemma2",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
)
FAMILIES = ("llama", "llama31", "mistral", "qwen2", "qwen3", "yarn", "linear", "gemma3_text", *SMALL_FAMILIES)


def families(*core: str, of: tuple[str, ...] = FAMILIES) -> list[object]:
    """Families as parameters; `make test` runs the core ones only."""
    return [pytest.param(name, marks=() if name in core else pytest.mark.full_matrix) for name in of]


def on_each_backend(cases: dict[str, object], triton: set[str]) -> list[object]:
    """Each backend with each case; of `triton`, which takes longest to compile, `make test` runs only these."""
    unknown = triton - cases.keys()
    assert not unknown, unknown
    return [
        pytest.param(
            backend,
            case,
            id=f"{name}-{backend}",
            marks=() if backend != "triton" or name in triton else pytest.mark.full_matrix,
        )
        for name, case in cases.items()
        for backend in ON_CPU
    ]


# A decoder small enough to compile in a second: GQA of 2, four KV heads in two layers.
TINY = ModelConfig(
    "llama",
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_positions=4096,
    dtype="float32",
    eos_ids=(2,),
)
