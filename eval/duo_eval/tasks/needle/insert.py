"""Insert a needle into a stretch of text and append its question, for a prompt of an exact length in tokens."""

from dataclasses import dataclass

import numpy as np
from duo_train.data.needles import beginning
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from duo_eval.tasks.needle.styles import Needle
from duo_eval.tasks.prompt import frame
from duo_jax.text.tokens import encode, encode_inside


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """A prompt that contains a needle at `position`; its last `question_length` tokens ask for it.

    Attributes:
        tokens: the prompt.
        position: of the needle's first token.
        question_length: tokens of the question.
        is_text: True for the tokens of the text around the needle.
        right: tokens that answer the question.
    """

    tokens: Int32[np.ndarray, "T"]
    position: int
    question_length: int
    is_text: Bool[np.ndarray, "T"]
    right: Int32[np.ndarray, "R"]


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
    position = len(head) + cut
    is_text = np.zeros(len(tokens), bool)
    is_text[len(head) : len(tokens) - len(tail)] = True
    is_text[position : position + len(sentence)] = False
    answered = encode_inside(tokenizer, needle.question + after + needle.answer + needle.right)
    # A tokenizer may join the answer's first words with the next ones; the prompt has them already.
    is_joined = answered[: len(tail)] != tail
    right = encode_inside(tokenizer, needle.right) if is_joined else answered[len(tail) :]
    return NeedlePrompt(np.asarray(tokens, np.int32), position, len(tail), is_text, np.asarray(right, np.int32))
