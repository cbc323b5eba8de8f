"""`duo eval families`: families of models in one table, with the errors of golden checkpoints, and what is refused."""

import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_jax.cache.cache import KVCache
from duo_jax.checkpoint.load import load_model
from duo_jax.families.hugging_face import TEXT_OF, UNSUPPORTED
from duo_jax.families.table import FAMILIES
from duo_jax.generation.infer import prefill
from duo_jax.model.config import ModelConfig
from duo_jax.pattern.pattern import HeadPattern

# Positions of a golden checkpoint's texts that are compared; the tests compare all.
POSITIONS = 16
# Published models of each family.
MODELS = {
    "llama": "Llama 2 to 3.3, SmolLM2, TinyLlama, Yi",
    "mistral": "Mistral 0.1 to 0.3, Nemo, Small",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 (dense)",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "gpt_oss": "gpt-oss",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4",
    "granite": "Granite 3, 4 (dense)",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "olmo3": "OLMo 3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
}
# What a field of a configuration means, for those that only some families have.
PARTS = {
    "qkv_bias": "biases",
    "qk_norm": "q/k-norm",
    "wide_qk_norm": "q/k-norm of all heads together",
    "layer_windows": "windows",
    "window_rope": "a RoPE for windows",
    "no_rope_layers": "layers without RoPE",
    "rotary_dim": "partial RoPE, LongRoPE",
    "norm_offset": "1 + w in norms",
    "pre_norms": "no norms of inputs",
    "post_norms": "norms of outputs",
    "embed_scale": "scaled embeddings",
    "query_scale": "scaled scores",
    "query_log_scale": "scores scaled by position",
    "residual_scale": "scaled residuals",
    "logits_divisor": "scaled logits",
    "score_cap": "capped scores",
    "logits_cap": "capped logits",
    "sink_logits": "learned sinks",
    "num_experts": "experts",
}
# How a family was tested other than by golden checkpoints.
TESTED = {"llama": "SmolLM2-135M's weights", "gemma3_text": "Gemma 3 270M's weights"}


@dataclass(frozen=True)
class Families:
    """Measure how far golden checkpoints are from transformers' outputs: those that have no result yet."""

    golden: Path = Path("tests/golden")
    """Folder with golden checkpoints, in a clone of this project."""
    out: Path = Path("families.json")
    """File to write, or to add to."""

    def run(self) -> None:
        """Measure, write, print."""
        checkpoints = sorted(path.parent for path in self.golden.glob("*/golden.npz"))
        if not checkpoints:
            raise ValueError(f"--golden {self.golden} has no golden checkpoint: give tests/golden of a clone")
        record = Record.open(self.out, {"task": "families"})
        done = {result["checkpoint"] for result in record.results}
        with record.writing() as append:
            for checkpoint in tqdm([each for each in checkpoints if each.name not in done], disable=None):
                append(None, {"checkpoint": checkpoint.name, **errors(checkpoint)})
        print(families_table(self.out))


def errors(checkpoint: Path) -> dict[str, Any]:
    """The family of a golden checkpoint, and the largest errors of its logits: full attention, streaming heads."""
    with np.load(checkpoint / "golden.npz") as stored:
        arrays = {name: stored[name] for name in ("ids", "full_logits", "duo_logits")}
    model, pattern = load_model(checkpoint, dtype="float32"), HeadPattern.load(checkpoint / "pattern")
    length = arrays["ids"].shape[1]
    # A row for each of some positions of the two texts, with the tokens up to it.
    lengths = np.linspace(1, length, POSITIONS).round().astype(int)
    text = np.arange(POSITIONS) % 2
    largest = {}
    for kind, heads in (("full", None), ("duo", pattern)):
        cache = KVCache.init(model.config, heads, len(text), length, dtype="float32")
        logits, _ = prefill(model, arrays["ids"][text], cache, lengths=lengths, chunk_size=48)
        wanted = arrays[f"{kind}_logits"][text, lengths - 1]
        largest[kind] = float(np.abs(np.asarray(logits) - wanted).max())
    return {"family": model.config.family, "tokens": length, **largest}


def families_table(path: Path) -> str:
    """A row for each family: models, parts, golden errors, how it was tested."""
    head, results = read(path)
    rows = []
    for family, row in FAMILIES.items():
        own = [result for result in results if result["family"] == family]
        cells = [f"{max(result[kind] for result in own):.0e}" if own else "not measured" for kind in ("full", "duo")]
        tested = ", ".join(["golden", *([TESTED[family]] if family in TESTED else [])])
        rows.append([f"`{family}`", MODELS.get(family, ""), parts(row), *cells, tested])
    headers = ["family", "models", "parts besides Llama's", "error, full", "error, streaming", "tested with"]
    return f"{rows_to_table(rows, headers, 'lllrrl')}\n\n{origin(head['runs'], head['runs'][-1]['command'])}"


def parts(row: dict[str, Any]) -> str:
    """What a family has besides the parts of Llama, or may have."""
    order = [field.name for field in fields(ModelConfig)]
    return ", ".join(PARTS[name] for name in sorted(row, key=order.index) if name in PARTS)


def refused_table() -> str:
    """What is refused by name: the setting that shows it, and examples."""
    rows = [[part, f"`{key}`", examples] for key, (part, examples) in UNSUPPORTED.items()]
    return rows_to_table(rows, ["refused", "setting", "models"], "lll")


def short_list() -> str:
    """Models of all families, in a few lines."""
    names = [MODELS[family] for family in FAMILIES if family in MODELS]
    whole = " and ".join(f"`{name}`" for name in TEXT_OF)
    text = f"{'; '.join(names)}; of {whole} checkpoints with images, the text model."
    return textwrap.fill(text, 140, break_on_hyphens=False)


RESULT = ResultType("Families", of_task("families"), {"Largest errors of golden checkpoints": families_table})
