"""Passkey retrieval (Mohtashami & Jaggi 2023): a number hidden in a long text, and the question for it."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

# Measured on SmolLM2-135M-Instruct at 1024 tokens: 8 of 8 found with these words, 2 of 8 with "the pass key is ...".
NEEDLE = "\nRemember this. The passkey of the vault is {key}.\n"
QUESTION = "\nBased on the text above: what is the passkey of the vault?"
ANSWER = "The passkey of the vault is"


@dataclass(frozen=True)
class Passkey:
    """One task: the prompt's tokens, the key to find, and the position of its needle."""

    tokens: np.ndarray
    key: str
    position: int

    def is_right(self, answer: str) -> bool:
        """Whether an answer gives the key before any other number."""
        digits = "".join(character if character.isdigit() else " " for character in answer).split()
        return bool(digits) and digits[0] == self.key


def passkey(tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, depth: float, seed: int) -> Passkey:
    """Hide a five-digit key at `depth` (0 the start, 1 the end) of so much text that the prompt has `length` tokens.

    The prompt is a chat message where the tokenizer has a template, and the answer's first words are given, so that a
    small model need not find the form of an answer. Which stretch of text is used depends on the seed.

    Raises:
        ValueError: a depth outside [0, 1], or a text or length that is too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth=}")
    rng = np.random.default_rng(seed)
    key = str(rng.integers(10000, 100000))
    head, tail = _frame(tokenizer)
    needle = tokenizer.encode(NEEDLE.format(key=key), add_special_tokens=False)
    hay = tokenizer.encode(text, add_special_tokens=False)
    room = length - len(head) - len(needle) - len(tail)
    if not 0 < room <= len(hay):
        raise ValueError(f"{length=} leaves {room} tokens for text, which must be in [1, {len(hay)}] (all there is)")
    begin = int(rng.integers(0, len(hay) - room + 1))
    hay = hay[begin : begin + room]
    cut = round(depth * room)
    tokens = [*head, *hay[:cut], *needle, *hay[cut:], *tail]
    return Passkey(np.asarray(tokens, np.int32), key, len(head) + cut)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after the text."""
    if tokenizer.chat_template:
        hole = "<<text>>"
        message = [{"role": "user", "content": hole + QUESTION}]
        frame = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        before, after = frame.split(hole)
        head = tokenizer.encode(before, add_special_tokens=False)
    else:
        head, after = tokenizer.encode(""), QUESTION + "\n"
    return head, tokenizer.encode(after + ANSWER, add_special_tokens=False)
