"""A needle in a stretch of text, and the question for it, as a prompt of an exact length in tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from duo_eval.tasks.needle.styles import Needle
from duo_eval.tasks.prompt import frame
from duo_jax.text.template import encode


@dataclass(frozen=True, eq=False)
class Hidden:
    """A prompt, where in it the needle begins, and how many tokens of it, at its end, ask for the needle."""

    tokens: Int32[np.ndarray, "T"]
    position: int
    asking: int


def hide(
    tokenizer: PreTrainedTokenizerBase,
    hay: Int32[np.ndarray, "S"],
    needle: Needle,
    rng: np.random.Generator,
    *,
    length: int,
    depth: float,
    use_chat: bool = True,
) -> Hidden:
    """Hide a needle at `depth` (0 the start, 1 the end) of so much text that the prompt has `length` tokens.

    Which stretch of the text that is, `rng` decides.

    Raises:
        ValueError: a depth outside [0, 1], or a text or length that is too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth=}")
    head, after = frame(tokenizer, use_chat=use_chat)
    tail = encode(tokenizer, needle.question + ("\n" if after is None else after) + needle.answer)
    sentence = encode(tokenizer, needle.sentence)
    room = length - len(head) - len(sentence) - len(tail)
    if not 0 < room <= len(hay):
        raise ValueError(f"{length=} leaves {room} tokens for text, which must be in [1, {len(hay)}] (all there is)")
    begin = int(rng.integers(0, len(hay) - room + 1))
    text = hay[begin : begin + room]
    cut = round(depth * room)
    tokens = [*head, *text[:cut], *sentence, *text[cut:], *tail]
    return Hidden(np.asarray(tokens, np.int32), len(head) + cut, len(tail))
