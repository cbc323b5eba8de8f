"""Scheduler: what the device does next. Decisions only: it knows numbers of rows and pages, no arrays and no text.

Jobs are admitted in the order of their arrival. A job gets its row and its pages when its prompt begins to be computed,
and the next one is admitted once that is done: it then finds the prefix that the one before has computed. Between two
steps of the rows that decode, at most one chunk of a prompt is computed: no prompt delays a reply by more.

Decoding takes pages as it needs them. If none is free the tree gives up prefixes, then the newest job is preempted:
it waits, first in the queue, until its pages are likely to last. It computes its prompt again, cut as before, then
appends its reply token by token, of which it knows all but the next one. So it passes through the same programs, and
continues with the same numbers. The oldest job is never preempted, as every job fits into the pool by itself (`check`).
Where the device loses its rows, all jobs continue in the same way.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from duo_jax.arguments import whole_number
from duo_jax.serve.jobs import Action, Admit, Assign, Copy, Fill, First, Job, Kept, Load, Save, Step
from duo_jax.serve.pages import Pool
from duo_jax.serve.prefix import Hit, PrefixTree


class QueueFullError(ValueError):
    """Too many jobs wait; others may be accepted later."""


@dataclass(frozen=True)
class Sizes:
    """How much is served at a time.

    Attributes:
        rows: sequences that decode together.
        pages: pages of the pool.
        page_size: tokens of a page.
        chunk_size: tokens of a prompt that are computed at a time, a multiple of `page_size`.
        row_pages: most pages of a row.
        snapshots: copies of a row's rings that the prefix cache keeps.
        snapshot_every: tokens of a long text after which it can be continued, besides the ends of turns and where
            prompts part; rounded up to whole chunks.
        queue: most jobs that wait.
        reuse_replies: whether prefixes may end in a reply, whose keys were computed token by token: these agree with
            those of a prompt to rounding.
    """

    rows: int
    pages: int
    page_size: int
    chunk_size: int
    row_pages: int
    snapshots: int
    snapshot_every: int = 2048
    queue: int = 1024
    reuse_replies: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("rows", "pages", "page_size", "chunk_size", "row_pages", "snapshot_every"):
            whole_number(name, getattr(self, name), 1)
        for name in ("snapshots", "queue"):
            whole_number(name, getattr(self, name), 0)
        if self.chunk_size % self.page_size:
            raise ValueError(
                f"a chunk is whole pages, got {self.chunk_size} tokens for pages of {self.page_size}: use a multiple"
            )

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence in the cache, prompt and reply together."""
        return min(self.row_pages, self.pages) * self.page_size

    def pages_of(self, length: int) -> int:
        """Pages that so many tokens take."""
        return -(-length // self.page_size)

    def is_mark(self, length: int) -> bool:
        """Whether a long text gets a snapshot here."""
        every = -(-self.snapshot_every // self.chunk_size) * self.chunk_size
        return length % every == 0


@dataclass
class Counts:
    """What has happened so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompts: int = 0
    hits: int = 0
    preemptions: int = 0


class Scheduler:
    """The queue, the rows, the pages and the prefix tree.

    Ask for the `next` actions, carry them out in order, and tell it each token that was `chosen`. Between these, jobs
    are added, finished and cancelled.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Nothing waits, everything is free."""
        self.sizes, self.counts = sizes, Counts()
        self._waiting: deque[Job] = deque()
        self._rows: list[Job | None] = [None] * sizes.rows
        self._filling: Job | None = None
        self._turn: list[Job] = []  # Jobs of the newest actions.
        self._coming: set[Job] = set()  # Those whose prompts will be permanent prefixes.
        self._step_is_due = False
        self._count = 0
        self._free_all()

    def _free_all(self) -> None:
        sizes = self.sizes
        self.pages, self.snapshots = Pool(sizes.pages), Pool(sizes.snapshots)
        self.tree = PrefixTree(self.pages, self.snapshots, page_size=sizes.page_size, chunk_size=sizes.chunk_size)
        self._permanent: list[Job] = []  # Those whose prompts are permanent prefixes.

    @property
    def running(self) -> list[Job]:
        """Jobs with a row, the oldest first."""
        return sorted((job for job in self._rows if job is not None), key=lambda job: job.number)

    @property
    def num_waiting(self) -> int:
        """Jobs without a row."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is no job."""
        return not self._waiting and all(job is None for job in self._rows)

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens of a reply to this prompt that the cache has pages for, all of them if need be; 0 or less: none.

        The last token of a reply is not appended.
        """
        sizes, pinned = self.sizes, self.tree.num_pinned - self.tree.num_pinned_of(prompt)
        for job in self._coming:
            rest = 0 if job.saved is not None else job.prompt % sizes.chunk_size
            pinned += sizes.pages_of(job.prompt - rest)
        pages = min(sizes.row_pages, sizes.pages - pinned)
        return pages * sizes.page_size - len(prompt) + 1

    def check(self, prompt: Sequence[int], most: int) -> None:
        """Raise ValueError for a job that could not be finished even by itself."""
        if max(most, 1) > (room := self.room(prompt)):
            reply = f" and {most} of reply" if most else ""
            raise ValueError(
                f"a prompt of {len(prompt)} tokens{reply} do not fit: a request has room for {len(prompt) + room - 1} "
                "tokens; shorten the prompt, or ask for fewer tokens"
            )

    def check_queue(self, count: int = 1) -> None:
        """Raise QueueFullError if so many more jobs may not wait."""
        if (waiting := len(self._waiting)) + count > self.sizes.queue + self._rows.count(None):
            raise QueueFullError(f"{waiting} requests are waiting: try again later")

    def add(self, *jobs: Job) -> None:
        """Let jobs wait, after all others.

        Raises:
            QueueFullError: too many wait already; none is added.
            ValueError: a job that does not fit by itself, or a permanent prefix that leaves no room for another job.
        """
        for job in jobs:
            self.check(job.tokens, job.most)
        self.check_queue(len(jobs))
        for job in jobs:
            if not job.most:
                self._check_others(job)
            job.number, self._count = self._count, self._count + 1
            self._waiting.append(job)

    def _check_others(self, prefix: Job) -> None:
        """Count the pages of a permanent prefix from now on, if all jobs fit beside it."""
        self._coming.add(prefix)
        try:
            for job in (*self._waiting, *self.running):
                if job.most:
                    self.check(job.tokens[: job.prompt], job.most)
        except ValueError:
            self._coming.remove(prefix)
            raise ValueError(
                f"a prefix of {prefix.prompt} tokens does not fit beside a request that was accepted: keep it later"
            ) from None

    def next(self) -> list[Action]:
        """What the device does next: part of a prompt, or a step of all rows. Empty if there is no job."""
        actions: list[Action] = []
        if self._filling is None:
            self._admit(actions)
        is_decoding = any(job is not None and job is not self._filling for job in self._rows)
        if self._filling is not None and not (self._step_is_due and is_decoding):
            self._step_is_due, self._turn = True, [self._filling]
            self._fill(self._filling, actions)
        elif is_decoding:
            self._step_is_due = False
            self._step(actions)
        return actions

    def chosen(self, job: Job, token: int) -> bool:
        """Take the token that a `First` or `Step` has chosen for a job; False if it was known already."""
        if job.forced is not None:
            return False
        job.tokens.append(token)
        return True

    def finish(self, job: Job) -> None:
        """End a job, whether its reply is complete or is not wanted any more; its pages stay in the tree."""
        self._coming.discard(job)
        if job.row is None:
            self._waiting.remove(job)
            return
        if job.snapshot is not None:
            length, entry = job.snapshot
            job.snapshot = None
            self.tree.insert(job.tokens[:length], job.pages, entry, under=job.under, of_reply=True)
        self._leave(job)

    def fail(self, job: Job) -> None:
        """End a job whose numbers are not finite; what it computed is not used again."""
        self._coming.discard(job)
        self.tree.forget(job.tokens[: job.length], job.under)
        self._leave(job)

    def end(self) -> None:
        """End all jobs, whose device computes no more."""
        for job in self.running:
            self._leave(job)
        self._waiting.clear()

    def restart(self) -> list[Job]:
        """End the jobs of the newest actions, in which the device lost its rows, and return them.

        All other jobs and the permanent prefixes are computed again.
        """
        # A prefix that was to be permanent after these actions has no row any more.
        failed = [job for job in self._turn if job.row is not None or not job.most]
        for job in failed:
            self._coming.discard(job)
            if job.row is not None:
                self._leave(job)
        for job in reversed(self.running):
            self._preempt(job)
        again = [Job(job.tokens, 0) for job in self._permanent if job not in failed]
        self._coming.update(again)
        self._waiting.extendleft(again)
        self._free_all()
        return failed

    def _admit(self, actions: list[Action]) -> None:
        """Admit the job that has waited longest, if there are a row and pages for it."""
        if not self._waiting or None not in self._rows:
            return
        job = self._waiting[0]
        hit = self.tree.match(job.tokens[: job.prompt]) if job.saved is None else Hit()
        # Every job that decodes may soon need another page. One that was preempted needs those of its reply too.
        reserve = sum(other is not None for other in self._rows)
        own_pages = self.sizes.pages_of(job.prompt) - len(hit.pages)
        needed = self.sizes.pages_of(len(job.tokens) + 1) - len(hit.pages) + (hit.length % self.sizes.page_size > 0)
        if reserve and needed + reserve > self.pages.num_free + self.tree.num_evictable:
            self.pages.release(hit.pages)
            return
        self._waiting.popleft()
        job.row, job.length, job.under = self._rows.index(None), hit.length, hit.under
        self._rows[job.row] = job
        job.pages = [*hit.pages, *(self._take_page() for _ in range(own_pages))]
        last = job.prompt - job.prompt % self.sizes.chunk_size
        parting = hit.shared - hit.shared % self.sizes.chunk_size
        job.marks = frozenset({last, parting} - {0})
        if job.cached is None:
            job.cached = hit.length
            self.counts.prompts += 1
            self.counts.hits += hit.length > 0
            self.counts.prompt_tokens += job.prompt
            self.counts.cached_tokens += hit.length
        self._filling = job
        actions.append(Admit(job, job.row, tuple(job.pages), hit.snapshot if hit.length else None))
        if hit.length < job.prompt and hit.length % self.sizes.page_size:
            # A loaded prefix ends within a page, which the prompt continues.
            self._give_page(job, len(hit.pages) - 1, actions)

    def _fill(self, job: Job, actions: list[Action]) -> None:
        """Compute a chunk of a prompt, and after the last one choose the first token."""
        assert job.row is not None
        if job.saved is not None:
            actions.append(Load(job.row, job.prompt, job.saved))
            job.length = job.prompt
            self._save(job, actions, is_spare=False)
        if not job.is_filled:
            end = min(job.length - job.length % self.sizes.chunk_size + self.sizes.chunk_size, job.prompt)
            actions.append(Fill(job.row, tuple(job.tokens[job.length : end])))
            job.length = end
            is_kept = end in job.marks or self.sizes.is_mark(end) or (job.is_filled and job.keep_end)
            # A permanent prefix would keep the copies after all its chunks.
            if is_kept or (job.most and end % self.sizes.chunk_size == 0):
                self._save(job, actions, is_spare=not is_kept)
        if not job.is_filled:
            return
        self._filling = None
        if job.most:
            actions.append(First(job, job.row, job.forced))
        else:
            is_kept = self.tree.pin(job.tokens, job.under) if job.saved is None else job.under > 0
            if is_kept:
                self._permanent.append(job)
            self._coming.remove(job)
            job.saved = None  # What is computed again is computed from its tokens.
            self._leave(job)
            actions.append(Kept(job, is_kept))

    def _step(self, actions: list[Action]) -> None:
        """Append a token to every row whose prompt is computed."""
        rows = []
        for job in self.running:
            if job.row is None or job is self._filling or not self._make_room(job, actions):
                continue
            job.length += 1
            rows.append(First(job, job.row, job.forced))
        self._turn = [entry.job for entry in rows]
        if rows:
            actions.append(Step(tuple(rows)))
        for job, _, _ in rows:
            if self.sizes.reuse_replies and job.length % self.sizes.chunk_size == 0:
                self._save_reply(job, actions)

    def _make_room(self, job: Job, actions: list[Action]) -> bool:
        """Give a job a page of its own for its next token; False if it had to be preempted itself."""
        assert job.row is not None
        index = job.length // self.sizes.page_size
        while not (index < len(job.pages) and not self.pages.is_shared(job.pages[index])):
            if self._can_take():
                self._give_page(job, index, actions)
                return True
            if self.tree.drop_end(job.tokens[: job.prompt], job.under):
                continue  # Perhaps only the tree shared the page.
            newest = self.running[-1]
            self._preempt(newest)
            if newest is job:
                return False
        return True

    def _give_page(self, job: Job, index: int, actions: list[Action]) -> None:
        """Give a job a page, with what it has of it so far if others have that too."""
        assert job.row is not None
        page = self._take_page()
        if index < len(job.pages):
            shared = job.pages[index]
            actions.append(Copy(shared, page))
            self.pages.release([shared])
            job.pages[index] = page
        else:
            job.pages.append(page)
        actions.append(Assign(job.row, index, page))

    def _preempt(self, job: Job) -> None:
        self.counts.preemptions += 1
        job.preempted += 1
        self._leave(job)
        self._waiting.appendleft(job)

    def _leave(self, job: Job) -> None:
        """Take a job's row and pages."""
        assert job.row is not None
        self._rows[job.row], job.row, job.length = None, None, 0
        if job.snapshot is not None:
            self.snapshots.release([job.snapshot[1]])
            job.snapshot = None
        if self._filling is job:
            self._filling = None
        self.pages.release(job.pages)
        job.pages = []

    def _can_take(self) -> bool:
        """Whether a page is free, after the tree has given up one if need be."""
        return self.pages.num_free > 0 or self.tree.evict_page()

    def _take_page(self) -> int:
        self._can_take()
        return self.pages.take()

    def _take_snapshot(self, *, is_spare: bool = False) -> int | None:
        """An entry for a snapshot; None if all are in use elsewhere, or if a spare one would cost the end of a text."""
        if not self.snapshots.num_free and not self.tree.evict_snapshot(within=is_spare):
            return None
        return self.snapshots.take()

    def _save(self, job: Job, actions: list[Action], *, is_spare: bool) -> None:
        """Give the tree the prompt so far, with a snapshot."""
        assert job.row is not None
        entry = self._take_snapshot(is_spare=is_spare)
        if entry is None:
            return
        actions.append(Save(job.row, entry))
        if job.saved is None:
            self.tree.insert(job.tokens[: job.length], job.pages, entry, under=job.under)
        else:
            job.under = self.tree.load(job.tokens, job.pages, entry)

    def _save_reply(self, job: Job, actions: list[Action]) -> None:
        """Keep a snapshot of the reply so far in place of the one before; the tree gets one from time to time."""
        assert job.row is not None
        entry = self._take_snapshot() if job.snapshot is None else job.snapshot[1]
        if entry is None:
            return
        actions.append(Save(job.row, entry))
        job.snapshot = job.length, entry
        if self.sizes.is_mark(job.length):
            job.snapshot = None
            self.tree.insert(job.tokens[: job.length], job.pages, entry, under=job.under, of_reply=True)
