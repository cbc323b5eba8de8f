"""`duo chat`: a conversation in a terminal, or line by line from a pipe."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import tyro

from duo_jax.arguments import path_of, whole_number
from duo_jax.checkpoint.open import open_config
from duo_jax.cli import USER_ERRORS, message_of
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.lines import Lines
from duo_jax.cli.options import CacheOptions, ChatSamplingOptions, ModelOptions, PatternOptions, check_room
from duo_jax.cli.timings import Phases, show_status
from duo_jax.files import check_output, write_text
from duo_jax.reading import MOST_JSON_BYTES, parse_json, read_text
from duo_jax.text import template
from duo_jax.text.chat import Chat
from duo_jax.text.lm import LM
from duo_jax.text.tokens import encode

# Size of the cache by default, in tokens.
LENGTH = 4096
# Bytes of a text file for each token of the cache: no text that fits has more.
MOST_BYTES_A_TOKEN = 64
# An answer with less room than this part of the cache would be cut off: then the oldest turns are in the way.
LEAST_ROOM = 8
# What a model or a file says must not control the terminal: all control characters but the tab and the end of a line.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


class _Command(NamedTuple):
    usage: str
    help: str
    takes_path: bool = False


COMMANDS = {
    "/file": _Command("/file PATH", "put a text file before your next message; without PATH, take it out again", True),
    "/retry": _Command("/retry", "answer your last message again"),
    "/undo": _Command("/undo", "take your last message and its reply back"),
    "/system": _Command("/system TEXT", "start over with this system message, or none; without TEXT, show it"),
    "/reset": _Command("/reset", "forget the conversation; the system message stays"),
    "/save": _Command("/save FILE", "write the conversation as JSON", True),
    "/load": _Command("/load FILE", "continue a conversation that /save wrote", True),
    "/help": _Command("/help", "show this"),
    "/exit": _Command("/exit", "end; so does Ctrl-D"),
}
WAYS_OUT = (
    "/reset forgets the conversation, --when-full drop drops its oldest turns, and --max-length makes the cache larger"
)


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model in several turns; each turn computes only its new tokens."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    cache: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    sampling: tyro.conf.OmitArgPrefixes[ChatSamplingOptions] = ChatSamplingOptions()
    system: str | None = None
    """System message; the template's own by default."""
    max_length: int | None = None
    """Size of the KV cache in tokens of conversation; by default 4096, or the widest window of the model's layers."""
    max_new_tokens: int = 512
    """Most tokens of one reply."""
    when_full: Literal["ask", "drop", "refuse"] = "ask"
    """When the cache is full: ask whether to drop the oldest turns, drop them, or refuse the message. Without a
    terminal nobody can be asked, and the message is refused."""
    history: bool = True
    """Keep what is typed in a terminal for later chats, in ~/.local/state/duo-jax/chat_history."""
    parse_special: bool = False
    """Special tokens that are typed are control tokens; by default they are text."""

    def run(self) -> None:
        """Load, then read and answer until the end of input."""
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        config = open_config(self.model.model)
        max_length = config.room(LENGTH) if self.max_length is None else self.max_length
        check_room("max_length", max_length, config)
        sampling, pattern = self.sampling.settings(self.model.sampling()), self.pattern.load(max_length)
        sampling.sampler()
        tokenizer = self.model.text_tokenizer()
        template.check_template(tokenizer, "duo generate continues a plain text")
        template.start(tokenizer)
        model = self.model.load(mesh=self.devices.make(), pattern=pattern)
        lm = LM(model, tokenizer, pattern, self.cache.kv_dtype, sampling)
        options: dict[str, Any] = {"parse_special": self.parse_special, "seed": self.sampling.seed}
        chat = Chat(lm, max_length=max_length, system=self.system, **options)
        Session(self, lm, chat, self._lines()).run()

    def _lines(self) -> Lines:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return Lines()
        from duo_jax.cli.terminal import Terminal

        return Terminal({name: command.takes_path for name, command in COMMANDS.items()}, history=self.history)


class Session:
    """Messages and commands of one conversation, until the end of input."""

    def __init__(self, settings: ChatCommand, lm: LM, chat: Chat, lines: Lines) -> None:
        self._settings, self._lm, self._chat, self._lines = settings, lm, chat, lines
        self._files: dict[str, str] = {}
        self._default = ""

    def run(self) -> None:
        """Read and answer."""
        keys = "Alt-Enter begins a new line, " if self._lines.keys else ""
        self._print(f"{self._settings.model.model}: sampling: {self._lm.sampling}")
        print(f"/help lists the commands, {keys}Ctrl-C stops a reply, Ctrl-D ends")
        while (line := self._read()) is not None:
            try:
                name = line.split(maxsplit=1)[0] if line.strip() else ""
                # A line that begins with a space is a message, and so is a paste that begins with a path.
                if line.startswith("/") and (name in COMMANDS or "\n" not in line):
                    if name == "/exit":
                        return
                    self._command(name, line[len(name) :].strip())
                elif line.strip():
                    self._send(line.strip())
            except BrokenPipeError:  # The reader of standard output has gone.
                raise
            except USER_ERRORS as error:
                _note(message_of(error))
            except KeyboardInterrupt:
                _note("interrupted")

    def _print(self, text: str, end: str = "\n") -> None:
        """Print text that a model or a file may have written."""
        print(text.translate(_CONTROLS) if self._lines.keys else text, end=end, flush=True)

    def _read(self) -> str | None:
        default, self._default = self._default, ""
        files = "".join(f"[+{name}] " for name in self._files)
        if self._lines.keys:
            return self._lines.read(f"{files}> ", default)
        # Without a terminal, each prompt shows how full the cache is.
        chat = self._chat
        return self._lines.read(f"[{chat.num_tokens}/{chat.max_length} tokens, {chat.nbytes / 1e6:.1f} MB] {files}> ")

    def _command(self, name: str, argument: str) -> None:
        chat = self._chat
        if name not in COMMANDS:
            raise ValueError(f"no command {name}; /help lists them, and a message may begin with a space: ' {name}'")
        if name == "/help":
            self._print(self._help())
        elif name == "/file":
            self._file(argument)
        elif name == "/retry":
            self._answer(None)
            if not self._lm.sampling.temperature:
                _note("the most likely tokens are the same each time: --temperature 0.7 samples others")
        elif name == "/undo":
            self._default = chat.undo()
            print("(taken back)")
        elif name == "/system":
            if argument:
                chat.reset("" if argument == "none" else argument)
                self._files.clear()
            self._print(f"(system message: {chat.system or 'none'})")
        elif name == "/reset":
            chat.reset()
            self._files.clear()
            print("(forgotten)")
        elif not argument:
            raise ValueError(f"{name} needs a file: {COMMANDS[name].usage}")
        elif name == "/save":
            save(path_of("path", argument), chat)
            self._print(f"(saved {len(chat.messages)} messages to {argument})")
        elif name == "/load":
            load(path_of("path", argument), chat)
            self._print(f"(loaded {len(chat.messages)} messages from {argument})")

    def _help(self) -> str:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"  {command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
        lines += [f"Keys: {self._lines.keys}; Ctrl-C stops a reply"] if self._lines.keys else []
        system = self._chat.system
        lines += [f"System message: {system}"] if system else []
        return "\n".join([*lines, f"Sampling: {self._lm.sampling}"])

    def _file(self, argument: str) -> None:
        """Put a text before the next message; without an argument, none."""
        if not argument:
            self._files.clear()
            print("(no file)")
            return
        most = MOST_BYTES_A_TOKEN * self._chat.max_length
        text = read_text(path_of("path", argument), most=most, way="start the chat with a larger --max-length")
        if not text.strip():
            raise ValueError(f"{argument} is empty")
        count = len(encode(self._lm.tokenizer, text, parse_special=self._settings.parse_special))
        if count >= self._chat.max_length:
            raise ValueError(
                f"{argument} has {count} tokens, more than the cache of {self._chat.max_length}: start the chat with a "
                "larger --max-length"
            )
        self._files[argument] = text
        self._print(f"({argument}, {count} tokens, comes before your next message)")

    def _send(self, text: str) -> None:
        if self._answer("\n\n".join([*self._files.values(), text])):
            self._files.clear()

    def _answer(self, text: str | None) -> bool:
        """Show the answer to a message, or to the last one again; whether the message is in the conversation."""
        chat, most = self._chat, self._settings.max_new_tokens
        self._make_room(text)
        phases, running, is_shown, is_stopped = Phases(), None, False, False
        with _interruptible() as interrupted:

            def progress(done: int) -> None:
                show_status(f"reading: {done} tokens")
                if interrupted():
                    raise KeyboardInterrupt

            options: dict[str, Any] = {"max_new_tokens": most, "stop": self._settings.sampling.stop}
            options |= {"watch": phases.watch, "progress": progress}
            try:
                running = chat.retry(**options) if text is None else chat.say(text, **options)
                for piece in running:
                    if piece and not is_shown:
                        show_status("")
                    is_shown = is_shown or bool(piece)
                    self._print(piece, end="")
                    if interrupted():
                        is_stopped = True
                        break
            except KeyboardInterrupt:
                is_stopped = True
            finally:
                show_status("")
                if is_shown or not self._lines.keys:
                    print(" (stopped)" if is_stopped else "")
        if is_stopped and not is_shown:
            if text is None:
                _note("stopped before the reply: /retry answers again")
                return True
            if running is not None:
                chat.undo()
            _note("stopped before the reply: the message is not part of the conversation")
            return False
        if running is not None:
            is_cut = running.reply.finish_reason == "length" and not is_stopped
            is_full = chat.num_tokens == chat.max_length
            cut = (", cut: the cache is full" if is_full else f", cut at --max-new-tokens {most}") if is_cut else ""
            _note(
                f"{phases.new_tokens} tokens at {phases.rate:.1f}/s{cut}; KV cache: {chat.num_tokens} of "
                f"{chat.max_length} tokens, {chat.nbytes_used / 1e6:.1f} of {chat.nbytes / 1e6:.1f} MB"
            )
            if is_full:
                ways = {"drop": "the next message drops the oldest turns"}
                if self._lines.keys:
                    ways["ask"] = "the next message asks whether to drop the oldest turns"
                _note(f"the cache is full: {ways.get(self._settings.when_full, WAYS_OUT)}")
        return True

    def _make_room(self, text: str | None) -> None:
        """Drop the oldest turns if the answer would be cut off, as far as the user agrees.

        Raises:
            ValueError: the message does not fit.
        """
        chat, when = self._chat, self._settings.when_full
        room = chat.room(text)
        turns = sum(message["role"] == "user" for message in chat.messages) - (text is None)
        is_tight = room < min(self._settings.max_new_tokens, chat.max_length // LEAST_ROOM)
        if turns and is_tight and when != "refuse":
            left = f"room for a reply of {room} tokens" if room > 0 else "no room for a reply"
            if when == "drop" or self._lines.confirm(f"The cache has {left}. Drop the oldest turns?"):
                count = chat.drop_oldest(text)
                _note(f"dropped the oldest {count} of {count + len(chat.messages)} messages")
                return
        if room < 1:
            way = f"it is full; {WAYS_OUT}" if turns else "shorten the message, or start with a larger --max-length"
            raise ValueError(f"the conversation has {chat.max_length - room} tokens of {chat.max_length}: {way}")


def save(path: Path, chat: Chat) -> None:
    """Write a conversation as a list of messages.

    Raises:
        FileExistsError: a file that is not a saved conversation.
        OSError, ValueError: the file cannot be written.
    """
    try:
        check_output(path, is_chat)
    except FileExistsError:
        raise FileExistsError(f"{path} exists and is not a saved conversation: choose another name") from None
    write_text(path, json.dumps(chat.messages, ensure_ascii=False, indent=1) + "\n")


def load(path: Path, chat: Chat) -> None:
    """Continue a conversation that `save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a list of messages, or they are refused by the chat template.
    """
    try:
        messages = parse_json(read_text(path, most=MOST_JSON_BYTES), path)
        chat.restore([] if messages == [] else template.checked_messages(messages))
    except ValueError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"{where}{error} (/load reads what /save wrote; /file reads a text)") from None


def is_chat(head: bytes) -> bool:
    """Whether a file that begins like this is a conversation that `/save` wrote."""
    return head.startswith((b'[\n {\n  "role": ', b"[]"))


def _note(text: str) -> None:
    """A remark on standard error, dim in a terminal."""
    begin, end = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    print(f"{begin}({text.translate(_CONTROLS)}){end}", file=sys.stderr, flush=True)


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
