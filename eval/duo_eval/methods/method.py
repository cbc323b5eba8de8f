"""What every method under comparison offers: take in a prompt within a KV budget, then go on token by token.

Knows no model internals, no tasks and no text.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from duo_jax import Model
from duo_jax.checks import check_prompt


class Memory(NamedTuple):
    """Bytes that one sequence takes.

    Attributes:
        nbytes: keys and values really allocated; sizes are rounded up, so that few programs are compiled.
        held_nbytes: keys and values of the tokens held: what the budget counts.
        peak_nbytes: keys and values allocated while the prompt was taken in, with what one layer needs beside them.
        metadata_nbytes: everything else that is kept for the sequence, such as positions and accumulated scores.
    """

    nbytes: int
    held_nbytes: int
    peak_nbytes: int
    metadata_nbytes: int


class State(Protocol):
    """A sequence as a method holds it."""

    @property
    def memory(self) -> Memory:
        """Bytes that it takes now."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""


class Method(ABC):
    """A way to hold a context; a frozen dataclass whose fields are its settings."""

    # As shown in tables and stored in results.
    name: ClassVar[str]

    @classmethod
    def create(cls, value: str | None, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> "Method":
        """Make one from the command line's NAME or NAME=VALUE; `options` are fields.

        Raises:
            ValueError: a value that the method does not take, or lacks.
        """
        if value is not None:
            raise ValueError(f"{cls.name} takes no value, got ={value}")
        return cls(**options)

    def check(self, model: Model, budget: float, length: int) -> None:
        """Refuse what `begin` would refuse of any prompt of `length` tokens.

        Raises:
            ValueError: a budget outside (0, 1], or one that this method cannot meet there.
        """
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"budget must be in (0, 1], a fraction of full attention's KV bytes, got {budget=}")

    @abstractmethod
    def begin(self, model: Model, tokens: ArrayLike, *, room: int, budget: float) -> tuple[Float[Array, "V"], Any]:
        """Take in a whole prompt, all of it through the method.

        Args:
            model: the weights.
            tokens: `[T]` token ids of one sequence.
            room: tokens that may still be appended.
            budget: fraction of the KV bytes that full attention holds after `T` tokens, in (0, 1].

        Returns:
            Logits after the last token, float32, and the state to go on from.

        Raises:
            ValueError: bad tokens or a budget that this method cannot meet, before any compute.
        """

    @abstractmethod
    def step(self, model: Model, token: int, state: Any) -> tuple[Float[Array, "V"], Any]:
        """Append one token: the logits after it, and the new state; the old one is gone."""


def check_arguments(model: Model, tokens: ArrayLike, room: int) -> Int32[np.ndarray, "T"]:
    """The prompt as int32.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, negative room.
    """
    if room < 0:
        raise ValueError(f"room must be at least 0, got {room=}")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one sequence [T], got {tokens.shape=}")
    checked, _ = check_prompt(model.config, tokens[None], None)
    return np.asarray(checked[0])
