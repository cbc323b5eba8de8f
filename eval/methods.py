"""The methods under comparison by name, and the one loop that generates with any of them.

`METHODS` is the table: a method is a file in `eval/baselines/` and its row here. Knows no tasks.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from duo_jax import Model
from eval.baselines.fastgen import FastGen
from eval.baselines.h2o import H2O
from eval.baselines.method import Memory, Method, State
from eval.baselines.pools import Duo, Full, RandomHeads
from eval.baselines.snapkv import SnapKV
from eval.baselines.streamingllm import StreamingLLM
from eval.baselines.tova import TOVA

__all__ = ["METHODS", "Memory", "Method", "State", "greedy", "method"]

# By the command line's name.
METHODS: dict[str, type[Method]] = {
    "full": Full,
    "duo": Duo,
    "random-heads": RandomHeads,
    "streamingllm": StreamingLLM,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "fastgen": FastGen,
}


def method(text: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Method:
    """A method from the command line: `full`, `h2o`, `duo=FOLDER`, `random-heads=SEED`, ...

    Args:
        text: NAME or NAME=VALUE, the name one of `METHODS`.
        tokenizer: needed by methods that tell tokens apart by their text.
        **options: fields of the method, such as `block=128`.

    Raises:
        ValueError: an unknown method or field, or a value that the method does not take.
    """
    name, given, value = text.partition("=")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    kind = METHODS[name]
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else list[str]()
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return kind.create(value if given else None, tokenizer, **options)


def greedy(
    method: Method,
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    eos_ids: Iterable[int] = (),
    budget: float = 1.0,
    later: int = 0,
) -> tuple[list[int], Memory]:
    """Continue one prompt, always by the likeliest token, the whole prompt through the method.

    Args:
        method: holds the context.
        model: the weights.
        tokens: `[T]` token ids.
        max_new_tokens: of the answer.
        eos_ids: tokens that end it.
        budget: fraction of the KV bytes that full attention holds.
        later: last tokens of the prompt that come one by one, like what is said after a document was read: the method
            does not know them while it takes in the rest, of which the budget is a fraction then.

    Returns:
        The new tokens, an EOS token that ended them included, and the bytes that the sequence took after what was
        taken in.

    Raises:
        ValueError: what `Method.begin` refuses, fewer than one new token, or nothing before what comes later.
    """
    tokens = np.asarray(tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= later < max(1, tokens.size):
        raise ValueError(f"later must be at least 0 and less than the {tokens.size} tokens of the prompt, got {later=}")
    ends = frozenset(eos_ids)
    first = tokens.size - later
    logits, state = method.begin(model, tokens[:first], room=later + max_new_tokens, budget=budget)
    memory = state.memory
    for token in tokens[first:]:
        logits, state = method.step(model, int(token), state)
    answer = [int(jnp.argmax(logits))]
    while len(answer) < max_new_tokens and answer[-1] not in ends:
        logits, state = method.step(model, answer[-1], state)
        answer.append(int(jnp.argmax(logits)))
    return answer, memory
