"""Text to token ids. A special token that a user writes is text; one that a template writes is a control token.

Knows tokenizers, but no templates or models.
"""

import copy
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from duo_jax.text.tokenizer import TextTokenizer, special_id

# Spellings that stand for a special token while text is put together: written by a user, or by a template. They begin
# with code points that are no characters, and nobody can guess the number.
_WRITTEN, _CONTROL, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_NUMBER = f"{secrets.randbelow(10**12):012}"
# The end of a line, which no tokenizer joins with a word.
_LINE = ".\n"


@dataclass(frozen=True, eq=False)
class _Specials:
    """The special tokens of a tokenizer.

    Attributes:
        version: changes when the tokenizer gets another special token.
        ids: their ids by spelling, longer ones first.
        names: their spellings, in this order.
        places: the place of each in `names`.
        pattern: matches any of them; nothing if there are none.
    """

    version: tuple[object, ...]
    ids: Mapping[str, int]
    names: tuple[str, ...]
    places: Mapping[str, int]
    pattern: re.Pattern[str]


_SPECIALS: WeakKeyDictionary[TextTokenizer, _Specials] = WeakKeyDictionary()
_BACKENDS: WeakKeyDictionary[TextTokenizer, tuple[_Specials, Tokenizer]] = WeakKeyDictionary()


def special_tokens(tokenizer: TextTokenizer) -> Mapping[str, int]:
    """The ids of the tokens that decoding leaves out, by spelling; longer ones first."""
    return _specials(tokenizer).ids


def _specials(tokenizer: TextTokenizer) -> _Specials:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    size = backend.get_vocab_size() if isinstance(backend, Tokenizer) else len(tokenizer)
    version = (size, *tokenizer.all_special_tokens)
    known = _SPECIALS.get(tokenizer)
    if known is not None and known.version == version:
        return known
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    # An empty one, which some files have for none at all, would be found between all characters.
    spelled = ((name, index) for name, index in (added | dict(named)).items() if name)
    ids = dict(sorted(spelled, key=lambda item: -len(item[0])))
    names = tuple(ids)
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    places = {name: place for place, name in enumerate(names)}
    specials = _SPECIALS[tokenizer] = _Specials(version, MappingProxyType(ids), names, places, pattern)
    return specials


def check_text(text: object, what: str = "the text") -> str:
    """The text.

    Raises:
        ValueError: not a string, or one with half of a surrogate pair, which is no character.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, got {text!r:.60}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not Unicode text: {text[error.start]!r} at character {error.start} is half of a surrogate "
            "pair; remove it"
        ) from None
    return text


def encode(tokenizer: TextTokenizer, text: str, *, special: bool = False, parse_special: bool = True) -> list[int]:
    """Token ids of a text, or of a part of one.

    Args:
        tokenizer: the model's.
        text: the text.
        special: add the special tokens that the tokenizer puts around a text.
        parse_special: special tokens in the text are control tokens, otherwise text like any other.

    Raises:
        ValueError: text that is not Unicode, or that the tokenizer cannot encode.
    """
    if not parse_special:
        return encode_marked(tokenizer, mark(tokenizer, check_text(text)), special=special)
    check_text(text)
    try:
        # Not verbose: documents may be longer than the length that the tokenizer warns about.
        return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic in tokenizers, such as a regex that explodes, is no Exception.
        raise _refusal(error) from None


def encode_inside(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Token ids of a text that continues another one: without the space that SentencePiece puts before a text.

    Special tokens in it are control tokens. Raises as `encode`.
    """
    before, whole = encode(tokenizer, _LINE), encode(tokenizer, _LINE + text)
    # A byte-level tokenizer may join the line's end with the text; it puts nothing before one.
    return whole[len(before) :] if whole[: len(before)] == before else encode(tokenizer, text)


def mark(tokenizer: TextTokenizer, value: Any) -> Any:
    """A text, or all texts in a message, with marks in place of special tokens, for `encode_marked`."""
    if isinstance(value, str):
        specials = _specials(tokenizer)
        return specials.pattern.sub(lambda match: f"{_WRITTEN}{_NUMBER}{specials.places[match[0]]}{_END}", value)
    if isinstance(value, Mapping):
        return {key: mark(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(tokenizer, item) for item in value]
    return value


def unmark(tokenizer: TextTokenizer, text: str) -> str:
    """A text with the special tokens that `mark` replaced."""
    names = _specials(tokenizer).names
    return re.sub(f"{_WRITTEN}{_NUMBER}([0-9]+){_END}", lambda match: names[int(match[1])], text)


def encode_marked(tokenizer: TextTokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text in which special tokens are control tokens, and marks are text.

    It is encoded in one go, so that the marks do not change how the text around them is split.

    Raises:
        ValueError: a tokenizer that gives a control token for text that spells it.
    """
    if f"{_WRITTEN}{_NUMBER}" not in text:
        return encode(tokenizer, text, special=special)
    specials = _specials(tokenizer)
    backend = _literal_backend(tokenizer, specials)
    names, places = specials.names, [f"{_CONTROL}{_NUMBER}{place}{_END}" for place in range(len(specials.names))]
    pattern = re.compile(f"{_WRITTEN}{_NUMBER}([0-9]+){_END}|({specials.pattern.pattern})")
    literal = pattern.sub(
        lambda match: names[int(match[1])] if match[1] else places[specials.places[match[2]]], check_text(text)
    )
    try:
        encoded = backend.encode(literal, add_special_tokens=special)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _refusal(error) from None
    controls = {backend.token_to_id(place): specials.ids[name] for name, place in zip(names, places, strict=True)}
    # An unknown character may be encoded as a special token, and BOS and EOS are added to the text.
    wrong = set(specials.ids.values()) - {special_id(tokenizer, "unk_token")}
    for index, is_added in zip(encoded.ids, encoded.special_tokens_mask, strict=True):
        if index in wrong and not is_added:
            raise ValueError(
                f"this tokenizer has no way to write {tokenizer.convert_ids_to_tokens(index)!r} as text: remove it "
                "from the text, or give parse_special=True for a control token"
            )
    return [controls.get(index, index) for index in encoded.ids]


def _literal_backend(tokenizer: TextTokenizer, specials: _Specials) -> Tokenizer:
    """A copy of the tokenizer that takes special tokens for text, and other spellings for control tokens."""
    known, backend = _BACKENDS.get(tokenizer, (None, None))
    if backend is not None and known is specials:
        return backend
    original = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(original, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} cannot keep special tokens as text: remove them from the text, or give "
            "parse_special=True for control tokens"
        )
    backend = copy.deepcopy(original)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    added = tokenizer.added_tokens_decoder
    for place, index in enumerate(specials.ids.values()):
        flags = {name: getattr(added.get(index), name, False) for name in ("lstrip", "rstrip", "single_word")}
        backend.add_tokens([AddedToken(f"{_CONTROL}{_NUMBER}{place}{_END}", special=False, normalized=False, **flags)])
    _BACKENDS[tokenizer] = specials, backend
    return backend


def decode(tokenizer: TextTokenizer, tokens: list[int]) -> str:
    """The text of tokens, without special ones.

    Raises:
        ValueError: a tokenizer that fails.
    """
    try:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # As in `encode`.
        raise _refusal(error, "decode its tokens") from None


def _refusal(error: BaseException, what: str = "encode this text") -> ValueError:
    first = str(error).partition("\n")[0]
    return ValueError(f"the tokenizer cannot {what} ({type(error).__name__}: {first:.200})")
