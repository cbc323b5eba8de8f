"""The bodies of requests, checked. A field that is not supported is refused by its name, unless it asks for nothing."""

import json
import re
import secrets
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.serve.requests import MOST_PENALTY, MOST_REPLIES, MOST_TOP, Request

T = TypeVar("T", bound="Options")

# Fields of OpenAI's that are not supported, with the values that ask for nothing; null asks for nothing in all.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# What pydantic calls the types of a value that may have several.
TYPES = re.compile(r"str|list\[.*|function-.*")
Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]


class BadRequestError(ValueError):
    """A body that is refused, and the field that is wrong."""

    def __init__(self, message: str, field: str | None = None) -> None:
        """The message names the field too."""
        super().__init__(message)
        self.field = field


class StreamOptions(BaseModel):
    """What a stream also sends."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class Options(BaseModel):
    """What both kinds of requests have; numbers that are missing are the model's own."""

    model_config = ConfigDict(strict=True, extra="forbid")
    default_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MOST_REPLIES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def request(self, prompt: list[int], own: SamplingSettings) -> Request:
        """The request for a prompt; `own` are the model's settings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Request(
            tuple(prompt),
            self.max_tokens or self.default_tokens,
            sampling=self._sampling(own),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            stop=tuple(stop),
            n=self.n or 1,
            top=self.top,
        )

    @property
    def top(self) -> int:
        """Likely tokens to report with each."""
        return 0

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return False

    @property
    def sends_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, own: SamplingSettings) -> SamplingSettings:
        """The model's own settings, with those that were given; at temperature 0, without its cuts."""
        given = {field.name: getattr(self, field.name) for field in fields(own)}
        given = {name: value for name, value in given.items() if value is not None}
        settings = {**vars(own), **given}
        if settings["temperature"] == 0:  # The most likely token is in every cut.
            settings |= {"top_k": None, "top_p": None, "min_p": None}
        return SamplingSettings(**settings)


class CompletionBody(Options):
    """A body for `/v1/completions`."""

    default_tokens: ClassVar[int | None] = 16

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def top(self) -> int:
        """See `Options`."""
        return self.logprobs or 0

    @property
    def has_logprobs(self) -> bool:
        """See `Options`."""
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class Message(BaseModel):
    """A message of a conversation; the parts of a content are checked where it becomes text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """A reply of OpenAI's client, sent back as it came, has fields that are null."""
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it, which know no developer."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(Options):
    """A body for `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def top(self) -> int:
        """See `Options`."""
        return self.top_logprobs or 0

    @property
    def has_logprobs(self) -> bool:
        """See `Options`."""
        return bool(self.logprobs)


def read_body(body: bytes, kind: type[T]) -> T:
    """A body, checked.

    Raises:
        BadRequestError: bytes that are not a JSON object, a field that is not supported, or a wrong value.
    """
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequestError("the body is nested too deeply") from None
    except ValueError as error:  # Bytes that are no UTF-8 are one too.
        raise BadRequestError(f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(values, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(values).__name__}")
    for name in [name for name in values if name not in kind.model_fields]:
        if values[name] is None or values[name] in NEUTRAL.get(name, ()):
            del values[name]
        else:
            raise BadRequestError(f"{name!r:.80} is not supported by this server: leave it out", name[:80])
    if kind is ChatBody and values.get("max_completion_tokens") is not None:
        values.setdefault("max_tokens", values["max_completion_tokens"])
    try:
        checked = kind.model_validate(values)
    except ValidationError as error:
        raise _bad_request(error) from None
    if isinstance(checked, ChatBody) and checked.top_logprobs and not checked.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: set it to true", "top_logprobs")
    return checked


def _bad_request(error: ValidationError) -> BadRequestError:
    """The first thing that is wrong, by its name; where several types are allowed, by the one that fits best."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = max((each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not TYPES.fullmatch(str(part)))
    if first["type"] == "extra_forbidden":
        return BadRequestError(f"{place!r:.80} is not supported by this server: leave it out", place[:80])
    return BadRequestError(f"{place:.80}: {first['msg']}", place[:80])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
