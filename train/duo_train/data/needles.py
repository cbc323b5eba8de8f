"""Needle data (paper section 2.2): passkeys hidden in a long text, and a tail that asks for all of them in turn.

Sample i depends on (seed, i) only: not on how many were drawn before, nor on which process draws it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from duo_train.data.haystack import DEFAULT, load_haystack
from duo_train.data.vocabulary import NATO, ORDINALS

# For templates that tell the day: a sample must not depend on when it is made.
DATE = "26 Jul 2024"
# Stands for the text while a chat template is filled in; no template changes it.
HOLE = "<<the text>>"


@dataclass(frozen=True)
class Needles:
    """What the samples are like. The defaults are the paper's."""

    haystack: str = DEFAULT
    """Text to hide passkeys in: pydoc (Python's own reference pages), essays (fetched by pip), a text or .jsonl[.zst]
    file, a folder of them, or a hub data set such as hub:kmfoda/booksum:chapter."""
    haystack_chars: int | None = 20_000_000
    """Characters of the haystack to read at most; a hub data set is downloaded no further."""
    num_passkeys: int = 10
    """Passkeys in a sample."""
    passkey_words: int = 32
    """Words in a passkey."""
    vocabulary: tuple[str, ...] = NATO
    """Words that passkeys are drawn from."""
    distinct_words: bool = False
    """Draw no word twice in a sample. Else what follows a word in one passkey may follow it in another too."""
    min_depth: float = 0.05
    """Where in the text the first passkey may lie: 0 its start, 1 its end."""
    max_depth: float = 0.95
    """Where in the text the last passkey may lie."""
    min_length: int = 1000
    """Tokens of text in the shortest sample, passkeys and questions not counted."""
    max_length: int = 32000
    """Tokens of text in the longest sample."""
    num_lengths: int = 50
    """Different lengths, evenly spaced from the shortest to the longest."""
    chat: bool = True
    """Put the sample into the tokenizer's chat template, where it has one."""
    label_tokens: Literal["passkeys", "tail"] = "passkeys"
    """Which tokens the loss looks at: the passkeys of the answers (the paper) or all of the questions and answers (the
    reference implementation)."""
    num_samples: int | None = None
    """Different samples; training goes round them. None: a new one every time."""
    seed: int = 0
    """Sample i depends on this and i alone."""
    needle: str = "\nRemember this. The {ordinal} passkey of the vault is: {words}.\n"
    """What is hidden."""
    question: str = "\nBased on the text above: what is the {ordinal} passkey of the vault?"
    """What is asked for each passkey."""
    answer: str = "The {ordinal} passkey of the vault is: {words}."
    """The right answer."""

    def __post_init__(self) -> None:
        """Check what can be checked without a text.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        if not 1 <= self.num_passkeys <= len(ORDINALS):
            raise ValueError(
                f"num_passkeys must be in [1, {len(ORDINALS)}], for which there are ordinals, got {self.num_passkeys=}"
            )
        if self.passkey_words < 1 or not self.vocabulary:
            raise ValueError(f"a passkey needs words, got {self.passkey_words=} of {len(self.vocabulary)} words")
        if self.distinct_words and self.num_passkeys * self.passkey_words > len(self.vocabulary):
            raise ValueError(
                f"{self.num_passkeys} passkeys of {self.passkey_words} distinct words need as many in the vocabulary, "
                f"which has {len(self.vocabulary)}"
            )
        if not 0 <= self.min_depth <= self.max_depth <= 1:
            raise ValueError(f"need 0 <= min_depth <= max_depth <= 1, got {self.min_depth=}, {self.max_depth=}")
        if not 1 <= self.min_length <= self.max_length or self.num_lengths < 1:
            raise ValueError(
                f"need 1 <= min_length <= max_length and num_lengths >= 1, got {self.min_length=}, {self.max_length=}, "
                f"{self.num_lengths=}"
            )
        if self.num_lengths == 1 and self.min_length != self.max_length:
            raise ValueError(f"one length needs min_length == max_length, got {self.min_length=}, {self.max_length=}")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples=}")
        for name in ("needle", "question", "answer"):
            needed = ("{ordinal}",) if name == "question" else ("{ordinal}", "{words}")
            if any(word not in getattr(self, name) for word in needed):
                raise ValueError(f"{name} must contain {' and '.join(needed)}, got {getattr(self, name)!r}")
            try:
                getattr(self, name).format(ordinal="", words="")
            except (ValueError, LookupError):
                raise ValueError(
                    f"{name} may have no other braces than {' and '.join(needed)}, got {getattr(self, name)!r}"
                ) from None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of text that samples may have."""
        return tuple(int(length) for length in np.linspace(self.min_length, self.max_length, self.num_lengths).round())


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample.

    Attributes:
        tokens: all tokens: text with needles, questions and answers.
        labels: True where the loss looks.
        needles: begin and end of each hidden passkey's sentence.
        answers: begin and end of the passkey's words in each answer.
        head: where the text begins.
        tail: where the questions and answers begin.
        passkeys: the words.
    """

    tokens: Int32[np.ndarray, "T"]
    labels: Bool[np.ndarray, "T"]
    needles: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    head: int
    tail: int
    passkeys: tuple[str, ...]

    @property
    def text_length(self) -> int:
        """Tokens of text, what is hidden in it not counted."""
        return self.tail - self.head - sum(end - begin for begin, end in self.needles)


class NeedleData:
    """Samples by number, for one tokenizer.

    Raises:
        ValueError: a text too short for the longest sample, or a length too short for the passkeys.
    """

    def __init__(self, config: Needles, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.text = np.asarray(
            encode(tokenizer, load_haystack(config.haystack, max_chars=config.haystack_chars)), np.int32
        )
        longest = max(config.lengths)
        if len(self.text) < longest:
            raise ValueError(
                f"the haystack {config.haystack!r} has {len(self.text)} tokens, the longest sample needs {longest}: "
                "give a longer text or lower max_length"
            )
        needles = sum(end - begin for begin, end in self[0].needles)
        if min(config.lengths) < needles:
            raise ValueError(
                f"{config.num_passkeys} passkeys of {config.passkey_words} words take about {needles} tokens, more "
                f"than the {min(config.lengths)} tokens of text in the shortest sample: raise min_length or hide less"
            )

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; beyond `num_samples` they come round again."""
        config = self.config
        rng = np.random.default_rng((config.seed, index % (config.num_samples or index + 1)))
        length = int(rng.choice(config.lengths))
        shape = config.num_passkeys, config.passkey_words
        words = rng.choice(config.vocabulary, shape, replace=not config.distinct_words)
        passkeys = [" ".join(row) for row in words]
        depths = np.sort(rng.uniform(config.min_depth, config.max_depth, config.num_passkeys))
        begin = int(rng.integers(0, len(self.text) - length + 1))
        text = self.text[begin : begin + length]
        head, tail, answers = self._frame(passkeys)
        tokens, needles, done = list(head), [], 0
        for ordinal, passkey, depth in zip(ORDINALS, passkeys, depths, strict=False):
            cut = round(depth * length)
            tokens.extend(text[done:cut])
            needle = encode(self.tokenizer, config.needle.format(ordinal=ordinal, words=passkey))
            needles.append((len(tokens), len(tokens) + len(needle)))
            tokens.extend(needle)
            done = cut
        tokens.extend(text[done:])
        start = len(tokens)
        tokens.extend(tail)
        spans = tuple((start + first, start + last) for first, last in answers)
        labels = np.zeros(len(tokens), bool)
        for first, last in spans if config.label_tokens == "passkeys" else ((start, len(tokens)),):
            labels[first:last] = True
        return Sample(np.asarray(tokens, np.int32), labels, tuple(needles), spans, len(head), start, tuple(passkeys))

    def _frame(self, passkeys: list[str]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Tokens before and after the text, and where in the latter each passkey's words are."""
        config, tokenizer = self.config, self.tokenizer
        turns = [
            (config.question.format(ordinal=ordinal), config.answer.format(ordinal=ordinal, words=passkey))
            for ordinal, passkey in zip(ORDINALS, passkeys, strict=False)
        ]
        if config.chat and tokenizer.chat_template:
            messages = []
            for number, (question, answer) in enumerate(turns):
                messages.append({"role": "user", "content": question if number else HOLE + question})
                messages.append({"role": "assistant", "content": answer})
            before, _, after = chat(tokenizer, messages).partition(HOLE)
            head = encode(tokenizer, before)
        else:
            head = beginning(tokenizer)
            after = "".join(f"{question}\n{answer}\n" for question, answer in turns)
        encoded = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        offsets, spans, at = np.asarray(encoded["offset_mapping"]), [], 0
        before_words = config.answer.partition("{words}")[0]
        for (_, answer), ordinal, passkey in zip(turns, ORDINALS, passkeys, strict=False):
            # By their place in the answer: all else may hold the same words. A template may strip an answer.
            first = after.index(answer.strip(), at) + len(before_words.format(ordinal=ordinal).lstrip())
            at = first + len(passkey)
            inside = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < at))
            spans.append((int(inside[0]), int(inside[-1]) + 1))
        return head, list(encoded["input_ids"]), spans


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a part of a text: no special tokens."""
    # Not verbose: a haystack is longer than the model's context, and only parts of it are used.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a plain text begins with."""
    head = list(tokenizer.encode(""))
    # A tokenizer may end what it encodes with a special token: here the text goes on.
    return head[:-1] if head and head[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else head


def chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the model's template; the same on any day, where a template tells the date."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE, **options))
