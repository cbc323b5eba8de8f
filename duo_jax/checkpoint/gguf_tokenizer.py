"""Builds a tokenizer from the metadata of a GGUF file. Knows no files, tensors or models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    import transformers  # imported when its tokenizer is asked for, which takes 0.6 s

# Token types of llama.cpp: 0 undefined, 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
_NORMAL, _CONTROL, _USER_DEFINED, _LAST_TYPE = 1, 3, 4, 6

_LONGEST_TOKEN = 1024  # Several times the longest of any vocabulary; splitting a token takes quadratic time.
_SPACE = "▁"  # how SentencePiece spells a space


@dataclass(frozen=True)
class ByteLevelSplit:
    """How a byte-level BPE splits text before it merges.

    Attributes:
        patterns: applied in turn, each to the pieces of the one before; matches and the text between them are pieces.
        ignore_merges: a piece that is a token is not built from merges.
        nfc: text is composed (NFC) first.
        add_bos: the default if the file has no `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION_OR_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_OR_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = ByteLevelSplit((_CONTRACTION_OR_WORD + r"|\p{N}{1,3}" + _SYMBOLS_OR_SPACE,), ignore_merges=True, add_bos=True)
_QWEN2 = ByteLevelSplit((_CONTRACTION_OR_WORD + r"|\p{N}" + _SYMBOLS_OR_SPACE,), nfc=True)

# Names are llama.cpp's (`tokenizer.ggml.pre`); the rules are those of each model's own tokenizer.json.
BYTE_LEVEL_SPLITS: Mapping[str, ByteLevelSplit] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": ByteLevelSplit((_TEKKEN,), ignore_merges=True, add_bos=True),
    # Digits are split one by one, as when the vocabulary was learnt; a run of spaces before a digit is one piece.
    "smollm": ByteLevelSplit((r"\p{N}", _GPT2)),
    "gpt-2": ByteLevelSplit((_GPT2,)),
    # llama.cpp's own rule of this name: punctuation separately, digits in threes.
    "default": ByteLevelSplit((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9]{3}")),
}


@dataclass(frozen=True, eq=False)
class GgufTokenizer:
    """The tokenizer of a GGUF file, without transformers: a `TextTokenizer`.

    Attributes:
        backend_tokenizer: splits text into tokens.
        special_tokens_map: special tokens by transformers' names.
        add_bos_token: BOS is prepended to a text.
        add_eos_token: EOS is appended to a text.
        chat_template: the chat template, if the file has one.
    """

    backend_tokenizer: Tokenizer
    special_tokens_map: Mapping[str, str]
    add_bos_token: bool
    add_eos_token: bool
    chat_template: str | None
    clean_up_tokenization_spaces: bool = False

    @classmethod
    def read(cls, metadata: Mapping[str, object]) -> "GgufTokenizer":
        """See `tokenizer_from_gguf`."""
        model = _text(metadata, "model")
        if model not in _BUILDERS:
            raise NotImplementedError(
                f"GGUF tokenizer model {model[:40]!r} is not supported, only {sorted(_BUILDERS)}; "
                "load the tokenizer from the model's Hugging Face repository instead"
            )
        tokens, token_types = _tokens(metadata), _for_each_token(metadata, "token_type", int)
        if unknown := [kind for kind in token_types if not 0 <= kind <= _LAST_TYPE]:
            raise ValueError(f"'tokenizer.ggml.token_type' must be in [0, {_LAST_TYPE}], got {unknown[0]}")
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise _wrong("tokenizer.chat_template", template, "a string")
        backend, add_bos = _BUILDERS[model](metadata)
        added = {
            token: AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        }
        add_bos, add_eos = _flag(metadata, "add_bos_token", add_bos), _flag(metadata, "add_eos_token", False)
        bos, eos, unk = (_special(metadata, name, tokens) for name in ("bos", "eos", "unknown"))
        # Converters write an id outside the vocabulary for no padding token.
        padding = _get(metadata, "padding_token_id")
        pad = tokens[padding] if type(padding) is int and 0 <= padding < len(tokens) else None
        # transformers would turn the flag off silently, and every prompt would lack its first token.
        for name, token, is_added in (("bos", bos, add_bos), ("eos", eos, add_eos)):
            if is_added and token is None:
                raise ValueError(
                    f"every text needs a {name.upper()} token, but the file has no 'tokenizer.ggml.{name}_token_id'; "
                    f"set it, or set 'tokenizer.ggml.add_{name}_token' to False"
                )
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
        special = {name: token for name, token in named.items() if token is not None}
        # As transformers: named tokens are special, whatever their type.
        unmarked = [AddedToken(token, special=True) for token in special.values() if token not in added]
        backend.add_tokens([*added.values(), *unmarked])
        before, after = [bos] if add_bos and bos else [], [eos] if add_eos and eos else []
        backend.post_processor = _around(backend, before, after)
        return cls(backend, special, add_bos, add_eos, template)

    def to_transformers(self) -> "transformers.PreTrainedTokenizerFast":
        """The same tokenizer as transformers has them."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer,
            **self.special_tokens_map,
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
        )

    @property
    def all_special_tokens(self) -> list[str]:
        """See `TextTokenizer`."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """See `TextTokenizer`."""
        return [self._id(token) for token in self.all_special_tokens]

    @cached_property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """See `TextTokenizer`."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def vocab_size(self) -> int:
        """See `TextTokenizer`."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """See `TextTokenizer`."""
        return self.backend_tokenizer.get_vocab_size()

    def get_chat_template(self) -> str:
        """See `TextTokenizer`."""
        if self.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template")
        return self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """See `TextTokenizer`; `verbose` is transformers' and has no effect."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """See `TextTokenizer`."""
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """See `TextTokenizer`."""
        return self.backend_tokenizer.id_to_token(ids)

    def _id(self, token: str) -> int:
        index = self.backend_tokenizer.token_to_id(token)
        assert index is not None  # All named tokens are in the vocabulary.
        return index


def _around(backend: Tokenizer, before: list[str], after: list[str]) -> processors.TemplateProcessing:
    """Puts special tokens around each text."""
    single, second = (
        " ".join([*(f"{token}:{place}" for token in before), text, *(f"{token}:{place}" for token in after)])
        for place, text in enumerate(("$A:0", "$B:1"))
    )
    special = [(token, backend.token_to_id(token)) for token in dict.fromkeys((*before, *after))]
    try:
        return processors.TemplateProcessing(single=single, pair=f"{single} {second}", special_tokens=special)
    except Exception as error:  # Of tokenizers, for a name that its templates cannot have.
        raise ValueError(f"the special tokens {[*before, *after]} cannot be put around a text: {error}") from None


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> "transformers.PreTrainedTokenizerFast":
    """The tokenizer that a GGUF file describes, with its special tokens and chat template.

    By default BOS is prepended for SentencePiece, Llama 3 and Tekken, and EOS is never appended.

    Args:
        metadata: the file's keys with plain Python values: `tokenizer.ggml.model`, `.tokens`, `.token_type`; `.pre` and
            `.merges` (model "gpt2") or `.scores` (model "llama"); optionally the ids of special tokens,
            `.add_bos_token`, `.add_eos_token`, `.add_space_prefix` (model "llama") and `tokenizer.chat_template`.

    Raises:
        ValueError: a key that the tokenizer needs is missing.
        NotImplementedError: a tokenizer model or a pre-tokenizer that is not in the tables of this file.
    """
    return GgufTokenizer.read(metadata).to_transformers()


def _byte_level(metadata: Mapping[str, object]) -> tuple[Tokenizer, bool]:
    """BPE over bytes, each written as one printable character, and whether BOS is prepended by default."""
    name = _text(metadata, "pre")
    if name not in BYTE_LEVEL_SPLITS:
        raise NotImplementedError(
            f"GGUF pre-tokenizer {name[:40]!r} is not supported, only {sorted(BYTE_LEVEL_SPLITS)}; add a row to "
            "BYTE_LEVEL_SPLITS or load the tokenizer from the model's Hugging Face repository"
        )
    split = BYTE_LEVEL_SPLITS[name]
    vocab, merges = _vocab(metadata), _strings(metadata, "merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for merge, (left, right) in zip(merges, pairs, strict=True):
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(
                f"'tokenizer.ggml.merges' has {merge[:80]!r}, which does not join two tokens into a third; "
                "convert the model again"
            )
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(metadata: Mapping[str, object]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE, in which a character without a token becomes its UTF-8 bytes, and True: BOS by default."""
    tokenizer = Tokenizer(
        models.BPE(
            _vocab(metadata),
            _merges_from_scores(metadata),
            unk_token=_special(metadata, "unknown", _tokens(metadata)),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # The whole text is one piece, as in SentencePiece: a token may span words and runs of spaces.
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    undo: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(metadata, "add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        undo.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(undo)
    return tokenizer, True


def _merges_from_scores(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest: each split of a token is a merge, best first."""
    scores, types = _for_each_token(metadata, "scores", float), _for_each_token(metadata, "token_type", int)
    # Only normal tokens are merged: with `split_special_tokens`, text that spells a control token remains text.
    score_of = {
        token: score for token, score, kind in zip(_tokens(metadata), scores, types, strict=True) if kind == _NORMAL
    }
    if (longest := max(map(len, score_of), default=0)) > _LONGEST_TOKEN:
        raise ValueError(f"'tokenizer.ggml.tokens' has a token of {longest} characters, more than {_LONGEST_TOKEN}")
    # Best token first (a stable order); of its splits, the longer left part first.
    return [
        (left, right)
        for token in sorted(score_of, key=score_of.__getitem__, reverse=True)
        for cut in range(len(token) - 1, 0, -1)
        if (left := token[:cut]) in score_of and (right := token[cut:]) in score_of
    ]


_BUILDERS: Mapping[str, Callable[[Mapping[str, object]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _vocab(metadata: Mapping[str, object]) -> dict[str, int]:
    tokens = _tokens(metadata)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"'tokenizer.ggml.tokens' has {twice[:80]!r} twice: convert the model again")
    return vocab


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    """The tokens; those without text get a name, as in llama.cpp."""
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(metadata, "tokens"))]


def _strings(metadata: Mapping[str, object], name: str) -> list[str]:
    values = _required(metadata, name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _wrong(f"tokenizer.ggml.{name}", values, "an array of strings")
    return values


def _for_each_token(metadata: Mapping[str, object], name: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers, one for each token."""
    values, count = _required(metadata, name), len(_strings(metadata, "tokens"))
    # NaN is the number that differs from itself.
    if not isinstance(values, list) or not all(type(value) is kind and value == value for value in values):
        raise _wrong(f"tokenizer.ggml.{name}", values, f"an array of numbers of type {kind.__name__}")
    if len(values) != count:
        raise ValueError(f"'tokenizer.ggml.{name}' must have one number a token: {len(values)} for {count} tokens")
    return values


def special_id(metadata: Mapping[str, object], name: str, count: int) -> int | None:
    """The id of a special token, such as `eos`, in a vocabulary of `count` tokens; None if the file has none.

    Raises:
        ValueError: what is not an id below `count`.
    """
    index = _get(metadata, f"{name}_token_id")
    if index is not None and (type(index) is not int or not 0 <= index < count):
        raise _wrong(f"tokenizer.ggml.{name}_token_id", index, f"a token below {count}")
    return index


def _special(metadata: Mapping[str, object], name: str, tokens: Sequence[str]) -> str | None:
    """The text of a special token."""
    index = special_id(metadata, name, len(tokens))
    return None if index is None else tokens[index]


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = _get(metadata, name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(f"tokenizer.ggml.{name}", value, "a boolean")
    return default if value is None else value


def _text(metadata: Mapping[str, object], name: str) -> str:
    value = _required(metadata, name)
    if not isinstance(value, str):
        raise _wrong(f"tokenizer.ggml.{name}", value, "a string")
    return value


def _wrong(key: str, value: object, rule: str) -> ValueError:
    shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:80]
    return ValueError(f"{key!r} must be {rule}, got {shown}; convert the model again")


def _get(metadata: Mapping[str, object], name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def _required(metadata: Mapping[str, object], name: str) -> Any:
    value = _get(metadata, name)
    if value is None:
        raise ValueError(
            f"the metadata has no {f'tokenizer.ggml.{name}'!r}: the file has no tokenizer, or an incomplete one; "
            "load the tokenizer from the model's Hugging Face repository, or convert the model again"
        )
    return value
