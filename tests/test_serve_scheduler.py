"""The scheduler, the allocator of pages and the prefix tree: random events against plain models of them."""

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duo_jax.serve.jobs import Admit, Assign, Copy, Fill, Job, Kept, Save, Step
from duo_jax.serve.pages import Pool
from duo_jax.serve.prefix import PrefixTree
from duo_jax.serve.requests import Request
from duo_jax.serve.scheduler import QueueFullError, Scheduler, Sizes
from tests.serve_device import HistoryDevice, reply_of

SIZES = Sizes(rows=2, pages=12, page_size=2, chunk_size=4, row_pages=12, snapshots=6, snapshot_every=8)


class Server:
    """A scheduler with its device, and the replies so far."""

    def __init__(self, sizes: Sizes = SIZES) -> None:
        self.sizes, self.scheduler = sizes, Scheduler(sizes)
        self.device = HistoryDevice(sizes)
        self.open: list[Job] = []
        self.done: list[Job] = []
        self.history: list[list[object]] = []

    def add(self, prompt: list[int], most: int, seed: int = 0, n: int = 1) -> list[Job]:
        request = Request(tuple(prompt), most, seed=seed, n=n)
        jobs = [
            Job(list(prompt), most, number < n - 1, SimpleNamespace(request=request, number=number))
            for number in range(n)
        ]
        self.scheduler.add(*jobs)
        self.open += jobs
        return jobs

    def advance(self) -> list[object]:
        actions = self.scheduler.next()
        self.history.append(actions)
        chosen = [each for action in actions if not isinstance(action, Kept) for each in self.device.do(action)]
        for job, token, *_ in chosen:
            if self.scheduler.chosen(job, token) and len(job.tokens) == job.prompt + job.most:
                self.finish(job)
        return actions

    def finish(self, job: Job) -> None:
        self.scheduler.finish(job)
        self.open.remove(job)
        self.done.append(job)

    def run(self) -> None:
        """Serve all jobs to their end."""
        for _ in range(100_000):
            if self.scheduler.is_idle:
                return
            assert self.advance(), "there is always something to do for an open job"
        raise AssertionError("no end")

    def check_replies(self) -> None:
        for job in self.done:
            reply = job.tokens[job.prompt :]
            assert reply == reply_of(job.tokens[: job.prompt], job.owner.request.seed + job.owner.number, len(reply))

    def check_free(self) -> None:
        """Nothing is held but by the tree, and nothing at all once it is empty."""
        scheduler = self.scheduler
        assert scheduler.is_idle
        assert scheduler.pages.num_held == len(scheduler.tree)
        scheduler.tree.clear()
        assert scheduler.pages.num_held == scheduler.tree.num_pinned
        assert scheduler.snapshots.num_held == sum(node.snapshot is not None for node in scheduler.tree.nodes())


def run_kept(server: Server, job: Job) -> bool:
    """Serve until a permanent prefix is computed, and return whether it is kept."""
    server.scheduler.add(job)
    server.run()
    (end,) = (each for actions in server.history for each in actions if isinstance(each, Kept) and each.job is job)
    return end.is_kept


def fills(actions: list[list[object]]) -> list[int]:
    """Tokens of each chunk."""
    return [len(action.tokens) for step in actions for action in step if isinstance(action, Fill)]


def test_pages_are_free_once_their_last_holder_leaves():
    pool = Pool(2)
    first, second = pool.take(), pool.take()
    assert {first, second} == {0, 1} and pool.num_free == 0
    with pytest.raises(RuntimeError, match="all 2 entries are held"):
        pool.take()
    pool.hold([first])
    assert pool.is_shared(first)
    pool.release([first, second])
    assert pool.take() == second and not pool.is_shared(first)
    pool.release([first])
    with pytest.raises(RuntimeError, match=f"entry {first} is free already"):
        pool.release([first])
    with pytest.raises(RuntimeError, match="only held entries can be shared"):
        pool.hold([first])


@pytest.mark.parametrize(("snapshots", "second"), [(20, 8), (3, 4)])
def test_a_prefix_is_computed_once_and_prompts_part_at_a_chunk(snapshots, second):
    sizes = replace(SIZES, pages=40, row_pages=20, snapshots=snapshots, snapshot_every=100)
    server = Server(sizes)
    shared = [1, 2, 3, 4, 5, 6, 7, 8]
    for number, known in enumerate([0, second, 8, 8]):
        (job,) = server.add(shared + [10 + number] * 6, 3)
        server.run()
        assert job.cached == known, "with few snapshots, the second prompt shows where prompts part"
    server.check_replies()
    server.check_free()


def test_a_conversation_of_ten_turns_computes_each_page_once():
    sizes = replace(SIZES, pages=200, row_pages=100, snapshots=40)
    server = Server(sizes)
    text = [1, 2, 3]
    for turn in range(10):
        text += [20 + turn] * 5
        before = server.device.filled
        (job,) = server.add(text, 4)
        server.run()
        # What the turn adds, and at most a chunk that was not full.
        assert server.device.filled - before <= 5 + 1 + sizes.chunk_size
        text = list(job.tokens)
    server.check_replies()
    # A template that leaves the first reply out: the prefix up to there is still known.
    (job,) = server.add([*text[:8], 60, 61, *text[12:]], 1)
    server.run()
    assert job.cached == 8


def test_replies_to_one_prompt_share_its_pages_and_compute_it_once():
    server = Server(replace(SIZES, rows=3, pages=40))
    jobs = server.add([1, 2, 3, 4, 5], 6, n=3)
    server.run()
    assert server.device.filled == 5 and [job.cached for job in jobs] == [0, 5, 5]
    copies = sum(isinstance(action, Copy) for step in server.history for action in step)
    assert copies == 3, "each writes to its own copy of the last page"
    assert len({tuple(job.tokens) for job in jobs}) == 3
    server.check_replies()
    server.check_free()


def test_snapshots_in_the_middle_of_a_text_go_first():
    pages, snapshots = Pool(9), Pool(3)
    tree = PrefixTree(pages, snapshots, page_size=1, chunk_size=1)
    first = [pages.take() for _ in range(3)]
    for length in (1, 2, 3):
        tree.insert([1, 2, 3][:length], first[:length], snapshots.take())
    other = [pages.take() for _ in range(2)]
    assert tree.evict_snapshot() and tree.match([1, 2, 9]).length == 1, "the second, which was used before the first"
    tree.insert([5, 6], other, snapshots.take())
    assert tree.evict_snapshot() and tree.match([1, 9]).length == 0
    assert (tree.match([1, 2, 3, 4]).length, tree.match([5, 6, 7]).length) == (3, 2), "the ends of both"
    assert tree.evict_snapshot() and tree.match([1, 2, 3, 4]).length == 0 and len(tree) == 2


def test_a_prompt_delays_replies_by_one_chunk_at_most():
    server = Server(replace(SIZES, pages=60, row_pages=30))
    server.add([1], 20)
    server.advance()
    server.add([2] * 30, 2)
    while len(server.open) == 2:
        server.advance()
    kinds = [type(action) for step in server.history for action in step if isinstance(action, Fill | Step)]
    prompt = kinds[1 : kinds.index(Step, len(kinds) - 1 - kinds[::-1].index(Fill))]
    assert prompt.count(Fill) == 8
    assert all({Fill, Step} == {first, second} for first, second in itertools.pairwise(prompt))


def test_the_newest_is_preempted_when_pages_run_out_and_ends_with_the_same_reply():
    server = Server(replace(SIZES, rows=3, pages=12, snapshots=0))
    jobs = [server.add([number + 1] * 3, 14)[0] for number in range(3)]
    server.run()
    assert [job.preempted > 0 for job in jobs] == [False, False, True] or jobs[1].preempted
    assert jobs[0].preempted == 0 and server.done[0] is jobs[0]
    server.check_replies()
    server.check_free()


def test_what_never_fits_is_refused_before_it_waits():
    server = Server(replace(SIZES, pages=5, queue=1, rows=1))
    with pytest.raises(ValueError, match="a prompt of 9 tokens and 3 of reply do not fit: a request has room for 10"):
        server.add([1] * 9, 3)
    server.add([1] * 9, 2)
    server.add([1], 1)
    with pytest.raises(QueueFullError, match="2 requests are waiting: try again later"):
        server.add([1], 1)
    server.run()
    server.check_replies()


def test_permanent_prefixes_stay_and_leave_less_room():
    server = Server(replace(SIZES, pages=8))
    server.scheduler.add(Job([1] * 10, 0))
    server.run()
    assert server.scheduler.tree.num_pinned == 4
    assert server.scheduler.room([2]) == 8 and server.scheduler.room([1] * 10) == 7
    for number in range(2, 6):
        server.add([number] * 6, 2)
    (job,) = server.add([1] * 9 + [2], 2)
    server.run()
    assert job.cached == 8
    server.check_replies()
    server.check_free()


def test_a_long_permanent_prefix_gives_up_the_copies_within_it():
    """It is continued at its end, and so is one that is its beginning."""
    server, long = Server(replace(SIZES, pages=30, snapshots=3, snapshot_every=4)), list(range(1, 21))
    kept = [run_kept(server, Job(tokens, 0)) for tokens in (long[:8], long, [9] * 5, [8] * 4)]
    assert kept == [True, True, True, False], "one copy for each"
    for prompt, cached in (([*long, 0], 20), ([*long[:9], 0], 8), ([*long[:13], 0], 8), ([9] * 6, 4), ([8] * 5, 0)):
        (job,) = server.add(prompt, 2)
        server.run()
        assert job.cached == cached
    server.check_replies()
    server.check_free()


def test_a_prefix_is_permanent_also_if_it_is_known_already():
    server = Server(replace(SIZES, pages=8, snapshots=2))
    server.add([1] * 9, 2)
    server.run()
    assert run_kept(server, Job([1] * 8, 0)) and run_kept(server, Job([1] * 8, 0))
    assert server.scheduler.tree.num_pinned == 4


@pytest.mark.parametrize("length", [7, 8, 10, 11])
def test_a_loaded_prefix_is_continued_at_its_end_by_the_prompts_that_begin_with_it(length):
    server, text = Server(replace(SIZES, pages=16)), [3] * 11
    server.scheduler.add(Job(text[:length], 0, saved=text))
    server.run()
    pages = -(-length // 2)
    assert server.scheduler.tree.num_pinned == pages and not server.device.filled
    # One that only begins like it, or ends with it, is computed: it never meets keys of both kinds.
    cases = [([3] * 6, 0), (text[:length], 4), ([*text, 4], length), ([*text, 5, 6, 7, 8, 9], max(length, 8))]
    for prompt, cached in cases:
        (job,) = server.add(prompt, 3)
        server.run()
        assert job.cached == cached
    (again,) = server.add([*text, 5, 6, 7, 8, 9, 4], 3)
    server.run()
    assert again.cached == 16, "what continues it is reused, in whole chunks"
    assert server.scheduler.room([*text, 4]) == 2 * min(12, 16 - pages + length // 2) - 11
    server.check_replies()
    server.check_free()


def test_a_permanent_prefix_that_continues_a_loaded_one_leaves_its_pages_to_prompts():
    server, text = Server(), [3] * 8
    prefix = [*text, *[4] * 9]
    server.scheduler.add(Job(text[:7], 0, saved=text))
    server.run()
    server.scheduler.add(Job(prefix, 0))
    server.run()
    # Of the four loaded pages, the prefix shares the three that are full.
    assert server.scheduler.tree.num_pinned == 4 + 5
    assert server.scheduler.room([*prefix, 5]) == 2 * (12 - 9 + 8) - 17
    (job,) = server.add([*prefix, 5], 5)
    server.run()
    assert job.cached == 16
    server.check_replies()
    server.check_free()


def test_requests_leave_room_for_a_permanent_prefix_that_is_computed_again():
    server = Server(replace(SIZES, pages=6))
    assert run_kept(server, Job([1] * 4, 0))
    (job,) = server.add([2], 1)
    server.scheduler.next()
    assert server.scheduler.restart() == [job]
    server.device.reset()
    server.open.remove(job)
    for _ in range(2):
        with pytest.raises(ValueError, match="has room for 8 tokens"):
            server.add([2] * 9, 1)
        server.add([2] * 8, 1)
        server.run()
    assert server.scheduler.tree.num_pinned == 2
    server.check_replies()
    server.check_free()


def test_a_permanent_prefix_leaves_room_for_requests_that_were_accepted():
    server = Server()
    server.add([2] * 20, 2)
    with pytest.raises(ValueError, match="a prefix of 4 tokens does not fit beside a request that was accepted"):
        server.scheduler.add(Job([1] * 4, 0))
    server.run()
    assert run_kept(server, Job([1] * 4, 0))
    server.check_replies()
    server.check_free()


def test_chunks_are_whole_pages():
    with pytest.raises(ValueError, match="a chunk is whole pages, got 6 tokens for pages of 4: use a multiple"):
        Sizes(rows=1, pages=1, page_size=4, chunk_size=6, row_pages=1, snapshots=0)


TOKENS = st.integers(0, 1)


class Events(RuleBasedStateMachine):
    """Random arrivals, cancellations and failures, in between the actions of a server with few pages."""

    @initialize(
        rows=st.integers(1, 3),
        pages=st.integers(4, 14),
        chunk=st.sampled_from([2, 4]),
        snapshots=st.integers(0, 5),
        reuse=st.booleans(),
        pin=st.lists(TOKENS, min_size=4, max_size=5) | st.none(),
        is_loaded=st.booleans(),
    )
    def start(
        self, rows: int, pages: int, chunk: int, snapshots: int, reuse: bool, pin: list[int] | None, is_loaded: bool
    ) -> None:
        sizes = Sizes(
            rows=rows, pages=pages, page_size=2, chunk_size=chunk, row_pages=10, snapshots=snapshots,
            snapshot_every=6, queue=6, reuse_replies=reuse,
        )  # fmt: skip
        self.server = Server(sizes)
        self.prompts = [[]]
        if pin is not None and pages >= 6:
            self.prompts.append(pin)
            self.server.scheduler.add(Job(list(pin), 0, saved=pin if is_loaded else None))
            self.server.run()
            kept = len(pin) if is_loaded else len(pin) // chunk * chunk
            assert not snapshots or self.server.scheduler.tree.num_pinned == -(-kept // 2)

    @rule(data=st.data(), new=st.lists(TOKENS, min_size=1, max_size=9), most=st.integers(1, 9), n=st.integers(1, 3))
    def arrive(self, data: st.DataObject, new: list[int], most: int, n: int) -> None:
        prompt = data.draw(st.sampled_from(self.prompts)) + new
        try:
            jobs = self.server.add(prompt, most, seed=len(self.prompts), n=n)
        except QueueFullError:
            assert self.server.scheduler.num_waiting + n > 6
        except ValueError:
            scheduler = self.server.scheduler
            pinned = scheduler.tree.num_pinned
            for job in (*scheduler._waiting, *scheduler.running):
                if not job.most:  # A permanent prefix that is computed again, in whole chunks.
                    pinned += job.prompt // self.server.sizes.chunk_size * self.server.sizes.chunk_size // 2
            assert len(prompt) + most - 1 > 2 * min(10, self.server.sizes.pages - pinned)
        else:
            assert len(jobs) == n
            self.prompts.append(prompt)

    @rule(count=st.integers(1, 12))
    def advance(self, count: int) -> None:
        for _ in range(count):
            oldest = min(self.server.open, key=lambda job: job.number, default=None)
            preempted = oldest and oldest.preempted
            is_idle = self.server.scheduler.is_idle
            assert bool(self.server.advance()) != is_idle, "there is something to do while there is a job"
            assert oldest is None or oldest.preempted == preempted, "the oldest job is never preempted"

    @precondition(lambda self: self.server.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.server.finish(data.draw(st.sampled_from(self.server.open)))

    @precondition(lambda self: any(job.row is not None for job in self.server.open))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """The numbers of a row are not finite."""
        job = data.draw(st.sampled_from([job for job in self.server.open if job.row is not None]))
        known = job.tokens[: job.length]
        self.server.scheduler.fail(job)
        self.server.open.remove(job)
        deepest = self.server.scheduler.tree._path(known, job.under)
        assert not deepest or deepest[-1].children or deepest[-1].is_pinned

    @precondition(lambda self: self.server.open)
    @rule(count=st.integers(0, 3))
    def lose(self, count: int) -> None:
        """The device fails after it has carried out some of the next actions."""
        actions = self.server.scheduler.next()
        for action in [each for each in actions if isinstance(each, Admit | Fill | Assign | Copy | Save)][:count]:
            self.server.device.do(action)
        others = set(self.server.open) - set(failed := self.server.scheduler.restart())
        assert failed and others <= set(self.server.scheduler._waiting)
        self.server.open = [job for job in self.server.open if job in others]
        self.server.device.reset()

    @precondition(lambda self: self.server.done)
    @rule(data=st.data())
    def continue_conversation(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.server.done))
        self.prompts.append(job.tokens[:12])

    @invariant()
    def holders_are_counted(self) -> None:
        if not hasattr(self, "server"):
            return
        scheduler = self.server.scheduler
        nodes = list(scheduler.tree.nodes())
        held = Counter(page for job in scheduler.running for page in job.pages)
        held.update(node.page for node in nodes)
        assert all(scheduler.pages.holders(page) == held[page] for page in range(scheduler.pages.size))
        assert scheduler.pages.num_held == len(held)
        entries = [node.snapshot for node in nodes if node.snapshot is not None]
        entries += [job.snapshot[1] for job in scheduler.running if job.snapshot]
        assert len(set(entries)) == len(entries) == scheduler.snapshots.num_held
        assert all(node.children or node.snapshot is not None for node in nodes), "every leaf can be continued"
        for job in scheduler.running:
            self.server.device.check_pages(job.pages, job.tokens[: job.length])
        for node in nodes:
            tokens, pages = [], []
            while node.parent is not None:
                tokens, pages, node = [*node.key, *tokens], [node.page, *pages], node.parent
            self.server.device.check_pages(pages, tokens)
        assert [job.number for job in scheduler._waiting] == sorted(job.number for job in scheduler._waiting)

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.run()
            self.server.check_replies()
            self.server.check_free()


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=6, stateful_step_count=25)


@pytest.mark.slow
class TestMoreEvents(Events.TestCase):
    settings = settings(max_examples=500, stateful_step_count=60)
