"""Insert a needle into a stretch of text and append its question, for a prompt of an exact length in tokens."""

from dataclasses import dataclass

import numpy as np
from duo_train.data.needles import beginning
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from duo_eval.tasks.needle.styles import Needle
from duo_eval.tasks.prompt import frame
from duo_jax.text.tokens import encode, encode_inside


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """A prompt that contains a needle at `position`; its last `question_length` tokens ask for it."""

    tokens: Int32[np.ndarray, "T"]
    position: int
    question_length: int


def insert_needle(
    tokenizer: PreTrainedTokenizerBase,
    hay: Int32[np.ndarray, "S"],
    needle: Needle,
    rng: np.random.Generator,
    *,
    length: int,
    depth: float,
    use_chat: bool = True,
) -> NeedlePrompt:
    """Put a needle at `depth` (0 the start, 1 the end) of a random stretch of text, for a prompt of `length` tokens.

    Raises:
        ValueError: a depth outside [0, 1], or a text or length that is too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth=}")
    around = frame(tokenizer, use_chat=use_chat)
    before, after = around or ("", "\n")
    head = encode(tokenizer, before) if around else beginning(tokenizer)
    tail = encode_inside(tokenizer, needle.question + after + needle.answer)
    sentence = encode_inside(tokenizer, needle.sentence)
    room = length - len(head) - len(sentence) - len(tail)
    if not 0 < room <= len(hay):
        raise ValueError(
            f"{length=} leaves {room} tokens for text, which must be in [1, {len(hay)}], the length of the haystack"
        )
    begin = int(rng.integers(0, len(hay) - room + 1))
    text = hay[begin : begin + room]
    cut = round(depth * room)
    tokens = [*head, *text[:cut], *sentence, *text[cut:], *tail]
    return NeedlePrompt(np.asarray(tokens, np.int32), len(head) + cut, len(tail))
