"""`duo chat`: a conversation in a terminal."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from duo_jax.arguments import whole_number
from duo_jax.cli import USER_ERRORS
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, SamplingOptions
from duo_jax.files import check_output, write_text
from duo_jax.text import template
from duo_jax.text.chat import Chat
from duo_jax.text.lm import LM

HELP = "/reset forgets the conversation, /save FILE writes it as JSON, /exit or Ctrl-D ends, Ctrl-C stops a reply"


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model in several turns; each turn computes only its new tokens."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    cache: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    system: str | None = None
    """System message; the template's own by default."""
    max_length: int = 4096
    """Size of the KV cache in tokens of conversation."""
    max_new_tokens: int = 512
    """Most tokens of one reply."""
    parse_special: bool = False
    """Special tokens that are typed are control tokens; by default they are text."""

    def run(self) -> None:
        """Load, then read and answer until the end of input."""
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        whole_number("max_length", self.max_length, 1)
        sampler, pattern = self.sampling.sampler(), self.pattern.load(self.max_length)
        tokenizer = self.model.tokenizer()
        template.start(tokenizer)
        lm = LM(self.model.load(mesh=self.devices.make(), pattern=pattern), tokenizer, pattern, self.cache.kv_dtype)
        chat = Chat(lm, max_length=self.max_length, system=self.system, parse_special=self.parse_special)
        print(HELP)
        while (line := _read(chat)) is not None:
            try:
                if line.startswith("/"):
                    if not _command(chat, line):
                        return
                elif line:
                    options = {"sampler": sampler, "seed": self.sampling.seed, "stop": self.sampling.stop}
                    _answer(chat, line, max_new_tokens=self.max_new_tokens, **options)
            except USER_ERRORS as error:
                print(f"({error})", file=sys.stderr)


def _read(chat: Chat) -> str | None:
    """Read a line, after a prompt that shows how full the cache is; None at the end of input."""
    meter = f"[{chat.num_tokens}/{chat.max_length} tokens, {chat.nbytes / 1e6:.1f} MB] "
    while True:
        try:
            return input(f"{meter}> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends the chat)")
        except UnicodeDecodeError as error:
            print(f"(the line is not UTF-8 text: {error})", file=sys.stderr)


def _command(chat: Chat, line: str) -> bool:
    """Run a slash command; False ends the chat."""
    name, _, argument = line.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        chat.reset()
        print("(forgotten)")
    elif name == "/save" and argument:
        path = Path(argument)
        check_output(path, is_chat)
        write_text(path, json.dumps(chat.messages, ensure_ascii=False, indent=1) + "\n")
        print(f"(saved {len(chat.messages)} messages to {argument})")
    else:
        print(HELP)
    return True


def is_chat(head: bytes) -> bool:
    """Whether a file that begins like this is a conversation that `/save` wrote."""
    return head.startswith((b'[\n {\n  "role": ', b"[]"))


def _answer(chat: Chat, line: str, **options: Any) -> None:
    with _interruptible() as interrupted:
        for piece in chat.say(line, **options):
            print(piece, end="", flush=True)
            if interrupted():
                print(" (stopped)", end="")
                break
    print()
    if chat.num_tokens == chat.max_length:
        print("(the cache is full: /reset forgets the conversation; --max-length makes it larger)", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C end a reply between two tokens, when the cache is complete; a second Ctrl-C interrupts at once."""
    hits = []

    def record(signum: int, frame: FrameType | None) -> None:
        hits.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, record)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)
