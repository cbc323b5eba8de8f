"""The interface of an engine. Knows no engine."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from jaxtyping import Int

from duo_eval.speed import device
from duo_eval.speed.bench_model import BenchModel
from duo_jax import HeadPattern


class Engine(ABC):
    """Prefills a batch of prompts, then decodes one token a row at a time; calls return when the work is done.

    Attributes:
        compile_seconds: by phase.
        kv_bytes: bytes of keys and values that the cache has room for.
    """

    compile_seconds: dict[str, float]
    kv_bytes: int

    @abstractmethod
    def __init__(self, model: BenchModel, pattern: HeadPattern, *, room: int, **options: Any) -> None:
        """Load the weights; `room` is the number of tokens that will be decoded after a prompt.

        Raises:
            NotImplementedError: the engine does not support this, or needs something that is not installed.
        """

    @abstractmethod
    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """Compile and allocate what these prompts need."""

    @abstractmethod
    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Any:
        """Start again with an empty cache and compute prompts: the logits `[B, V]` after them."""

    @abstractmethod
    def decode(self, token: Int[np.ndarray, "B"]) -> Any:
        """Append one token to each row: the logits `[B, V]` after it."""

    def memory(self) -> dict[str, int]:
        """Bytes in use: `peak`, the most so far, and `now`."""
        return device.memory()
