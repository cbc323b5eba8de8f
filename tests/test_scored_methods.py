"""Methods that score tokens or pages by the model's own arrays, against their papers' formulas in numpy."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.methods.expected_attention import before_rope
from duo_eval.methods.kvzip import NEXT_REQUEST, OVERLAP, REQUEST
from duo_eval.methods.registry import greedy, method

from duo_jax import load_tokenizer
from duo_jax.model.rope import YarnRope, rotate, rotation
from duo_jax.text.template import split
from duo_jax.text.tokens import encode
from tests import dense_scores
from tests.dense_scores import passed, quest_pages, top
from tests.shapes import TINY
from tests.test_methods import BUDGET, LENGTH, NEW, OPTIONS, TOKENS

HEADS = TINY.num_layers * TINY.num_kv_heads


def held(state):
    """Whether each head holds each token of the text so far, `[L K T]`."""
    cache = state.cache
    position, head = np.asarray(cache.position), np.asarray(cache.head)
    result = np.zeros((HEADS, state.length), bool)
    for index in range(HEADS):
        result[index][position[(head == index) & (position >= 0)]] = True
    return result.reshape(TINY.num_layers, TINY.num_kv_heads, -1)


def check(model, rule, expected):
    """The prompt's tokens that stay, and the logits with these and everything that follows."""
    stays = np.concatenate([expected, np.ones((*expected.shape[:2], NEW), bool)], axis=2)

    def see(layer, head, row, q, k):
        causal = np.arange(len(k)) <= row
        own = np.zeros(len(k), bool)
        own[: stays.shape[2]] = stays[layer, head // (TINY.num_heads // TINY.num_kv_heads)]
        return causal & own if row >= LENGTH else causal

    logits, _ = passed(model, TOKENS, see)
    got, state = rule.begin(model, TOKENS[:LENGTH], room=NEW, budget=BUDGET)
    for step in range(NEW + 1):
        np.testing.assert_array_equal(held(state), stays[:, :, : LENGTH + step])
        np.testing.assert_allclose(got, logits[LENGTH - 1 + step], rtol=0, atol=1e-4)
        if step < NEW:
            got, state = rule.step(model, int(TOKENS[LENGTH + step]), state)
    with pytest.raises(ValueError, match="room is used up"):
        rule.step(model, 3, state)


@pytest.mark.parametrize("begins", [False, True])
def test_kvzip_keeps_what_the_model_attends_to_while_it_repeats(tiny, begins):
    """The highest scores of all heads together; the parts of a prompt are repeated one after the other."""
    before = tuple(TOKENS[:7].tolist()) if begins else (60,) * 7
    options = OPTIONS["kvzip-tokens"] | {"before": before}
    rule, first = method("kvzip-tokens", **options), 7 if begins else 4
    prompt = TOKENS[:LENGTH].tolist()
    repeats = []
    for begin in range(first, LENGTH, 48):
        end = min(begin + 48, LENGTH)
        request = (7, 8, *prompt[begin - OVERLAP : begin]) if begin > first else (7, 8, 9)
        repeats.append((begin, end, [*request, 3, *prompt[begin:end]]))
    assert len(repeats) == 3
    scores = dense_scores.kvzip(tiny, prompt, repeats, first)
    expected = top(scores, int(BUDGET * HEADS * LENGTH))
    sizes = expected.sum(-1)
    assert expected[:, :, :first].all() and sizes.min() < sizes.max()
    check(tiny, rule, expected)


def test_kvzip_asks_in_the_chat_template(chat_model):
    tokenizer = load_tokenizer(chat_model)
    rule = method("kvzip-tokens", tokenizer=tokenizer)
    before, after = split(tokenizer)
    prompt = encode(tokenizer, before + "one two three" + after)
    assert rule.first(np.asarray(prompt, np.int32)) == len(rule.before) > 0
    (part,) = rule.parts(np.asarray(prompt, np.int32), len(rule.before))
    text = tokenizer.decode(part.repeat)
    assert REQUEST.strip() + after in text and text.endswith("one two three" + after)
    assert NEXT_REQUEST.strip() in tokenizer.decode(rule.next_request)


def test_expected_attention_keeps_what_future_queries_should_attend_to(tiny):
    """The heads of a layer share its budget; the safeguard leaves none of them empty."""
    rule = method("expected-attention", future=20)
    scores = dense_scores.expected_attention(tiny, TOKENS[:LENGTH], future=20, sinks=4, epsilon=0.01)
    equal = int(BUDGET * LENGTH)
    expected = []
    for layer in scores:
        safe = np.array([top(head, int(0.2 * equal)) for head in layer])
        expected.append(top(np.where(safe, np.inf, layer), TINY.num_kv_heads * equal))
    check(tiny, rule, np.array(expected))


def test_heads_hold_at_least_the_safe_tokens():
    scores = np.random.default_rng(0).random((1, 2, 50)) + np.array([0.0, 1.0])[:, None]
    choose = lambda **options: method("expected-attention", **options).choose(scores, 0.4).sum(-1).tolist()  # noqa: E731
    assert choose(safeguard=0.0) == [[0, 40]] and choose() == [[4, 36]] and choose(safeguard=1.0) == [[20, 20]]


def test_queries_before_rope_are_found_again():
    rope = YarnRope(factor=4.0, original_max_position_embeddings=32)
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 4, 16)), jnp.float32)
    position = jnp.arange(100, 109, dtype=jnp.int32)[None]
    turned = rotate(q, *rotation(rope, 16, position))
    np.testing.assert_allclose(before_rope(turned, replace(TINY, rope=rope), position), q, atol=1e-5)


@pytest.mark.parametrize("dense_layers", [1, pytest.param(0, marks=pytest.mark.full_matrix)])
def test_quest_reads_the_pages_with_the_best_bounds_in_retrieval_heads(tiny, half, tmp_path, dense_layers):
    """What is held is the pattern's; what a step reads is counted, pages that two query heads chose only once."""
    half.save(tmp_path)
    page, count, group = 8, 4, TINY.num_heads // TINY.num_kv_heads
    sizes = {"sink_size": half.sink_size, "recent_size": half.recent_size, "sparsity": 0.5}
    options = {"page": page, "tokens": page * count, "dense_layers": dense_layers}
    rule, plain = method(f"duo+quest={tmp_path}", **sizes, **options), method(f"duo={tmp_path}", **sizes)
    pages: dict[tuple[int, int, int], set[int]] = {}

    def see(layer, head, row, q, k):
        position = np.arange(len(k))
        if not half.is_retrieval[layer, head // group]:
            return (position <= row) & ((position < half.sink_size) | (position > row - half.recent_size))
        if row < LENGTH or layer < dense_layers:
            return position <= row
        chosen = quest_pages(q, k, row, page=page, count=count)
        pages.setdefault((row, layer, head // group), set()).update(chosen)
        return (position <= row) & np.isin(position // page, list(chosen))

    expected, _ = passed(tiny, TOKENS, see)
    logits, state = rule.begin(tiny, TOKENS[:LENGTH], room=NEW, budget=1.0)
    _, other = plain.begin(tiny, TOKENS[:LENGTH], room=NEW, budget=1.0)
    assert state.memory.read_nbytes is None
    assert state.memory[:3] == other.memory[:3] and state.memory.metadata_nbytes > other.memory.metadata_nbytes
    for step in range(NEW + 1):
        np.testing.assert_allclose(logits, expected[LENGTH - 1 + step], rtol=0, atol=1e-4)
        if step < NEW:
            logits, state = rule.step(tiny, int(TOKENS[LENGTH + step]), state)
    pairs = 0
    for row in range(LENGTH, LENGTH + NEW):
        used = row // page + 1
        for layer, head in np.ndindex(half.is_retrieval.shape):
            if not half.is_retrieval[layer, head]:
                pairs += half.sink_size + half.recent_size
            elif layer < dense_layers:
                pairs += row + 1
            else:
                whole = pages[row, layer, head] - {used - 1}
                pairs += used + len(whole) * page + row % page + 1
    assert any(len(chosen) > count for chosen in pages.values()), "query heads of a group differ"
    assert state.memory.read_nbytes == round(pairs * 2 * TINY.head_dim * 4 / NEW)


def test_greedy_reports_what_steps_read(tiny, half, tmp_path):
    half.save(tmp_path)
    prompt, options = TOKENS[:LENGTH], {"max_new_tokens": NEW}
    settings = {"sink_size": 3, "recent_size": 8, "sparsity": 0.5}
    _, plain = greedy(method(f"duo={tmp_path}", **settings), tiny, prompt, **options)
    few = method(f"duo+quest={tmp_path}", page=8, tokens=32, dense_layers=1, **settings)
    _, memory = greedy(few, tiny, prompt, **options)
    assert plain.read_nbytes is None and memory[:3] == plain[:3]
    assert 0 < memory.read_nbytes < 0.9 * memory.held_nbytes
