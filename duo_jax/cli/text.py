"""Text out of tokens that arrive one by one."""

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns token ids into text as they come; a character split over tokens waits until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    @property
    def text(self) -> str:
        """All of it."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def add(self, token: int) -> str:
        """Append a token; the text that can be shown now."""
        self._tokens.append(token)
        text = self.text
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def rest(self) -> str:
        """What was held back."""
        return self.text[len(self._shown) :]
