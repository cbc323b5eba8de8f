"""What a measurement needs of an engine. Knows no engine."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from duo_eval.speed.engines.subject import Subject
from duo_jax import HeadPattern


class Engine(Protocol):
    """Prefills a batch of prompts, then decodes one token a row at a time; calls return when the work is done."""

    compile_seconds: dict[str, float]
    kv_bytes: int

    def __init__(self, subject: Subject, pattern: HeadPattern | None, *, room: int, **options: Any) -> None:
        """Load the weights; `room` is how many tokens will be decoded after a prompt.

        Raises:
            NotImplementedError: what this engine cannot do, or what it needs and is not here.
        """
        ...

    def warm_up(self, tokens: Int[np.ndarray, "B T"]) -> None:
        """Compile and allocate what these prompts need."""
        ...

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Any:
        """Start over and compute prompts: the logits `[B, V]` after them."""
        ...

    def decode(self, token: Int[np.ndarray, "B"]) -> Any:
        """Append one token a row: the logits `[B, V]` after it."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes: `peak`, the most that was needed so far, and `now`, what is held."""
        ...
