# The public API: each name is imported when it is first used.
from .cache.cache import KVCache
from .certified import certify
from .checkpoint.load import load_model
from .checkpoint.open import load_tokenizer
from .checkpoint.save import save_model
from .families.presets import PRESETS
from .generation.generation import generate, stream
from .generation.infer import Scores, decode_step, prefill, score
from .generation.sampling import Categorical, Greedy, MinP, RepetitionPenalty, Temperature, TopK, TopP
from .generation.token_loop import Generation, Step, Stream
from .mesh.mesh import make_mesh
from .model.config import ModelConfig
from .model.model import Model
from .pattern.files import published_patterns
from .pattern.pattern import HeadPattern
from .plan import Plan
from .text.chat import Chat
from .text.document import Document
from .text.lm import LM, TextStream, load
from .text.reply import Reply

__version__: str

__all__ = [
    "LM",
    "PRESETS",
    "Categorical",
    "Chat",
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
    "certify",
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
