"""Engine: a thread that serves requests on a device, and the events that it sends to those who wait. Knows no HTTP.

The thread alone uses the device. Requests come from any thread, and events go to a listener that is called by the
engine's thread, or to whoever iterates over the handle.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duo_jax.arguments import ArgumentError
from duo_jax.finite import not_finite
from duo_jax.serve.device import Chosen, Device
from duo_jax.serve.jobs import Action, Job, Kept
from duo_jax.serve.requests import Event, FinishEvent, Listener, Reason, Request, TokenEvent, Usage
from duo_jax.serve.scheduler import Scheduler, Sizes
from duo_jax.text.ends import Ends, stop_ends
from duo_jax.text.reply import Reply, Row
from duo_jax.text.tokenizer import TextTokenizer

# Why requests are refused, and open replies end.
CLOSING = "the server is shutting down"
# How jax reports that memory ran out: before a program runs, and while it does.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
LOG = logging.getLogger(__name__)


class ClosedError(RuntimeError):
    """The engine takes no more requests: it was closed, or its device failed."""


@dataclass(eq=False)
class Running:
    """A reply in the making: the owner of a job.

    Attributes:
        request: what was asked for.
        number: which of the request's replies.
        row: its text.
        ends: what ends it.
        job: the job.
        listener: called with each event of the reply.
    """

    request: Request
    number: int
    row: Row
    ends: Ends
    job: Job
    listener: Listener

    @property
    def usage(self) -> Usage:
        """What it has taken so far."""
        job = self.job
        return Usage(job.prompt, job.cached or 0, len(job.tokens) - job.prompt)


@dataclass(frozen=True)
class Metrics:
    """What the engine does now, and has done since it started.

    Attributes:
        rows: rows, of which `running` are in use.
        running: requests with a row.
        waiting: requests without.
        pages: pages of the pool, of which `pages_free` are free.
        pages_free: pages that nobody holds.
        pages_prefix: pages of prefixes.
        snapshots: copies of rings that prefixes and replies have.
        kv_bytes: bytes of keys and values in use: pages, rings of running rows, snapshots.
        full_kv_bytes: bytes that full attention would hold for the same tokens.
        prompts: prompts so far, of which `hits` began with a known prefix.
        hits: prompts with a known prefix.
        prompt_tokens: tokens of all prompts, of which `cached_tokens` were not computed.
        cached_tokens: tokens of prompts that were in the cache.
        reply_tokens: tokens of all replies.
        preemptions: how often a request lost its pages for a time.
        finished: replies by the reason of their end.
    """

    rows: int
    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_prefix: int
    snapshots: int
    kv_bytes: int
    full_kv_bytes: int
    prompts: int
    hits: int
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    preemptions: int
    finished: dict[str, int]


class Handle(Iterator[Event]):
    """A request that was accepted: iterate over the events of all its replies, or `cancel` it."""

    def __init__(self, engine: "Engine", count: int) -> None:
        """See `Engine.submit`."""
        self._engine, self._open = engine, count
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.runs: list[Running] = []

    def put(self, event: Event) -> None:
        """Take an event from the engine."""
        self._events.put(event)

    def __next__(self) -> Event:
        """Wait for the next event."""
        if not self._open:
            raise StopIteration
        event = self._events.get()
        self._open -= isinstance(event, FinishEvent)
        return event

    def cancel(self) -> None:
        """End all replies that have not ended yet."""
        self._engine.cancel(self.runs)

    def replies(self) -> list[Reply]:
        """Wait for the end, and return all replies.

        Raises:
            FloatingPointError: NaN or infinite logits.
            ClosedError: the engine was closed, or its device failed.
        """
        for event in self:
            if isinstance(event, FinishEvent) and event.reason == "error":
                raise ClosedError(event.error) if not self._engine.is_open else FloatingPointError(event.error)
        return [run.row.reply for run in self.runs]


class Engine:
    """Serves requests until it is closed; a context manager."""

    def __init__(
        self,
        device: Device,
        sizes: Sizes,
        tokenizer: TextTokenizer,
        *,
        vocab_size: int,
        eos_ids: Sequence[int] = (),
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Compile the device's programs and start.

        Args:
            device: carries out what the scheduler decides.
            sizes: how much is served at a time.
            tokenizer: the model's, for the text of replies.
            vocab_size: token ids are below this.
            eos_ids: tokens that end a reply.
            progress: called with the name of each program before it is compiled.
        """
        self.sizes, self.tokenizer, self.eos_ids = sizes, tokenizer, tuple(eos_ids)
        self._device, self._vocab_size = device, vocab_size
        self._scheduler = Scheduler(sizes)
        self._finished: Counter[str] = Counter()
        self._reply_tokens = 0
        # Guards the scheduler and everything below; the device works without it.
        self._change = threading.Condition()
        self._runs: dict[Running, None] = {}
        self._cancelled: list[Running] = []
        self._is_closing = self._must_stop = False
        self._failure = ""
        for name in device.compile():
            if progress is not None:
                progress(name)
        self._thread = threading.Thread(target=self._serve, name="duo-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close(0)

    @property
    def failure(self) -> str:
        """Why the device failed; empty while it works."""
        return self._failure

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted."""
        return not self._is_closing and not self._failure

    def check_accepts(self) -> None:
        """Raise at once what `submit` would raise for any request.

        Takes no lock, so that refusals do not wait for the engine: whoever is not refused may still be by `submit`.

        Raises:
            QueueFullError: too many requests are waiting.
            ClosedError: the engine was closed, or its device failed.
        """
        if not self.is_open:
            raise ClosedError(self._failure or CLOSING)
        self._scheduler.check_queue()

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Let a request wait for its turn.

        Args:
            request: the request.
            listener: called with every event by the engine's thread, which it must not delay; by default the events
                are those of the handle.

        Raises:
            ValueError: a request that this model or this cache cannot serve.
            QueueFullError: too many requests are waiting.
            ClosedError: the engine was closed, or its device failed.
        """
        prompt = request.prompt
        self._check_ids("prompt", prompt)
        eos_ids = self.eos_ids if request.eos_ids is None else request.eos_ids
        ends = stop_ends(self.tokenizer, self._vocab_size, eos_ids, request.stop)
        handle = Handle(self, request.n)
        for number in range(request.n):
            # The end of the prompt is kept for the replies that follow.
            job = Job(list(prompt), 1, keep_end=number < request.n - 1)
            row = Row(self.tokenizer, ends)
            job.owner = Running(request, number, row, ends, job, listener or handle.put)
            handle.runs.append(job.owner)
        with self._change:
            if not self.is_open:
                raise ClosedError(self._failure or CLOSING)
            most = self._scheduler.room(prompt) if request.max_tokens is None else request.max_tokens
            jobs = [run.job for run in handle.runs]
            for job in jobs:
                job.most = max(most, 1)
            self._scheduler.add(*jobs)
            self._runs.update(dict.fromkeys(handle.runs))
            self._change.notify()
        return handle

    def keep(self, prompt: Sequence[int], saved: Any = None) -> None:
        """Compute a prefix now and keep it for ever; requests that begin with it do not compute it again.

        Args:
            prompt: its token ids.
            saved: its keys and values, for the device to load in place of computing them: `duo_jax.serve.start`.

        Raises:
            ValueError: a prefix shorter than a chunk, one that does not fit, or not beside open requests, ids of
                another vocabulary, a prefix for every snapshot already, or no memory left to compute it.
            ClosedError: the engine was closed, or its device failed.
        """
        self._check_ids("prefix", prompt)
        # A text whose keys are loaded has a token more, which every prompt computes again.
        count = len(prompt) + (saved is not None)
        if count < self.sizes.chunk_size:
            raise ValueError(
                f"a prefix of {count} tokens cannot be kept: it must have at least {self.sizes.chunk_size}"
            )
        job = Job(list(prompt), 0, saved=saved)
        row = Row(self.tokenizer)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job.owner = Running(Request(tuple(prompt)), 0, row, Ends(), job, events.put)
        with self._change:
            if not self.is_open:
                raise ClosedError(self._failure or CLOSING)
            self._scheduler.add(job)
            self._runs[job.owner] = None
            self._change.notify()
        end = events.get()
        if isinstance(end, FinishEvent) and end.reason == "error":
            raise ValueError(end.error) if self.is_open else ClosedError(end.error)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        if not ids:
            raise ArgumentError(name, "must have at least one token")
        if (least := min(ids)) < 0 or max(ids) >= self._vocab_size:
            wrong = least if least < 0 else max(ids)
            raise ArgumentError(name, f"must have token ids from 0 to {self._vocab_size - 1}, got {wrong}")

    def cancel(self, runs: Sequence[Running]) -> None:
        """End replies; those that have ended already stay as they are."""
        with self._change:
            self._cancelled += runs
            self._change.notify()

    def close(self, seconds: int | float | None = None) -> None:
        """Take no more requests, give the others this time to end (None: all they need), and stop.

        Those that have not ended then get an error.
        """
        with self._change:
            self._is_closing = True
            if seconds != 0:
                self._change.wait_for(lambda: not self._runs, seconds)
            self._must_stop = True
            self._change.notify_all()
        self._thread.join()

    def metrics(self) -> Metrics:
        """Numbers of now."""
        with self._change:
            scheduler, counts = self._scheduler, self._scheduler.counts
            running, held = len(scheduler.running), scheduler.pages.num_held
            rings = running + scheduler.snapshots.num_held
            return Metrics(
                rows=self.sizes.rows,
                running=running,
                waiting=scheduler.num_waiting,
                pages=self.sizes.pages,
                pages_free=scheduler.pages.num_free,
                pages_prefix=len(scheduler.tree),
                snapshots=scheduler.snapshots.num_held,
                kv_bytes=held * self._device.page_bytes + rings * self._device.ring_bytes,
                full_kv_bytes=held * self.sizes.page_size * self._device.full_bytes,
                finished=dict(self._finished),
                reply_tokens=self._reply_tokens,
                **vars(counts),
            )

    def _serve(self) -> None:
        """The engine's thread."""
        message = CLOSING
        try:
            while self._turn():
                pass
        except Exception as error:
            message = f"the device failed ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200})"
            self._failure = message
            LOG.error("%s: the server answers no more requests; start it again", message)
        events: list[tuple[Listener, Event]] = []
        with self._change:
            for run in list(self._runs):
                self._end(run, "error", events, message)
            self._scheduler.end()
        _tell(events)

    def _turn(self) -> bool:
        """Carry out what comes next, and tell who waits for it; False once the engine must stop."""
        events: list[tuple[Listener, Event]] = []
        with self._change:
            self._change.wait_for(lambda: self._must_stop or self._cancelled or not self._scheduler.is_idle)
            if self._must_stop:
                return False
            cancelled, self._cancelled = self._cancelled, []
            for run in cancelled:
                if run in self._runs:
                    self._scheduler.finish(run.job)
                    self._end(run, "cancelled", events)
            actions = self._scheduler.next()
        _tell(events)
        if error := self._carry_out(actions):
            self._restart(error)
        return True

    def _carry_out(self, actions: list[Action]) -> str:
        """Let the device work; why it could not, where memory ran out."""
        try:
            for action in actions:
                if isinstance(action, Kept):
                    self._keep(action)
                else:
                    for chosen in self._device.do(action):
                        self._take(chosen)
        except (RuntimeError, MemoryError) as error:
            message = str(error).partition("\n")[0]
            if isinstance(error, RuntimeError) and not any(words in message for words in OUT_OF_MEMORY):
                raise
            return f"memory ran out ({message:.200})"
        return ""

    def _restart(self, error: str) -> None:
        """Go on after memory ran out: programs take their rows, and a program that fails gives nothing back."""
        events: list[tuple[Listener, Event]] = []
        with self._change:
            for job in self._scheduler.restart():
                if job.owner is not None:
                    self._end(job.owner, "error", events, error)
                else:
                    LOG.warning("%s: a prefix of %d tokens is not kept any more", error, job.prompt)
        LOG.warning("%s: %d requests failed, all others are computed again", error, len(events))
        _tell(events)
        self._device.reset()

    def _keep(self, action: Kept) -> None:
        """End the job of a permanent prefix, for which nobody waits if it is computed again."""
        events: list[tuple[Listener, Event]] = []
        reason: Reason = "stop" if action.is_kept else "error"
        if action.job.owner is not None:
            with self._change:
                why = "" if action.is_kept else too_many_prefixes(self.sizes.snapshots)
                self._end(action.job.owner, reason, events, why)
        _tell(events)

    def _take(self, chosen: Chosen) -> None:
        """Add a token to a reply, and end it if that is its last."""
        run: Running = chosen.job.owner
        events: list[tuple[Listener, Event]] = []
        if not chosen.is_finite:
            with self._change:
                self._scheduler.fail(run.job)
                self._end(run, "error", events, str(not_finite("the logits are", self._device.dtype)))
        elif self._scheduler.chosen(run.job, chosen.token):
            text = run.row.add(chosen.token, chosen.logprob)
            top = chosen.top[: run.request.top]
            events.append((run.listener, TokenEvent(run.number, chosen.token, chosen.logprob, top, text)))
            is_end = run.row.stopped or chosen.token in run.ends.ids
            with self._change:
                self._reply_tokens += 1
                if is_end or run.usage.completion == run.job.most:
                    self._scheduler.finish(run.job)
                    self._end(run, "stop" if is_end else "length", events)
        _tell(events)

    def _end(self, run: Running, reason: Reason, events: list[tuple[Listener, Event]], error: str = "") -> None:
        """A reply has left the scheduler."""
        del self._runs[run]
        self._finished[reason] += 1
        events.append((run.listener, FinishEvent(run.number, reason, run.row.rest(), run.usage, error)))
        self._change.notify_all()  # `close` waits for the last.


def too_many_prefixes(snapshots: int) -> str:
    """Why a prefix is not kept: each has a copy of its rings."""
    return f"there is memory to keep {snapshots} prefixes: keep fewer, or give more"


def _tell(events: list[tuple[Listener, Event]]) -> None:
    for listener, event in events:
        listener(event)
