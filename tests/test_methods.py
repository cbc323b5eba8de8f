"""The methods under comparison: each rule of eviction against a dense statement of it, and what all methods share."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from duo_eval.methods import eviction, expected_attention, fastgen, kvzip, profile, quest, ragged, scored, snapkv
from duo_eval.methods.fastgen import EVERYTHING, FREQUENT, LOCAL, PUNCTUATION
from duo_eval.methods.registry import METHODS, greedy, method

from duo_jax import Model, load_tokenizer
from duo_jax.generation import infer
from duo_jax.generation.chunks import bucket, chunk_width
from tests import dense_rules
from tests.dense_rules import blocks, dense, heaviest
from tests.shapes import TINY

# Half the budget for a prompt takes as many slots as all of it for a short one: both run the same programs.
LENGTH, SHORT, NEW, BLOCK, BUDGET = 120, 50, 7, 16, 0.5
TOKENS = np.random.default_rng(5).integers(3, 61, LENGTH + NEW).astype(np.int32)
RULES = {
    "streamingllm": dense_rules.streamingllm,
    "h2o": dense_rules.h2o,
    "tova": dense_rules.tova,
    "snapkv": dense_rules.snapkv,
}
# Token ids that stand for special tokens and punctuation.
KINDS = {"special": (7,), "punctuation": tuple(range(20, 26))}
OPTIONS = {
    "random-heads": {"sink_size": 4, "recent_size": 8},
    "duo": {"sink_size": 4, "recent_size": 8},
    "streamingllm": {"block": BLOCK},
    "h2o": {"block": BLOCK},
    "tova": {"block": BLOCK},
    "snapkv": {"window": 8},
    "fastgen": KINDS,
    "duo+quest": {"sink_size": 4, "recent_size": 8, "page": 4, "tokens": 64, "dense_layers": 0},
    "kvzip-tokens": {"before": (1, 5), "request": (7, 8, 9), "next_request": (7, 8), "after": (3,), "chunk": 48},
}
# Methods with a `KVCache`, and those that see all keys of the prompt before they choose.
POOLED = ("duo", "duo+quest", "random-heads")
WHOLE = ("fastgen", "expected-attention", "kvzip-tokens")


def make(name, folder):
    """A method with small sizes; `folder` has a pattern."""
    return method(f"{name}={folder}" if name.startswith("duo") else name, **OPTIONS.get(name, {}))


@pytest.fixture(scope="module")
def pattern(half, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pattern")
    half.save(folder)
    return folder


def all_logits(model, tokens):
    """Full attention's logits at every position, densely; always of one length, for which small programs are there."""
    size = len(TOKENS)
    padded = np.append(tokens, TOKENS[len(tokens) :]).astype(np.int32)
    parts = blocks(size, size, size, lambda _: size)
    return dense(model, padded, parts, lambda _, every, *__: every)[0][: len(tokens)]


@pytest.fixture(scope="module")
def full_logits(tiny):
    """Full attention's logits at every position."""
    return all_logits(tiny, TOKENS[: SHORT + NEW])


def held(state):
    """Positions held, by layer and head."""
    return [[sorted(int(p) for p in head if p >= 0) for head in np.asarray(layer.position)] for layer in state.layers]


def check(model, rule, budget, expected, after_block, *, positions=held):
    """Prefill and decode give the expected logits, and hold what they should after the prompt and every step."""
    logits, state = rule.begin(model, TOKENS[:LENGTH], room=NEW, budget=budget)
    prompt_blocks = len(after_block[0]) - NEW
    for step in range(NEW + 1):
        assert positions(state) == [layer[prompt_blocks - 1 + step] for layer in after_block]
        np.testing.assert_allclose(logits, expected[LENGTH - 1 + step], rtol=0, atol=1e-4)
        if step < NEW:
            logits, state = rule.step(model, int(TOKENS[LENGTH + step]), state)


def test_every_rule_of_eviction_has_a_dense_statement():
    assert {name for name, kind in METHODS.items() if issubclass(kind, eviction.Eviction)} == set(RULES)


@pytest.mark.parametrize("name", [name for name in RULES if "block" in OPTIONS[name]])
def test_a_rule_holds_the_tokens_and_gives_the_logits_of_its_dense_statement(tiny, name):
    parts = blocks(LENGTH, LENGTH + NEW, BLOCK, lambda seen: int(BUDGET * seen))
    check(tiny, make(name, None), BUDGET, *dense(tiny, TOKENS, parts, RULES[name]))


def test_snapkv_holds_what_the_prompts_last_queries_chose_and_all_that_follows(tiny):
    parts = blocks(LENGTH, LENGTH + NEW, LENGTH, lambda _: int(BUDGET * LENGTH))
    check(tiny, make("snapkv", None), BUDGET, *dense(tiny, TOKENS, parts, RULES["snapkv"]))


def attention_paid(model):
    """Full attention of the prompt, the mean over a group: `[L K T T]`."""
    found = []

    def everything(part, candidates, weights, memory):
        found.append(weights.mean(1))
        return candidates

    dense(model, TOKENS, blocks(len(TOKENS), len(TOKENS), len(TOKENS), lambda _: len(TOKENS)), everything)
    return np.array(found)[:, :, :LENGTH, :LENGTH]


def policies_by_hand(weights, is_special, is_punctuation, budget):
    """For each head `[L K]` its policy, the positions held and its slots: every threshold tried, the highest first."""
    length = weights.shape[-1]
    count = int(0.3 * length)
    table = {}
    for layer, head in np.ndindex(*weights.shape[:2]):
        one = weights[layer, head]
        special = {p for p in range(length) if is_special[p]}
        pointed = special | {p for p in range(length) if is_punctuation[p]}
        frequent = pointed | set(heaviest(list(range(length)), one.sum(0), count))
        local = frequent | set(range(length - count, length))
        sees = [
            [[p in policy for p in range(length)] for _ in range(length)] for policy in (special, pointed, frequent)
        ]
        sees.append([[p in frequent or p > row - count for p in range(length)] for row in range(length)])
        options = []
        for policy, mask in zip((special, pointed, frequent, local), np.array(sees), strict=True):
            options.append(((one * mask).sum() / length, sorted(policy), min(length, len(policy) + 1)))
        table[layer, head] = [*options, (np.inf, list(range(length)), length)]
    for threshold in sorted({option[0] for options in table.values() for option in options}, reverse=True):
        chosen = {
            key: next(number for number, option in enumerate(options) if option[0] >= threshold)
            for key, options in table.items()
        }
        if sum(table[key][number][2] for key, number in chosen.items()) <= budget:
            return {key: (number, *table[key][number][1:]) for key, number in chosen.items()}
    raise AssertionError("nothing is affordable")


def test_fastgen_chooses_policies_by_recovery_and_holds_what_they_say(tiny):
    special = np.isin(TOKENS, KINDS["special"])
    special[0] = True
    pointed = np.isin(TOKENS, KINDS["punctuation"])
    weights = attention_paid(tiny)
    chosen = policies_by_hand(weights, special[:LENGTH], pointed[:LENGTH], int(BUDGET * weights.shape[0] * 2 * LENGTH))
    assert len({policy for policy, *_ in chosen.values()}) > 1

    def rule(part, candidates, weights, memory):
        memory += weights.mean(1).sum(1)
        return candidates

    def before(layer, part, every, memory):
        """After the prompt what the policies hold; then a full head loses one before a token comes."""
        if part.first < LENGTH:
            return every
        kept = []
        for head, positions in enumerate(every):
            policy, first_held, slots = chosen[layer, head]
            positions = first_held if part.first == LENGTH else positions
            if policy != EVERYTHING and len(positions) == slots:
                window = int(np.float32(0.3) * np.float32(part.first))
                stays = {
                    p: (
                        special[p],
                        policy >= PUNCTUATION and pointed[p],
                        policy >= LOCAL and p >= part.first - window,
                        memory[head, p] if policy >= FREQUENT else 0.0,
                        p,
                    )
                    for p in positions
                }
                # What is safe for another reason does not compete by weight.
                goes = min(positions, key=lambda p: (*stays[p][:3], 0.0 if any(stays[p][:3]) else stays[p][3], p))
                positions = [p for p in positions if p != goes]
            kept.append(list(positions))
        return kept

    parts = blocks(LENGTH, LENGTH + NEW, LENGTH, lambda _: 0)
    expected, history = dense(tiny, TOKENS, parts, rule, before=before)
    for layer, after in enumerate(history):
        after[0] = [chosen[layer, head][1] for head in range(len(after[0]))]

    def positions(state):
        cache = state.cache
        ranges = zip(np.asarray(cache.offset), np.asarray(cache.size), strict=True)
        flat = [sorted(int(p) for p in np.asarray(cache.position[a : a + n]) if p >= 0) for a, n in ranges]
        return [flat[:2], flat[2:]]

    check(tiny, make("fastgen", None), BUDGET, expected, history, positions=positions)


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_one_is_full_attention(tiny, pattern, full_logits, name):
    logits, state = make(name, pattern).begin(tiny, TOKENS[:SHORT], room=NEW, budget=1.0)
    entry = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    assert state.memory.held_nbytes == SHORT * entry
    for position in range(SHORT - 1, SHORT + NEW - 1):
        np.testing.assert_allclose(logits, full_logits[position], rtol=0, atol=1e-4)
        logits, state = make(name, pattern).step(tiny, int(TOKENS[position + 1]), state)
    np.testing.assert_allclose(logits, full_logits[-1], rtol=0, atol=1e-4)
    assert state.memory.held_nbytes == (SHORT + NEW) * entry


def buffers(state):
    """Bytes of all arrays with a head's channels last: keys and values."""
    leaves = [leaf for leaf in jax.tree.leaves(vars(state)) if isinstance(leaf, jax.Array) and leaf.ndim > 1]
    return sum(leaf.nbytes for leaf in leaves if leaf.shape[-1] == TINY.head_dim)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full"}))
def test_bytes_equal_the_formula_and_the_devices_buffers_and_meet_the_budget(tiny, pattern, name):
    _, state = make(name, pattern).begin(tiny, TOKENS[:LENGTH], room=NEW, budget=BUDGET)
    heads, entry = TINY.num_layers * TINY.num_kv_heads, 2 * TINY.head_dim * 4
    size, most = bucket(LENGTH), bucket(LENGTH + NEW)
    slots = {
        "snapkv": heads * (int(BUDGET * size) + bucket(NEW)),
        **dict.fromkeys(WHOLE, int(BUDGET * heads * size) + heads * bucket(NEW)),
        **dict.fromkeys(POOLED, most + 3 * 12),
    }.get(name, heads * int(BUDGET * most))
    beside = {
        "snapkv": TINY.num_kv_heads * size,
        **dict.fromkeys(WHOLE, heads * size),
        **dict.fromkeys(POOLED, TINY.num_kv_heads * chunk_width(size)),
    }.get(name, TINY.num_kv_heads * (int(BUDGET * most) + BLOCK))
    memory = state.memory
    assert memory.nbytes == state.nbytes == buffers(state) == slots * entry
    assert memory.peak_nbytes == (slots + beside) * entry
    full = heads * LENGTH * entry
    assert memory.held_nbytes <= BUDGET * full
    assert memory.held_nbytes == pytest.approx(BUDGET * full, abs=LENGTH * entry)  # by less than one head's whole cache
    assert 0 < memory.metadata_nbytes < memory.nbytes


@pytest.mark.parametrize("name", METHODS)
def test_a_second_prompt_of_the_bucket_compiles_nothing(tiny, pattern, name):
    functions = (infer._extend, infer.jitted_step, eviction._take_in, eviction._append)
    functions += (snapkv._observe, profile._profile, ragged.compress, fastgen._append)
    functions += (scored._append, expected_attention._observe, kvzip._read, kvzip._score, quest._bounds, quest._step)

    def run(length):
        budget = 1.0 if name == "full" else BUDGET
        greedy(make(name, pattern), tiny, TOKENS[:length], max_new_tokens=3, budget=budget)
        return [function._cache_size() for function in functions]

    length = SHORT if name == "full" else LENGTH
    assert run(length) == run(length + 2)


def test_snapkv_takes_a_prompt_shorter_than_its_window_whole(tiny, full_logits):
    logits, state = method("snapkv").begin(tiny, TOKENS[:5], room=0, budget=1.0)
    np.testing.assert_allclose(logits, full_logits[4], rtol=0, atol=1e-4)
    assert held(state) == [[[0, 1, 2, 3, 4]] * 2] * 2


def test_renumbered_positions_are_those_inside_the_cache():
    """Block by block, as if the text had been cut: sinks right before the window."""
    rule = method("streamingllm", block=10, renumber=True)
    plain = method("streamingllm", block=10)
    # One layer: its keys depend on their own tokens alone, so a cut text has the same.
    shallow = Model.random(replace(TINY, num_layers=1), seed=1)
    tokens = TOKENS[:40]
    logits, _ = rule.begin(shallow, tokens, room=1, budget=0.5)
    cut = np.concatenate([tokens[:4], tokens[14:40]])
    expected = all_logits(shallow, cut)
    np.testing.assert_allclose(logits, expected[-1], rtol=0, atol=1e-4)
    other, _ = plain.begin(shallow, tokens, room=1, budget=0.5)
    assert np.abs(np.asarray(other) - expected[-1]).max() > 1e-3


def test_greedy_takes_the_likeliest_token_and_stops_at_an_eos_id(tiny):
    prompt = TOKENS[:SHORT]
    tokens, memory = greedy(method("full"), tiny, prompt, max_new_tokens=NEW)
    likeliest = all_logits(tiny, [*prompt, *tokens]).argmax(-1)
    assert tokens == likeliest[SHORT - 1 : -1].tolist() and len(tokens) == NEW
    assert memory.held_nbytes == 2 * 4 * SHORT * 16 * 4
    end = tokens.index(tokens[-1]) + 1
    assert greedy(method("full"), tiny, prompt, max_new_tokens=NEW, eos_ids=tokens[-1:])[0] == tokens[:end]


@pytest.mark.parametrize(
    ("name", "budget", "length", "words"),
    [
        ("h2o", 0.0, 50, r"\(0, 1\].*budget=0.0"),
        ("duo", 1.5, 50, r"\(0, 1\].*budget=1.5"),
        ("tova", float("nan"), 50, r"\(0, 1\].*budget=nan"),
        ("full", 0.5, 50, "full attention holds every token.*budget=0.5"),
        ("streamingllm", 0.08, 50, "budget=0.08 of 50 tokens allows 4 tokens per head; streamingllm needs 5"),
        ("h2o", 0.03, 50, "allows 1 tokens per head; h2o needs 2"),
        ("tova", 0.01, 50, "allows 0 tokens per head; tova needs 1"),
        ("snapkv", 0.1, 50, "allows 5 tokens per head; snapkv needs 9"),
        ("fastgen", 0.02, 50, "budget=0.02 of 50 tokens is less than the"),
        ("expected-attention", 0.09, 50, "allows 4 tokens per head; expected-attention needs 5"),
        ("kvzip-tokens", 0.09, 50, "allows 4 tokens per head; kvzip-tokens needs 5"),
        ("duo+quest", 0.1, 50, "kv_budget=0.1.*less than 0.24"),
        ("duo", 0.1, 50, "kv_budget=0.1.*less than 0.24.*lower sink_size"),
        ("random-heads", 0.1, 50, "kv_budget=0.1.*less than 0.24"),
        ("h2o", 0.5, 0, "empty"),
    ],
)
def test_a_budget_or_a_prompt_that_cannot_be_is_refused(tiny, pattern, name, budget, length, words):
    with pytest.raises(ValueError, match=words):
        make(name, pattern).begin(tiny, TOKENS[:length], room=NEW, budget=budget)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("h3o", {}, "unknown method 'h3o'; there are full, duo, "),
        ("h2o", {"blocks": 3}, "h2o has no setting blocks; it has block, recent"),
        ("h2o=3", {}, "h2o takes no value"),
        ("duo", {}, "duo=FOLDER"),
        ("random-heads=x", {}, "whole number, got 'x'"),
        ("fastgen", {}, "pass tokenizer="),
        ("kvzip-tokens", {}, "pass tokenizer="),
        ("kvzip-tokens", OPTIONS["kvzip-tokens"] | {"chunk": 0}, "chunk must be at least 1, got 0"),
        ("expected-attention:future=0", {}, "future must be at least 1, got 0"),
        ("expected-attention:future=999999999", {}, "expected-attention:future must be at most 1048576"),
        ("expected-attention:safeguard=2", {}, r"safeguard must be in \[0, 1\], got 2"),
        ("duo+quest", {}, r"duo\+quest=FOLDER"),
        ("duo+quest=a:page=0", {}, r"^duo\+quest:page must be at least 1, got 0"),
        ("duo+quest=a:page=,tokens=64", {}, r"duo\+quest:page is a whole number, got ''"),
        ("duo+quest=a:page=8,page=16", {}, r"duo\+quest takes every setting once, got page=8,page=16"),
        ("duo+quest=a:page=64,tokens=63", {}, "tokens must be at least 64, got 63"),
        ("h2o", {"block": 0}, "block must be at least 1, got 0"),
        ("h2o", {"recent": 1.0}, r"recent must be in \[0, 1\)"),
        ("streamingllm", {"sink_size": -1}, "sink_size must be at least 0"),
        ("snapkv", {"pool": 4}, "pool must be odd"),
        ("fastgen", KINDS | {"local": 2.0}, r"local must be in \[0, 1\]"),
        ("h2o:blocks=3", {}, "h2o has no setting blocks; it has block, recent"),
        ("h2o:block=x", {}, "h2o:block is a whole number, got 'x'"),
        ("h2o:block=0", {}, "block must be at least 1, got 0"),
        ("streamingllm:renumber=yes", {}, "true or false, got 'yes'"),
        ("fastgen:special=3", {}, "set only in Python"),
        ("full:block=3", {}, "full has no setting block; it has none"),
        ("h2o:block", {}, "unknown method 'h2o:block'"),
    ],
)
def test_a_method_that_cannot_be_is_refused(text, options, words):
    with pytest.raises(ValueError, match=words):
        method(text, **options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("snapkv:window=64,pool=5", {"window": 64, "pool": 5}),
        ("h2o:recent=0.25", {"recent": 0.25}),
        ("streamingllm:renumber=true", {"renumber": True, "sink_size": 4}),
        ("random-heads=3:recent_size=17", {"seed": 3, "recent_size": 17, "sink_size": 1}),
        ("duo=a:b/c=1:sink_size=5", {"pattern": "a:b/c=1", "sink_size": 5, "recent_size": 2}),
        ("duo=a:b", {"pattern": "a:b", "sink_size": 1}),
        ("duo+quest=a:page=8,tokens=64", {"pattern": "a", "page": 8, "tokens": 64, "sink_size": 1}),
    ],
)
def test_settings_are_part_of_a_method_s_name(text, options):
    made = method(text, defaults={"sink_size": 1, "recent_size": 2})
    assert {name: getattr(made, name) for name in options} == options


@pytest.mark.parametrize("name", METHODS)
def test_tokens_and_room_are_checked(tiny, pattern, name):
    budget = 1.0 if name == "full" else BUDGET
    with pytest.raises(ValueError, match="room must be at least 0"):
        make(name, pattern).begin(tiny, TOKENS[:LENGTH], room=-1, budget=budget)
    with pytest.raises(ValueError, match="token ids must be in"):
        make(name, pattern).begin(tiny, TOKENS[:LENGTH] + 40, room=NEW, budget=budget)
    with pytest.raises(ValueError, match="one sequence"):
        make(name, pattern).begin(tiny, TOKENS[None], room=NEW, budget=budget)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        greedy(make(name, pattern), tiny, TOKENS, max_new_tokens=0)


def test_fastgen_knows_special_tokens_and_punctuation_by_the_tokenizer(text_model):
    tokenizer = load_tokenizer(text_model)
    rule = method("fastgen", tokenizer=tokenizer, local=0.2)
    assert set(rule.special) == {0, 1, 2} and rule.local == 0.2
    assert "".join(tokenizer.decode([token]) for token in rule.punctuation) == "!\"#%&'()*,-./:;?@[\\]_{}"


def test_what_comes_later_is_not_known_before(tiny, pattern):
    prompt, options = TOKENS[:LENGTH], {"max_new_tokens": 3}
    whole, _ = greedy(make("full", pattern), tiny, prompt, **options)
    later, memory = greedy(make("full", pattern), tiny, prompt, later=7, **options)
    assert later == whole
    # The bytes are those of the prefill, and so is the budget.
    rule = make("snapkv", pattern)
    logits, state = rule.begin(tiny, prompt[:-7], room=10, budget=BUDGET)
    assert state.memory.held_nbytes <= BUDGET * memory.held_nbytes
    expected = state.memory
    for token in prompt[-7:]:
        logits, state = rule.step(tiny, int(token), state)
    answer, memory = greedy(rule, tiny, prompt, later=7, budget=BUDGET, **options)
    assert memory == expected and answer[0] == int(np.asarray(logits).argmax())
    for wrong in (-1, LENGTH):
        with pytest.raises(ValueError, match=r"later must be at (least 0|most \d+), got -?\d+; the prompt has"):
            greedy(rule, tiny, prompt, later=wrong, budget=BUDGET, **options)
