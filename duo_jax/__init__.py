"""DuoAttention for JAX: long contexts in which only retrieval heads keep a full KV cache (arXiv 2410.10819)."""

from duo_jax.cache.cache import KVCache
from duo_jax.checkpoint import load_model, load_tokenizer, save_model
from duo_jax.config import PRESETS, ModelConfig
from duo_jax.generate import generate, stream
from duo_jax.infer import Scores, decode_step, prefill, score
from duo_jax.mesh.mesh import make_mesh
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern, published_patterns
from duo_jax.plan import Plan
from duo_jax.sampling import Categorical, Greedy, MinP, RepetitionPenalty, Temperature, TopK, TopP
from duo_jax.text.lm import LM, Document, TextStream, load
from duo_jax.text.reply import Reply
from duo_jax.token_loop import Generation, Step, Stream

__version__ = "0.1.0"

__all__ = [
    "LM",
    "PRESETS",
    "Categorical",
    "Document",
    "Generation",
    "Greedy",
    "HeadPattern",
    "KVCache",
    "MinP",
    "Model",
    "ModelConfig",
    "Plan",
    "RepetitionPenalty",
    "Reply",
    "Scores",
    "Step",
    "Stream",
    "Temperature",
    "TextStream",
    "TopK",
    "TopP",
    "decode_step",
    "generate",
    "load",
    "load_model",
    "load_tokenizer",
    "make_mesh",
    "prefill",
    "published_patterns",
    "save_model",
    "score",
    "stream",
]
