"""What this package needs of a tokenizer. transformers' tokenizers have it, and so has that of a GGUF file."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from tokenizers import AddedToken


@runtime_checkable
class TextTokenizer(Protocol):
    """A part of transformers' `PreTrainedTokenizerBase`, whose import takes longer than reading a small model.

    `backend_tokenizer`, a `tokenizers.Tokenizer`, is optional: without it, special tokens cannot be kept as text.
    """

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """Whether decoding removes spaces before punctuation."""

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens that have a name."""

    @property
    def all_special_ids(self) -> list[int]:
        """The id of each."""

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """The special tokens by name, such as `bos_token`."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """The tokens that text is searched for before it is split, by id."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added ones."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template; several by name in old files."""

    def __len__(self) -> int:
        """Number of tokens."""

    def get_chat_template(self) -> str:
        """The chat template for a conversation without tools."""

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any:
        """The text of tokens, a string."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """The spelling of a token, a string, or None."""


def special_id(tokenizer: TextTokenizer, name: str) -> int | None:
    """The id of the special token with a name, such as `eos_token`; None if it has none.

    Not `tokenizer.eos_token_id`: transformers computes it when it is asked for, and from Python 3.12 on such an
    attribute is not seen when a protocol is checked.
    """
    token = tokenizer.special_tokens_map.get(name)
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return None if token is None else ids.get(str(token))
