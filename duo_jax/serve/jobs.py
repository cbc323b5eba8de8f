"""Job: a prompt and its reply, and the actions by which a device serves it, which the scheduler decides on."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias


@dataclass(eq=False)
class Job:
    """A prompt and its reply so far.

    Attributes:
        tokens: both, in one list.
        prompt: tokens of the prompt.
        most: most tokens of the reply; 0 keeps the prompt as a permanent prefix.
        keep_end: keep the state at the end of the prompt, for further replies to it.
        owner: whatever asked for it.
        saved: keys and values of the prompt, for the device to load, where it is a permanent prefix computed elsewhere.
        under: the number of the loaded prefix that the prompt continues, as in `Hit`.
        number: place in the order of arrival.
        row: its row; None while it waits.
        pages: the pages of its row, each held once.
        length: tokens in the cache.
        marks: lengths at which the tree must get a snapshot while the prompt is computed, other chunks may have one.
        snapshot: length and entry of the newest snapshot of the reply, which the tree does not have yet.
        cached: tokens of the prompt that were in the cache when it was first admitted; None before.
        preempted: how often it was preempted.
    """

    tokens: list[int]
    most: int
    keep_end: bool = False
    owner: Any = None
    saved: Any = None
    under: int = 0
    prompt: int = field(init=False)
    number: int = -1
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    length: int = 0
    marks: frozenset[int] = frozenset()
    snapshot: tuple[int, int] | None = None
    cached: int | None = None
    preempted: int = 0

    def __post_init__(self) -> None:
        """Count the prompt."""
        self.prompt = len(self.tokens)

    @property
    def is_filled(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.length >= self.prompt

    @property
    def forced(self) -> int | None:
        """The token after those in the cache, if it was chosen before the job was preempted; None: it is to choose."""
        return self.tokens[self.length] if self.length < len(self.tokens) else None


class Admit(NamedTuple):
    """Give a row to a job, with pages, and the rings of a snapshot if its prefix is known."""

    job: Job
    row: int
    pages: tuple[int, ...]
    snapshot: int | None


class Fill(NamedTuple):
    """Append tokens of a prompt to a row."""

    row: int
    tokens: tuple[int, ...]


class Load(NamedTuple):
    """Fill a row with keys and values that were computed elsewhere."""

    row: int
    length: int
    saved: Any


class First(NamedTuple):
    """Choose the first token after a prompt."""

    job: Job
    row: int
    forced: int | None


class Step(NamedTuple):
    """Append the newest token of each of these jobs, and choose the next: each with its row and `Job.forced`."""

    rows: tuple[First, ...]


class Assign(NamedTuple):
    """Give a row a page as that of this number in its table."""

    row: int
    number: int
    page: int


class Copy(NamedTuple):
    """Copy a page."""

    source: int
    target: int


class Save(NamedTuple):
    """Copy the rings of a row to an entry of the snapshots."""

    row: int
    snapshot: int


class Kept(NamedTuple):
    """The job of a permanent prefix has ended; without a snapshot, it is not kept. The device does nothing."""

    job: Job
    is_kept: bool


Action: TypeAlias = Admit | Fill | Load | First | Step | Assign | Copy | Save | Kept
