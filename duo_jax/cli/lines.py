"""Lines: what a user types or pipes into a command, line by line. Knows no model."""

import sys


class Lines:
    """Standard input as it is: every line is a message. `cli.terminal.Terminal` edits lines."""

    # The keys of an editor, for a help text.
    keys = ""

    def read(self, prompt: str, default: str = "") -> str | None:
        """Read a message, after a prompt; None at the end of input. An editor begins with the text `default`."""
        while True:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit ends the chat)")
            except UnicodeDecodeError as error:
                print(f"(the line is not UTF-8 text: {error})", file=sys.stderr)

    def confirm(self, question: str) -> bool:
        """The answer to a question; False where nobody can answer."""
        return False
