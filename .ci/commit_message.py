"""Check a commit message: an imperative subject of at most 72 characters, a blank line, and a body with the why.

Called by the commit-msg hook of pre-commit with the file that contains the message. Merges, reverts and fixups pass.
"""

import re
import sys
from pathlib import Path

LIMIT = 72
GENERATED = re.compile(r"Merge |Revert |(fixup|squash|amend)! ")
SCISSORS = "# ------------------------ >8 ------------------------"  # `git commit --verbose` puts the diff below
# First words that are not imperatives, besides those that end in -ed or -ing.
OTHER_FORMS = {"wip", "made", "wrote", "did", "was", "were", "ran", "got", "built", "the", "a", "an", "this", "these"}
IMPERATIVES = {
    "bring",
    "embed",
    "exceed",
    "feed",
    "need",
    "ping",
    "proceed",
    "seed",
    "shed",
    "speed",
    "string",
    "succeed",
    "wed",
}


def faults(message: str) -> list[str]:
    """The message's faults; empty if it has none."""
    lines = message.partition(SCISSORS)[0].splitlines()
    lines = [line.rstrip() for line in lines if not line.startswith("#")]
    while lines and not lines[0]:
        del lines[0]
    subject, *rest = lines or [""]
    if GENERATED.match(subject):
        return []
    found = []
    if not subject:
        return ["the message is empty"]
    if len(subject) > LIMIT:
        found.append(
            f"the subject has {len(subject)} characters, at most {LIMIT} are allowed: move details to the body"
        )
    if subject.endswith("."):
        found.append("the subject ends with a period: remove it")
    # An area may come first, as in "cache: split the spec from the store".
    words = re.sub(r"^[\w./ -]+: ", "", subject).split()
    first = words[0].lower().strip("`'\",:") if words else ""
    inflected = first.endswith(("ed", "ing")) and first not in IMPERATIVES
    if inflected or first in OTHER_FORMS or not first:
        found.append(f"the subject begins with {first!r}: begin with an imperative, such as 'Add' or 'Fix'")
    if rest and rest[0]:
        found.append("the second line is not blank")
    if not any(rest):
        found.append("there is no body: add a blank line and explain why the change is made")
    return found


def main(path: str) -> int:
    """Print the faults of the message in a file; 1 if there are any."""
    found = faults(Path(path).read_text(encoding="utf-8"))
    for fault in found:
        print(f"commit message: {fault}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
