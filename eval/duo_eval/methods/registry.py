"""The methods under comparison by name, and the loop that generates with any of them.

A method is a file in this folder and its row in `METHODS`. Knows no tasks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.expected_attention import ExpectedAttention
from duo_eval.methods.fastgen import FastGen
from duo_eval.methods.h2o import H2O
from duo_eval.methods.kvzip import KVzip
from duo_eval.methods.method import Memory, Method, State
from duo_eval.methods.patterns import Duo, Full, RandomHeads
from duo_eval.methods.quest import DuoQuest
from duo_eval.methods.snapkv import SnapKV
from duo_eval.methods.streamingllm import StreamingLLM
from duo_eval.methods.tova import TOVA
from duo_jax import Model
from duo_jax.arguments import spelling, whole_number
from duo_jax.generation.token_loop import Generator
from duo_jax.text.ends import eos_ids_of, stop_ends
from duo_jax.text.reply import Row
from duo_jax.text.tokenizer import TextTokenizer

__all__ = ["METHODS", "Memory", "Method", "State", "greedy", "method", "reply"]

# By the command line's name.
METHODS: dict[str, type[Method]] = {
    "full": Full,
    "duo": Duo,
    "duo+quest": DuoQuest,
    "random-heads": RandomHeads,
    "streamingllm": StreamingLLM,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "fastgen": FastGen,
    "expected-attention": ExpectedAttention,
    "kvzip-tokens": KVzip,
}


def method(
    text: str,
    *,
    model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    defaults: Mapping[str, Any] | None = None,
    **options: Any,
) -> Method:
    """A method from the command line: `full`, `h2o`, `duo=FOLDER`, `random-heads=SEED`, `snapkv:window=64,pool=5`, ...

    Args:
        text: NAME or NAME=VALUE, the name one of `METHODS`; then fields of the method after a colon, if any.
        model: path or name of the model whose published pattern `duo` and `duo+quest` without a value use.
        tokenizer: needed by methods that distinguish tokens by their text.
        defaults: values of fields that the text does not set, for methods that have all of these fields.
        **options: further fields of the method, such as `block=128`.

    Raises:
        ValueError: an unknown method or field, or a value that the method does not take.
    """
    if model is not None:  # A published pattern has the name of its model.
        text = re.sub(r"^(duo(?:\+\w+)?)(?=:|$)", rf"\1={Path(model).name.lower()}", text)
    named, settings = _SETTINGS.fullmatch(text).groups()  # type: ignore[union-attr]
    name, equals, value = named.partition("=")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    kind = METHODS[name]
    if equals and kind.value_field is None:
        raise ValueError(f"{name} takes no value, got ={value}")
    known = {field.name: field.default for field in fields(kind)} if is_dataclass(kind) else dict[str, Any]()
    pairs = [setting.split("=") for setting in settings.split(",")] if settings else []
    written = dict[str, str](pairs)
    if len(written) < len(pairs):
        raise ValueError(f"{name} takes every setting once, got {settings}")
    unknown = sorted(set(written | options) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    values: dict[str, Any] = {
        field: _number(f"{name}:{field}", number, known[field]) for field, number in written.items()
    }
    if equals and kind.value_field:
        default, shown = known[kind.value_field], f"{name}={kind.value_field.upper()}"
        values[kind.value_field] = value if default is MISSING else _number(shown, value, default)
    usual = defaults if defaults and set(defaults) <= set(known) else {}
    spell, own = spelling.get(), {**options, **values}
    named_here = spelling.set(lambda field: f"{name}:{field}" if field in own else spell(field))
    try:
        return kind.create(tokenizer, **{**usual, **own})
    finally:
        spelling.reset(named_here)


# A method with its value, and its settings; a path may contain colons.
_SETTINGS = re.compile(r"(.*?)(?::(\w+=[^,=:/\\]*(?:,\w+=[^,=:/\\]*)*))?", re.DOTALL)


def _number(setting: str, text: str, default: Any) -> bool | int | float:
    """A setting's value, of the type that its default has; a number where there is none by default."""
    kind = float if default is None else type(default)
    try:
        return {"true": True, "false": False}[text] if kind is bool else {int: int, float: float}[kind](text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "set only in Python")
        raise ValueError(f"{setting} is {expected}, got {text!r}") from None


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
    """Continue one prompt with the likeliest tokens; the whole prompt goes through the method.

    Args:
        method: holds the context.
        model: the weights.
        tokens: `[T]` token ids.
        max_new_tokens: of the answer.
        eos_ids: tokens that end it.
        budget: fraction of the KV bytes that full attention holds.
        later: last tokens of the prompt that are appended one by one, as with a question about a stored document: the
            method does not know them during the prefill of the rest, to which the budget then applies.

    Returns:
        The new tokens, including an EOS token that ended them, and the bytes of the sequence before `later` tokens; of
        these, what a step reads is the mean over all steps.

    Raises:
        ValueError: what `Method.begin` refuses, fewer than one new token, or nothing before what comes later.
    """
    tokens = np.asarray(tokens)
    whole_number("max_new_tokens", max_new_tokens, 1)
    whole_number("later", later, 0, max(0, tokens.size - 1), way=f"the prompt has {tokens.size} tokens")
    first = tokens.size - later
    logits, state = method.begin(model, tokens[:first], room=later + max_new_tokens, budget=budget)
    memory = state.memory
    for token in tokens[first:]:
        logits, state = method.step(model, int(token), state)
    newest = [state]
    generator = Generator(eos_ids=tuple(eos_ids), step=partial(_step, method, newest))
    steps = generator.stream(model, logits[None], state, max_new_tokens)
    new = [int(step.token[0]) for step in steps]
    return new, memory._replace(read_nbytes=newest[0].memory.read_nbytes)


def reply(
    method: Method,
    model: Model,
    tokenizer: TextTokenizer,
    tokens: ArrayLike,
    *,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    **options: Any,
) -> tuple[str, int, Memory]:
    """Continue one prompt as text: the text up to the first stop string, the number of new tokens, and the memory.

    It ends as a reply of `duo_jax.LM` does; `eos_ids` as there. `options` are those of `greedy`.
    """
    eos_ids = eos_ids_of(model.config, tokenizer) if eos_ids is None else eos_ids
    ends = stop_ends(tokenizer, model.config.vocab_size, eos_ids, stop)
    new, memory = greedy(method, model, tokens, eos_ids=ends.ids, **options)
    row = Row(tokenizer, ends)
    for token in new:
        row.add(token)
        if row.stopped:
            break
    return str(row.reply), len(new), memory


def _step(
    method: Method,
    newest: list[Any],
    model: Model,
    token: Int32[Array, "1"],
    state: Any,
    active: Array,
    backend: str | None,
) -> tuple[Float[Array, "1 V"], Any]:
    """A method's step as the generator calls it; `newest` then has the state after it."""
    logits, newest[0] = method.step(model, int(token[0]), state)
    return logits[None], newest[0]
