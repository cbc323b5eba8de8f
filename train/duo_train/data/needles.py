"""Needle data (paper section 2.2): passkeys hidden in a long text, and a tail that asks for all of them in turn.

Sample i depends only on (seed, i): not on the samples drawn before, nor on the process that draws it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from string import Formatter
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from duo_jax.arguments import MOST_SEED, ArgumentError, real_number, seed_number, whole_number
from duo_jax.text.template import has_template, split
from duo_jax.text.tokens import encode
from duo_train.data.haystack import DEFAULT, HUB, load_haystack
from duo_train.data.vocabulary import NATO, ORDINALS

# All lengths are in memory.
MOST_LENGTHS = 100_000
# For templates that contain the date: a sample must not depend on the day.
DATE = "26 Jul 2024"


# Settings that earlier versions lack, with what these did.
ADDED: Mapping[str, Any] = {"spacing": "even"}


@dataclass(frozen=True)
class Needles:
    """Settings of the samples. The defaults are the paper's."""

    haystack: str = DEFAULT
    """Text to hide passkeys in: pydoc (Python's own reference pages), essays (downloaded by pip), a text or
    .jsonl[.zst] file, a folder of them, or a hub data set such as hub:kmfoda/booksum:chapter."""
    haystack_chars: int | None = 20_000_000
    """Number of characters of the haystack to read; the rest of a hub data set is not downloaded."""
    num_passkeys: int = 10
    """Passkeys per sample."""
    passkey_words: int = 32
    """Words per passkey."""
    vocabulary: tuple[str, ...] = NATO
    """Words that passkeys are drawn from."""
    distinct_words: bool = False
    """Use every word at most once in a sample. Otherwise two passkeys may share a word and the one after it."""
    min_depth: float = 0.05
    """Lowest depth of a passkey: 0 is the start of the text, 1 its end."""
    max_depth: float = 0.95
    """Highest depth of a passkey."""
    min_length: int = 1000
    """Tokens of text in the shortest sample, without passkeys and questions."""
    max_length: int = 32000
    """Tokens of text in the longest sample."""
    num_lengths: int = 50
    """Number of different lengths, from the shortest to the longest."""
    spacing: Literal["even", "geometric"] = "even"
    """Lengths with equal differences, or with equal ratios: more short samples, which cost less."""
    chat: bool = True
    """Use the tokenizer's chat template, if it has one."""
    label_tokens: Literal["passkeys", "tail"] = "passkeys"
    """Tokens in the loss: the passkeys in the answers (the paper) or all of the questions and answers (the reference
    implementation)."""
    num_samples: int | None = None
    """Number of different samples; training repeats them. Without a number every sample is new."""
    seed: int = 0
    """Sample i depends only on this and on i."""
    needle: str = "\nRemember this. The {ordinal} passkey of the vault is: {words}.\n"
    """Sentence that is hidden in the text."""
    question: str = "\nBased on the text above: what is the {ordinal} passkey of the vault?"
    """Question for each passkey."""
    answer: str = "The {ordinal} passkey of the vault is: {words}."
    """Correct answer to a question."""

    def saved(self) -> dict[str, Any]:
        """The settings as files have them: one that earlier versions lack is left out where it does as they did."""
        settings = asdict(self)
        return {name: settings[name] for name in settings if name not in ADDED or settings[name] != ADDED[name]}

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages of an extra that read the haystack."""
        return ("datasets",) * self.haystack.startswith(HUB) + ("zstandard",) * self.haystack.endswith(".zst")

    def __post_init__(self) -> None:
        """Check the settings; lengths are checked later, with the text.

        Raises:
            ValueError: a setting out of range.
        """
        whole_number("num_passkeys", self.num_passkeys, 1, len(ORDINALS), way="there are as many ordinals")
        for name in ("passkey_words", "min_length", "max_length"):
            whole_number(name, getattr(self, name), 1)
        whole_number("num_lengths", self.num_lengths, 1, MOST_LENGTHS)
        for name in ("haystack_chars", "num_samples"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1, MOST_SEED)
        seed_number("seed", self.seed)
        if not self.vocabulary:
            raise ValueError("a passkey needs words, but the vocabulary is empty")
        if self.distinct_words and self.num_passkeys * self.passkey_words > len(self.vocabulary):
            raise ValueError(
                f"{self.num_passkeys} passkeys of {self.passkey_words} distinct words need as many in the vocabulary, "
                f"which has {len(self.vocabulary)}"
            )
        real_number("min_depth", self.min_depth, 0, 1)
        real_number("max_depth", self.max_depth, self.min_depth, 1, way="it must not be below the lowest depth")
        if self.min_length > self.max_length:
            raise ArgumentError("max_length", f"must be at least min_length={self.min_length}, got {self.max_length}")
        if self.num_lengths == 1 and self.min_length != self.max_length:
            rule = f"of 1 needs min_length == max_length, got {self.min_length} and {self.max_length}"
            raise ArgumentError("num_lengths", rule)
        for name in ("needle", "question", "answer"):
            needed = ("{ordinal}",) if name == "question" else ("{ordinal}", "{words}")
            if any(word not in getattr(self, name) for word in needed):
                raise ValueError(f"{name} must contain {' and '.join(needed)}, got {getattr(self, name)!r}")
            if not _has_only(needed, getattr(self, name)):
                raise ArgumentError(
                    name, f"may have no other braces than {' and '.join(needed)}, got {getattr(self, name)!r}"
                )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of tokens of text that samples may have."""
        space = np.geomspace if self.spacing == "geometric" else np.linspace
        return tuple(int(length) for length in space(self.min_length, self.max_length, self.num_lengths).round())


def _has_only(fields: tuple[str, ...], text: str) -> bool:
    """Whether a format has no fields but these: attributes, indices and conversions would print Python's objects."""
    try:
        found = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    except ValueError:  # A brace without its partner.
        return False
    return all(f"{{{name}}}" in fields and not spec and not conversion for name, spec, conversion in found)


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample.

    Attributes:
        tokens: all tokens: text with needles, questions and answers.
        labels: True for tokens in the loss.
        needles: begin and end of each hidden sentence.
        answers: begin and end of the passkey's words in each answer.
        head: position of the first token of the text.
        tail: position of the first token of the questions and answers.
        passkeys: the words of each passkey.
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
        """Tokens of text, without the hidden sentences."""
        return self.tail - self.head - sum(end - begin for begin, end in self.needles)


class NeedleData:
    """Samples by number, for one tokenizer.

    Raises:
        ValueError: the text is too short for the longest sample, or the shortest sample for its passkeys.
    """

    def __init__(self, config: Needles, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.text = np.asarray(
            encode(tokenizer, load_haystack(config.haystack, max_chars=config.haystack_chars)), np.int32
        )
        # Before anything is made whose size these settings decide.
        longest, words = config.max_length, config.num_passkeys * config.passkey_words
        if len(self.text) < longest:
            raise ValueError(
                f"the haystack {config.haystack!r} has {len(self.text)} tokens, the longest sample needs {longest}: "
                "give a longer text or lower max_length"
            )
        # A word has at least one token.
        too_many = words > config.min_length
        needles = words if too_many else sum(end - begin for begin, end in self[0].needles)
        if min(config.lengths) < needles:
            raise ValueError(
                f"{config.num_passkeys} passkeys of {config.passkey_words} words take about {needles} tokens, more "
                f"than the {min(config.lengths)} tokens of text in the shortest sample: raise min_length or hide less"
            )

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; the samples repeat after `num_samples`."""
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
        """Tokens before the text, tokens after it, and the begin and end of each passkey's words in the latter."""
        config, tokenizer = self.config, self.tokenizer
        turns = [
            (config.question.format(ordinal=ordinal), config.answer.format(ordinal=ordinal, words=passkey))
            for ordinal, passkey in zip(ORDINALS, passkeys, strict=False)
        ]
        if config.chat and has_template(tokenizer):
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            before, after = split(tokenizer, messages, add_generation_prompt=False, date_string=DATE)
            head = encode(tokenizer, before)
        else:
            head = beginning(tokenizer)
            after = "".join(f"{question}\n{answer}\n" for question, answer in turns)
        encoded = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        offsets, spans, at = np.asarray(encoded["offset_mapping"]), [], 0
        before_words = config.answer.partition("{words}")[0]
        for (_, answer), ordinal, passkey in zip(turns, ORDINALS, passkeys, strict=False):
            # By position in the answer, because other text may have the same words. A template may strip an answer.
            first = after.index(answer.strip(), at) + len(before_words.format(ordinal=ordinal).lstrip())
            at = first + len(passkey)
            inside = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < at))
            spans.append((int(inside[0]), int(inside[-1]) + 1))
        return head, list(encoded["input_ids"]), spans


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens at the start of a plain text."""
    head = list(tokenizer.encode(""))
    # Some tokenizers also append a special token, but here the text continues.
    return head[:-1] if head and head[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else head
