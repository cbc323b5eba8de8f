"""DuoAttention for JAX: long contexts in which only retrieval heads keep a full KV cache (arXiv 2410.10819)."""

import logging

import lazy_loader

__version__ = "0.1.0"

# transformers warns at import that torch is missing. It is not needed: only configurations and tokenizers are used.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

# The stub next to this file lists the names and where they are. Each is imported when it is first used, so that `import
# duo_jax` and `duo --help` do not wait for flax, transformers and qwix.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
