"""Device programs of the server: what a row computes depends on its text, seed and settings, and on nothing else."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import Greedy, generate, make_mesh
from duo_jax.cache.spec import CacheSpec
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.generation.token_loop import row_keys
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.place import place_model
from duo_jax.serve import choice as choice_of_rows
from duo_jax.serve import programs as device
from duo_jax.serve.choice import Drawn, Sampling, choose
from duo_jax.serve.programs import Programs, with_pages
from tests.shapes import TINY

ROWS, PAGE, CHUNK, NEW = 4, 8, 16, 8
PROGRAMS = Programs(CHUNK, top=3, group=2)
PROMPT = np.random.default_rng(0).integers(0, 61, 43)
OTHER = np.random.default_rng(1).integers(0, 61, 29)
SAMPLED = SamplingSettings(0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


class Server:
    """Rows, their page table, and an allocator that hands out pages in no particular order."""

    def __init__(self, model, pattern, num_pages=32):
        spec = CacheSpec(TINY, pattern, ROWS, 80, TINY.precision(), model.mesh, page_size=PAGE, num_pages=num_pages)
        self.model, self.rows = model, PROGRAMS.rows(model, spec)
        self.table = np.full((ROWS, spec.max_length // PAGE), -1)
        self.free = np.random.default_rng(2).permutation(num_pages).tolist()

    def give(self, row, tokens):
        """Pages for so many tokens of a row."""
        for index in range(-(-tokens // PAGE)):
            if self.table[row, index] < 0:
                self.table[row, index] = self.free.pop()
        self.rows = with_pages(self.rows, self.table)

    def prompt(self, row, tokens, begin=0):
        """Compute the rest of a prompt, in chunks that are cut at fixed positions."""
        self.give(row, len(tokens) + NEW)
        for at in range(begin, len(tokens), CHUNK):
            self.rows = PROGRAMS.prefill(self.model, self.rows, row, tokens[at : at + CHUNK])

    def admit(self, row, tokens, settings=SAMPLED, seed=3, **options):
        seen = np.isin(np.arange(61), tokens)
        self.rows = PROGRAMS.admit(self.rows, row, seed=seed, sampling=Sampling.of(settings), seen=seen, **options)

    def first(self, row):
        self.rows, choice = PROGRAMS.first(self.model, self.rows, row)
        return [x[0] for x in jax.device_get(choice)]

    def step(self, *rows, forced=None):
        active = np.isin(np.arange(ROWS), rows)
        self.rows, choice = PROGRAMS.step(self.model, self.rows, active, forced)
        return jax.device_get(choice)

    def reply(self, row, count=NEW, others=()):
        """The choices of a row, as lists: the first token, and those of some steps."""
        first = self.first(row)
        steps = [[x[row] for x in self.step(row, *others)] for _ in range(count - 1)]
        return [[np.asarray(x).tolist() for x in choice] for choice in (first, *steps)]

    def ask(self, row, tokens, others=(), **options):
        self.admit(row, tokens, **options)
        self.prompt(row, tokens)
        return self.reply(row, others=others)


@pytest.fixture
def server(tiny, half):
    return Server(tiny, half)


@pytest.fixture(scope="module")
def alone(tiny, half):
    return Server(tiny, half).ask(0, PROMPT)


def columns(reply):
    return [choice[0] for choice in reply], [choice[1] for choice in reply]


def test_a_row_computes_the_same_bits_in_any_place_among_any_neighbours(server, alone):
    for row, (tokens, settings) in enumerate([(OTHER, SAMPLED), (OTHER[:5], SamplingSettings())]):
        server.admit(row, tokens, settings, seed=row)
        server.prompt(row, tokens)
        server.first(row)
        server.step(*range(row + 1))
    server.admit(3, PROMPT)
    server.give(3, len(PROMPT) + NEW)
    for at in range(0, len(PROMPT), CHUNK):  # Neighbours decode between its chunks.
        server.rows = PROGRAMS.prefill(server.model, server.rows, 3, PROMPT[at : at + CHUNK])
        server.step(0, 1)
    first = server.first(3)
    rest = []
    for neighbours in [(0,), (1,), (), (0,), (), (1,), (0, 1)]:
        rest.append([x[3] for x in server.step(3, *neighbours)])
    assert [[np.asarray(x).tolist() for x in choice] for choice in (first, *rest)] == alone


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        pytest.param(SamplingSettings(), Greedy(), marks=pytest.mark.full_matrix),
        (SAMPLED, SAMPLED.sampler()),
    ],
    ids=["greedy", "sampled"],
)
def test_a_reply_is_that_of_generate(tiny, half, server, settings, sampler):
    tokens, logprobs = columns(server.ask(1, PROMPT, settings=settings))
    out = generate(tiny, PROMPT[None], pattern=half, max_new_tokens=NEW, sampler=sampler, key=3, chunk_size=CHUNK)
    assert tokens == out.tokens[0].tolist()
    np.testing.assert_allclose(logprobs, out.logprobs[0], rtol=0, atol=1e-5)


def test_a_reused_prefix_gives_the_bits_of_a_cold_run(server, alone):
    server.admit(0, PROMPT)
    server.prompt(0, PROMPT[: 2 * CHUNK])
    snapshot = PROGRAMS.snapshot(server.rows, 0)
    # The first row continues with another text, in pages of its own.
    server.prompt(0, np.append(PROMPT[: 2 * CHUNK], OTHER), begin=2 * CHUNK)
    server.table[2, : 2 * CHUNK // PAGE] = server.table[0, : 2 * CHUNK // PAGE]
    server.admit(2, PROMPT)
    server.rows = PROGRAMS.restore(server.rows, 2, snapshot)
    server.prompt(2, PROMPT, begin=2 * CHUNK)
    assert server.reply(2) == alone
    # A whole prompt, without a chunk to compute.
    assert snapshot.nbytes == PROGRAMS.snapshot(server.rows, 2).nbytes


@pytest.mark.full_matrix
def test_samples_of_one_prompt_share_pages(tiny, half, server, alone):
    """Copy on write of the last page; the draws are those of the rows of `generate`."""
    server.admit(0, PROMPT)
    server.prompt(0, PROMPT)
    server.table[0, -(-len(PROMPT) // PAGE) :] = -1
    last = len(PROMPT) // PAGE
    snapshot = PROGRAMS.snapshot(server.rows, 0)
    for row in (1, 2):
        server.admit(row, PROMPT, index=row)
        server.table[row, : last + 1] = server.table[0, : last + 1]
        server.table[row, last] = server.free.pop()
        server.rows = PROGRAMS.copy_page(server.rows, int(server.table[0, last]), int(server.table[row, last]))
        server.rows = PROGRAMS.restore(server.rows, row, snapshot)
    for row in range(3):
        server.give(row, len(PROMPT) + NEW)
    firsts = [server.first(row)[0] for row in range(3)]
    tokens = np.stack([firsts, *(server.step(0, 1, 2).token[:3] for _ in range(NEW - 1))], axis=1)
    assert tokens[0].tolist() == columns(alone)[0]
    prompts, options = np.tile(PROMPT, (3, 1)), {"sampler": SAMPLED.sampler(), "key": 3, "chunk_size": CHUNK}
    np.testing.assert_array_equal(tokens, generate(tiny, prompts, pattern=half, max_new_tokens=NEW, **options).tokens)


def test_a_reply_that_is_computed_again_passes_through_the_same_bits(server, alone):
    """After a preemption: the tokens so far are forced, the rest is chosen."""
    server.admit(1, PROMPT)
    server.prompt(1, PROMPT)
    tokens, logprobs = columns(alone)
    server.rows, choice = PROGRAMS.first(server.model, server.rows, 1, tokens[0])
    again = [choice.logprob.tolist()[0]]
    for token in tokens[1:4]:
        again.append(float(server.step(1, forced=np.array([-1, token, -1, -1], np.int32)).logprob[1]))
    assert again == logprobs[:4]
    assert [int(server.step(1).token[1]) for _ in range(4)] == tokens[4:]


def test_a_freed_row_leaves_nothing_behind(server, alone):
    """Its pages hold NaN, in tokens that the next row has not written yet."""
    server.admit(0, OTHER)
    server.prompt(0, OTHER)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (server.rows.cache.full, server.rows.cache.rings))
    server.rows = replace(server.rows, cache=replace(server.rows.cache, full=nan[0], rings=nan[1]))
    server.table[:] = -1
    server.free = list(range(32))
    assert server.ask(0, PROMPT) == alone


def test_nan_ends_its_own_row_only(server, alone):
    server.admit(0, PROMPT)
    server.prompt(0, PROMPT)
    server.admit(1, OTHER)
    server.prompt(1, OTHER)
    assert server.first(1)[-1]
    rings = jax.tree.map(lambda x: x.at[:, 1].set(jnp.nan), server.rows.cache.rings)
    server.rows = replace(server.rows, cache=replace(server.rows.cache, rings=rings))
    first, steps = server.first(0), [server.step(0, 1) for _ in range(NEW - 1)]
    assert [step.is_finite.tolist() for step in steps] == [[True, False, True, True]] * (NEW - 1)
    assert [first[0], *(step.token[0] for step in steps)] == columns(alone)[0]


def test_a_token_without_a_page_is_written_nowhere_and_ends_the_row(server, alone):
    server.admit(0, PROMPT)
    server.prompt(0, PROMPT)
    server.admit(1, OTHER)
    server.table[1, :3] = [server.free.pop() for _ in range(3)]
    server.rows = with_pages(server.rows, server.table)
    for at in (0, CHUNK):
        server.rows = PROGRAMS.prefill(server.model, server.rows, 1, OTHER[at : at + CHUNK])
    assert not server.first(1)[-1]
    assert server.reply(0, others=(1,)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MeshSize(tensor=2)], ids=["one_device", "mesh"])
def test_the_programs_are_compiled_before_the_first_request(tiny, half, caplog, fresh_programs, mesh):
    """On a mesh too, where rows must come out of each program as they go into the next one."""
    model = tiny if mesh is None else place_model(tiny, make_mesh(tensor=2), half)
    server = Server(model, half, num_pages=27)  # A pool of a size that no other test has.
    assert list(PROGRAMS.compile(model, server.rows)) == [
        *("admit", "prefill", "first", "step", "snapshot", "restore", "copy_page")
    ]
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        server.ask(0, PROMPT, seed=9)
        server.rows = PROGRAMS.restore(server.rows, 1, PROGRAMS.snapshot(server.rows, 0))
        server.rows = PROGRAMS.copy_page(server.rows, 1, 2)
        server.ask(1, OTHER)
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "XLA compilation of" in message]


@pytest.mark.slow
def test_no_program_copies_the_pool(tiny, half, fresh_programs):
    spec = CacheSpec(TINY, half, ROWS, 8192, TINY.precision(), page_size=128, num_pages=512)
    rows = PROGRAMS.rows(tiny, spec)
    pool, ring = rows.cache.full.k.nbytes, rows.cache.rings[0].k.nbytes
    row, token = np.int32(0), np.full(ROWS, -1, np.int32)
    lowered = {
        "prefill": device._prefill.lower(PROGRAMS, tiny, rows, row, np.zeros(CHUNK, np.int32), row),
        "step": device._step.lower(PROGRAMS, tiny, rows, np.ones(ROWS, bool), token),
        "restore": device._restore.lower(rows, row, PROGRAMS.snapshot(rows, 0)),
        "copy_page": device._copy_page.lower(rows, row, row),
    }
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(rows.cache))
    for name, program in lowered.items():
        memory = program.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= held, name
        assert memory.temp_size_in_bytes < pool / 4 + 4 * ring, name


@pytest.mark.mesh
def test_devices_that_share_the_heads_give_the_reply_of_one(tiny, half, alone):
    server = Server(place_model(tiny, make_mesh(tensor=2), half), half)
    tokens, logprobs = columns(server.ask(1, PROMPT))
    assert tokens == columns(alone)[0]
    np.testing.assert_allclose(logprobs, columns(alone)[1], rtol=0, atol=1e-5)
    snapshot = PROGRAMS.snapshot(server.rows, 1)
    server.rows = PROGRAMS.restore(server.rows, 2, snapshot)
    server.rows = PROGRAMS.copy_page(server.rows, int(server.table[1, 0]), server.free[0])
    again = server.ask(3, PROMPT)
    assert columns(again) == (tokens, logprobs)


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(repetition_penalty=1.4),
    SamplingSettings(0.7),
    SamplingSettings(1.3, top_k=5),
    SamplingSettings(0.9, top_p=0.6),
    SamplingSettings(1.1, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    SamplingSettings(1.0, min_p=0.3),
    SamplingSettings(1.0, top_k=1000, top_p=1.0),
]


@pytest.mark.parametrize("first", [8, pytest.param(256, marks=pytest.mark.full_matrix)])
def test_every_row_chooses_as_a_sampler_with_its_settings_does(first, monkeypatch):
    """Also where the most likely tokens are not enough to know which are kept, and where some are equally likely."""
    monkeypatch.setattr(choice_of_rows, "FIRST", first)
    rng, count = np.random.default_rng(0), len(SETTINGS)
    sampling = Sampling(*(np.concatenate(x) for x in zip(*map(Sampling.of, SETTINGS), strict=True)))
    call = jax.jit(lambda *args: choose(*args, 4))
    for seed in range(16):
        logits = rng.normal(size=(count, 61)) * 3
        logits = jnp.asarray(logits.round() if seed % 4 == 3 else logits, jnp.float32)
        seen, keys = jnp.asarray(rng.random((count, 61)) < 0.3), row_keys(seed, np.arange(count))
        drawn = Drawn(keys, seen, jnp.zeros((count, 61), jnp.int32))
        choice, new = call(logits, sampling, drawn, jnp.ones(count, bool), jnp.full(count, -1, jnp.int32))
        split = jax.vmap(jax.random.split)(keys)
        for row, settings in enumerate(SETTINGS):
            expected = settings.sampler()(logits[row : row + 1], seen[row : row + 1], split[row : row + 1, 0])[0]
            assert choice.token[row] == expected, settings
        np.testing.assert_array_equal(jax.random.key_data(new.keys), jax.random.key_data(split[:, 1]))
        logprobs = jax.nn.log_softmax(logits)
        np.testing.assert_array_equal(choice.top, jnp.argsort(-logprobs, axis=-1, stable=True)[:, :4])
        np.testing.assert_array_equal(choice.logprob, logprobs[np.arange(count), choice.token])


def test_penalties_count_what_was_generated():
    """OpenAI's: the logit falls by `presence` for a token that occurred, and by `frequency` each time it did."""
    logits = jnp.asarray([[3.0, 2.5, 2.0, 0.0]])
    drawn = Drawn(row_keys(0, np.array([0])), jnp.zeros((1, 4), bool), jnp.zeros((1, 4), jnp.int32))
    one, own = jnp.ones(1, bool), jnp.full(1, -1, jnp.int32)
    chosen, call = [], jax.jit(choose, static_argnums=5)
    sampling = Sampling.of(presence=0.25, frequency=0.5)
    for _ in range(6):
        choice, drawn = call(logits, sampling, drawn, one, own, 1)
        chosen.append(int(choice.token[0]))
    counts, expected = np.zeros(4), []
    for _ in range(6):
        best = int(np.argmax(np.asarray(logits[0]) - 0.25 * (counts > 0) - 0.5 * counts))
        counts[best] += 1
        expected.append(best)
    assert chosen == expected and len(set(chosen)) > 1
    assert drawn.counts[0].tolist() == counts.tolist()


def test_what_pages_cannot_be_is_refused(tiny, half, server):
    with pytest.raises(ValueError, match="a server's cache has pages"):
        PROGRAMS.rows(tiny, CacheSpec(TINY, half, 1, 32, TINY.precision()))
    for table, words in (([[0]], r"\[4, 10\], got \[1, 1\]"), (np.full((4, 10), 32), "below 32, .* got 32 to 32")):
        with pytest.raises(ValueError, match=words):
            with_pages(server.rows, table)
    with pytest.raises(ValueError, match="presence_penalty must be"):
        Sampling.of(presence=3.0)


def test_pages_fill_the_memory_that_there_is(half):
    spec = CacheSpec(TINY, half, ROWS, 800, TINY.precision(), page_size=PAGE, num_pages=1)
    for count in (1, 7, 300):
        least = replace(spec, num_pages=count).nbytes
        assert (spec.fit_pages(least - 1), spec.fit_pages(least)) == (count - 1, count)
    assert spec.fit_pages(10**12) == ROWS * 100
