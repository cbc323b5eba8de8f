"""Text out of tokens that arrive one by one: nothing is shown that a later token could still change or take back."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns token ids into text as they come, up to a stop string.

    A character split over tokens waits until it is whole, and the beginning of a stop string until it is not one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Start with no tokens."""
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a list of strings, none of them empty, got {stop!r}")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Append a token; the text that can be shown now."""
        self._tokens.append(token)
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.stopped = bool(ends)
        self.text = text[: min(ends)] if ends else text
        return self._show(len(self.text) if self.stopped else len(text) - self._pending(text))

    def rest(self) -> str:
        """What was held back, once there are no more tokens."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _pending(self, text: str) -> int:
        """Characters at the end that may still change."""
        pending = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        for stop in self._stop:
            pending = max([pending, *(size for size in range(1, len(stop)) if text.endswith(stop[:size]))])
        return pending
