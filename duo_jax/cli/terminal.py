"""Terminal: lines that are typed, with editing, completion and history, by prompt_toolkit. Knows no model.

Imported only where `duo chat` runs in a terminal.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.shortcuts import confirm

from duo_jax.cli.lines import Lines
from duo_jax.files import write_bytes

# Of a longer history, the newer half is kept: all of it is read at the start.
MOST_HISTORY = 1 << 20
# How prompt_toolkit begins an entry.
_ENTRY = b"\n# "


class Terminal(Lines):
    """Reads what is typed. A message may have several lines."""

    keys = (
        "Alt-Enter (or Esc, Enter), or \\ at the end of a line, begins a new line; a paste keeps its lines; Tab "
        "completes commands and paths; the arrow keys and Ctrl-R find earlier lines"
    )

    def __init__(self, commands: Mapping[str, bool], *, history: bool = True) -> None:
        """Open the history.

        Args:
            commands: names to complete, and whether a path follows.
            history: keep what is typed in a file, for later chats.
        """
        path = history_path() if history else None
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=Commands(commands),
            complete_while_typing=False,
            history=InMemoryHistory() if path is None else open_history(path),
        )

    def read(self, prompt: str, default: str = "") -> str | None:
        """See `Lines`."""
        while True:
            try:
                return str(self._session.prompt(prompt, default=default))
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit ends the chat)")

    def confirm(self, question: str) -> bool:
        """Ask a question; Ctrl-C means no."""
        try:
            return confirm(question, " (y/n) ")
        except (EOFError, KeyboardInterrupt):
            return False


def history_path() -> Path | None:
    """`duo-jax/chat_history` in `$XDG_STATE_HOME`, by default `~/.local/state`; None without a home folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):  # Others are ignored, as the XDG specification says.
        return Path(state) / "duo-jax" / "chat_history"
    try:
        return Path.home() / ".local" / "state" / "duo-jax" / "chat_history"
    except RuntimeError:
        return None


def open_history(path: Path) -> History:
    """The history in a file that only its user can read; one in memory where there can be no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY | os.O_NONBLOCK, 0o600))
        if not path.is_file():
            return InMemoryHistory()
        if path.stat().st_size > MOST_HISTORY:
            with path.open("rb") as file:
                file.seek(-MOST_HISTORY // 2, os.SEEK_END)
                write_bytes(path, b"".join(file.read().partition(_ENTRY)[1:]))
    except (OSError, ValueError):
        return InMemoryHistory()
    return _History(str(path))


class _History(FileHistory):
    """A file that cannot be written to, such as on a full disk, does not end a chat."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


class Commands(Completer):
    """Completes the name of a command, and a path after those that take one."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        """See `Terminal`."""
        self._commands, self._paths = commands, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """See `Completer`."""
        name, space, argument = document.text_before_cursor.partition(" ")
        if not space:
            names = (each for each in self._commands if name.startswith("/") and each.startswith(name))
            yield from (Completion(each, start_position=-len(name)) for each in names)
        elif self._commands.get(name):
            yield from self._paths.get_completions(Document(argument, len(argument)), complete_event)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor(1)
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # What the terminal makes of it while nobody reads.
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add(Keys.Vt100MouseEvent)
    def ignore(event: KeyPressEvent) -> None:
        """Typed bytes such as a colour code look like a mouse's, and prompt_toolkit fails to read them."""

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
