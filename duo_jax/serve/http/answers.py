"""What is answered: OpenAI's objects for replies, whole or as chunks of a stream. Knows no engine and no sockets."""

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from duo_jax.serve.http.schema import ChatBody, Options
from duo_jax.serve.requests import Event, FinishEvent, Likely, TokenEvent, Usage
from duo_jax.text.tokenizer import TextTokenizer
from duo_jax.text.tokens import decode

# Headers of a refusal for lack of room: the seconds after which to try again.
RETRY = {"Retry-After": "1"}


def error_object(message: str, kind: str, *, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def usage_object(usages: Iterable[tuple[int, Usage]]) -> dict[str, Any]:
    """The tokens of a request: each prompt counts once, whatever the number of replies to it."""
    prompts: dict[int, Usage] = {}
    completion = 0
    for prompt, usage in usages:
        prompts.setdefault(prompt, usage)
        completion += usage.completion
    count = sum(usage.prompt for usage in prompts.values())
    return {
        "prompt_tokens": count,
        "completion_tokens": completion,
        "total_tokens": count + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in prompts.values())},
    }


@dataclass
class Choice:
    """A reply so far."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    end: FinishEvent | None = None


@dataclass
class Answer:
    """The answer to one HTTP request, with all its replies.

    Attributes:
        body: the request.
        name: the model's.
        tokenizer: for the spelling of tokens.
        replies: number of replies to each prompt.
        choices: every reply so far; reply r to prompt p is number `p * replies + r`.
    """

    body: Options
    name: str
    tokenizer: TextTokenizer
    replies: int
    choices: list[Choice]
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether it answers a conversation."""
        return isinstance(self.body, ChatBody)

    @property
    def is_done(self) -> bool:
        """Whether every reply has ended."""
        return all(choice.end is not None for choice in self.choices)

    @property
    def error(self) -> str:
        """Why a reply failed; empty if none did."""
        ends = (choice.end for choice in self.choices if choice.end is not None)
        return next((end.error or end.reason for end in ends if end.reason in ("error", "cancelled")), "")

    @property
    def usage(self) -> dict[str, Any]:
        """See `usage_object`."""
        ends = ((index, choice.end) for index, choice in enumerate(self.choices))
        return usage_object((index // self.replies, end.usage) for index, end in ends if end is not None)

    def add(self, index: int, event: Event) -> None:
        """Take an event of a reply."""
        choice = self.choices[index]
        choice.text.append(event.text)
        if isinstance(event, FinishEvent):
            choice.end = event
        else:
            choice.tokens.append(event)

    def whole(self) -> dict[str, Any]:
        """The answer, once it is done."""
        choices = []
        for index, choice in enumerate(self.choices):
            text, logprobs = "".join(choice.text), self._logprobs(choice.tokens, 0)
            content: dict[str, Any] = {"text": text}
            if self.is_chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            reason = choice.end.reason if choice.end is not None else None
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head(is_chunk=False), "choices": choices, "usage": self.usage}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first token: the role of each reply of a conversation."""
        if self.is_chat:
            for index in range(len(self.choices)):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, index: int, event: Event) -> dict[str, Any] | None:
        """The chunk for an event that was added; None if there is nothing to send for it."""
        if isinstance(event, FinishEvent):
            last: dict[str, Any] = {"delta": {"content": event.text} if event.text else {}}
            return self._chunk(index, last if self.is_chat else {"text": event.text}, None, event.reason)
        if not event.text and not self.body.has_logprobs:
            return None
        offset = sum(map(len, self.choices[index].text)) - len(event.text) if self.body.has_logprobs else 0
        content: dict[str, Any] = {"delta": {"content": event.text}} if self.is_chat else {"text": event.text}
        return self._chunk(index, content, self._logprobs([event], offset), None)

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head(is_chunk=True), "choices": [], "usage": self.usage}

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, index: int, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(is_chunk=True), "choices": [choice]}
        return chunk | {"usage": None} if self.body.sends_usage else chunk

    def _logprobs(self, tokens: list[TokenEvent], offset: int) -> dict[str, Any] | None:
        """Log-probabilities of some tokens of a reply, the first of which begins at this character; None: not asked."""
        if not self.body.has_logprobs:
            return None
        if self.is_chat:
            entries = []
            for event in tokens:
                top = [self._entry(likely) for likely in event.top]
                entries.append({**self._entry(Likely(event.token, event.logprob)), "top_logprobs": top})
            return {"content": entries, "refusal": None}
        offsets = []
        for event in tokens:
            offsets.append(offset)
            offset += len(event.text)
        return {
            "tokens": [self._spelling(event.token) for event in tokens],
            "token_logprobs": [event.logprob for event in tokens],
            "top_logprobs": [{self._spelling(each.token): each.logprob for each in event.top} for event in tokens],
            "text_offset": offsets,
        }

    def _entry(self, likely: Likely) -> dict[str, Any]:
        text = self._spelling(likely.token)
        return {"token": text, "logprob": likely.logprob, "bytes": list(text.encode())}

    def _spelling(self, token: int) -> str:
        return decode(self.tokenizer, [token]) or str(self.tokenizer.convert_ids_to_tokens(token))
