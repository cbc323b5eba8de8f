"""Attention over arrays, for heads of two types; knows nothing of models, caches, patterns or Flax."""

from pallas_kernels.backends import BACKENDS
from pallas_kernels.ops import append_token, decode_attention, full_attention, gated_attention, prefill_attention
from pallas_kernels.types import Heads, Pools, TokenShards, Unsupported
from pallas_kernels.window import Window

__all__ = [
    "BACKENDS",
    "Heads",
    "Pools",
    "TokenShards",
    "Unsupported",
    "Window",
    "append_token",
    "decode_attention",
    "full_attention",
    "gated_attention",
    "prefill_attention",
]
