"""The interface of methods under comparison: prefill a prompt within a KV budget, then continue token by token.

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
        nbytes: allocated keys and values; sizes are rounded up, to limit compilation.
        held_nbytes: keys and values of the tokens held, which the budget limits.
        peak_nbytes: keys and values allocated during the prefill, including the temporary ones of one layer.
        metadata_nbytes: everything else that is stored for the sequence, such as positions and accumulated scores.
        read_nbytes: keys, values and bounds that a decode step reads on average; None: everything that is held.
    """

    nbytes: int
    held_nbytes: int
    peak_nbytes: int
    metadata_nbytes: int
    read_nbytes: int | None = None


class State(Protocol):
    """A sequence in the cache of a method."""

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""


class Method(ABC):
    """A way to hold a context; a frozen dataclass whose fields are its settings."""

    # For error messages.
    name: ClassVar[str]
    # The field that VALUE of NAME=VALUE on the command line sets, if any.
    value_field: ClassVar[str | None] = None
    # Whether it attends as the model does, in layers with a window of their own and with learned sinks too; a rule for
    # all tokens of a layer does not.
    knows_windows: ClassVar[bool] = False

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> "Method":
        """Make one from fields; those that depend on the tokenizer need not be given.

        Raises:
            ValueError: a field that is missing or wrong.
        """
        return cls(**options)

    @property
    def is_fixed(self) -> bool:
        """Whether it holds every prompt by one rule, whatever the budget, which is then 1."""
        return False

    def check(self, model: Model, budget: float, length: int) -> None:
        """Refuse whatever `begin` would refuse with any prompt of `length` tokens.

        Raises:
            ValueError: a budget outside (0, 1], or one that this method cannot meet there.
            NotImplementedError: a model with windows in some layers or with learned sinks, for a method without them.
        """
        if model.config.window_layers and not self.knows_windows:
            raise NotImplementedError(
                f"{self.name} has no rule for the {len(model.config.window_layers)} layers of this model that have a "
                "window of their own: compare full attention and head patterns"
            )
        if model.config.sink_logits and not self.knows_windows:
            raise NotImplementedError(
                f"{self.name} computes attention by itself and has no learned sinks, which all heads of this model "
                "have: compare full attention and head patterns"
            )
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"budget must be in (0, 1], a fraction of full attention's KV bytes, got {budget=}")

    def check_limit(self, budget: float, length: int, *, limit: int, least: int) -> None:
        """Refuse a budget that allows a head fewer tokens than this method needs; a shorter prompt is held whole.

        Raises:
            ValueError: `limit` tokens are fewer than `least`, and fewer than the prompt's.
        """
        if limit < min(length, least):
            raise ValueError(
                f"{budget=} of {length} tokens allows {limit} tokens per head; {self.name} needs {least}: raise the "
                "budget, or give a longer prompt"
            )

    @abstractmethod
    def begin(self, model: Model, tokens: ArrayLike, *, room: int, budget: float) -> tuple[Float[Array, "V"], Any]:
        """Prefill a whole prompt, all of it through the method.

        Args:
            model: the weights.
            tokens: `[T]` token ids of one sequence.
            room: tokens that may still be appended.
            budget: fraction of the KV bytes that full attention holds after `T` tokens, in (0, 1].

        Returns:
            Logits after the last token, float32, and the state from which to continue.

        Raises:
            ValueError: bad tokens or a budget that this method cannot meet, before any compute.
        """

    @abstractmethod
    def step(self, model: Model, token: int, state: Any) -> tuple[Float[Array, "V"], Any]:
        """Append one token: the logits after it, and the new state, which uses up the old one."""


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
