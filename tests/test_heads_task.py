"""`duo eval heads` on a small model: effects are derivatives, heads turned back are patterns, and what is shown."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.runner.provenance import provenance
from duo_eval.runner.record import read, write
from duo_eval.tasks.needle import heads as task
from duo_eval.tasks.needle.heads import RESULT, Heads, _answer, batch_of, in_words
from duo_eval.tasks.needle.heads_show import head_table, needle_table
from duo_train.gated import GatedModel

from duo_jax import HeadPattern, KVCache, generate, load_model, prefill, score
from tests.text_models import assert_refused

ANSWER = 3


@pytest.fixture(scope="module")
def heads(text_model):
    model = load_model(text_model)
    shape = model.config.num_layers, model.config.num_kv_heads
    gates = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    pattern = HeadPattern.from_gates(gates, sparsity=0.75, sink_size=1, recent_size=2)
    return Heads(model, GatedModel(sink_size=1, recent_size=2, rematerialize=False), pattern)


@pytest.fixture(scope="module")
def measured(heads):
    """A prompt with the answer that full attention gives, so that it is right by definition."""
    prompt = np.random.default_rng(2).integers(3, heads.model.config.vocab_size, 60 - ANSWER).astype(np.int32)
    answer = np.asarray(generate(heads.model, prompt[None], max_new_tokens=ANSWER).tokens[0])
    tokens = np.concatenate([prompt, answer[-ANSWER:]])
    labels = np.arange(60) >= 60 - ANSWER
    return tokens, labels, heads.measure(tokens, labels, 2)


def inferred(heads, tokens, pattern):
    """The same scores as a cache gives them."""
    cache = KVCache.init(heads.model.config, pattern, 1, 64)
    _, cache = prefill(heads.model, jnp.asarray(tokens[None, : -ANSWER - 1]), cache)
    scores, _ = score(heads.model, jnp.asarray(tokens[None, -ANSWER - 1 :]), cache)
    return -np.asarray(scores.logprobs[0]), np.asarray(scores.is_top[0]).tolist()


def test_scores_are_those_of_inference(heads, measured):
    tokens, _, result = measured
    for name, pattern in (("full", HeadPattern.full(heads.model.config)), ("pattern", heads.pattern)):
        nll, hits = inferred(heads, tokens, pattern)
        np.testing.assert_allclose(result[name]["nll"], nll, atol=2e-4)
        assert result[name]["hits"] == hits
    assert all(result["full"]["hits"]) and not all(result["pattern"]["hits"])


def test_heads_turned_back_are_those_with_the_largest_effect(heads, measured):
    tokens, _, result = measured
    effect = np.array(result["effect"])
    assert (effect[heads.pattern.is_retrieval] == 0).all()
    first, second = np.argsort(-effect, axis=None)[:2]
    turned = [[np.ravel_multi_index(place, effect.shape) for place in turn["heads"]] for turn in result["turned"]]
    assert turned == [[first], [second], [first, second]]
    for chosen, turn in zip(turned, result["turned"], strict=True):
        table = heads.pattern.is_retrieval.copy()
        table.flat[chosen] = True
        nll, hits = inferred(heads, tokens, dataclasses.replace(heads.pattern, is_retrieval=table))
        np.testing.assert_allclose(turn["nll"], nll, atol=2e-4)
        assert turn["hits"] == hits


def test_only_streaming_heads_are_turned_back(heads, measured):
    tokens, labels, _ = measured
    # Retrieval heads have an effect of 0, larger than that of a head that does harm.
    turned = heads.measure(tokens, labels, 100)["turned"]
    assert sorted(turned[-1]["heads"]) == np.argwhere(~heads.pattern.is_retrieval).tolist()


def test_the_effect_is_the_derivative(heads, measured):
    tokens, labels, result = measured
    place = np.unravel_index(np.argmax(np.abs(result["effect"])), np.shape(result["effect"]))
    gates, step = heads.pattern.is_retrieval.astype(np.float32), 0.02
    ends = []
    for sign in (-1, 1):
        moved = gates.copy()
        moved[place] += sign * step
        ends.append(float(_answer(heads.attention, jnp.asarray(moved), heads.model, batch_of(tokens, labels))[0]))
    assert -(ends[1] - ends[0]) / (2 * step) == pytest.approx(result["effect"][place[0]][place[1]], rel=0.05)


def test_the_command_measures_resumes_refuses_and_draws(duo, chat_model, tmp_path, monkeypatch):
    out = tmp_path / "heads.jsonl"
    flags = ("--model", chat_model, "--pattern", chat_model / "pattern", "--lengths", 400, "--depths", 2)
    flags = (*flags, "--sink-size", 4, "--recent-size", 16, "--out", out)
    done = duo("eval", "heads", *flags)
    assert done.code == 0 and "2 needles: full attention finds" in done.out, done
    first = out.read_text()
    assert duo("eval", "heads", *flags).code == 0 and out.read_text() == first
    assert_refused(duo("eval", "heads", *flags, "--sparsity", 0.25), "sparsity was 0.5, now 0.25", "--out")
    assert_refused(duo("eval", "heads", *flags, "--turn-back", 0), "--turn-back must be at least 1")
    monkeypatch.setattr(task, "load_model", lambda *args: pytest.fail("weights were read"))
    flags = (*flags, "--out", tmp_path / "new.jsonl")
    assert_refused(duo("eval", "heads", *flags, "--lengths", 100_000), "100000 tokens", "trained for")
    assert_refused(duo("eval", "heads", *flags, "--lengths", 20), "--lengths of 20", "leaves -")
    assert_refused(duo("eval", "heads", *flags, "--pattern", "smollm2-135m-instruct"), "made for another model")
    assert not (tmp_path / "new.jsonl").exists()
    near, far = sorted(read(out)[1], key=lambda result: result["distance"])
    assert near["job"]["depth"] == 1 and far["distance"] > near["distance"] and len(near["answer"]) >= 5
    assert "layer 0, head" in head_table(out) and f"| {far['distance']} |" in " ".join(needle_table(out).split())


def test_what_is_shown_counts_the_needles_brought_back(tmp_path):
    def scores(*hits):
        return {"nll": [0.1 if hit else 3.0 for hit in hits], "hits": list(hits)}

    lost = [{"heads": [[1, 0]], **scores(True, True)}, {"heads": [[0, 1]], **scores(False, True)}]
    lost.append({"heads": [[1, 0], [0, 1]], **scores(True, True)})
    effect = [[0.0, 0.5], [2.0, 0.0]]
    results = [
        {"job": {"length": 64, "depth": depth, "sample": 0}, "distance": distance, "full": scores(True, True)}
        | {"pattern": scores(not turned, True), "effect": effect, "turned": turned}
        for depth, distance, turned in ((0.0, 60, lost), (1.0, 9, []))
    ]
    assert list(in_words(results))[1].startswith("of 1 that only full attention finds, a single head brings back 1")
    path = tmp_path / "heads.jsonl"
    write(path, {"about": {"task": "heads", "turn_back": 2}, "gates": {}, "runs": [provenance()], "results": results})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in head_table(path).splitlines()]
    assert ["layer 1, head 0", "1 of 1"] in [row[::2] for row in rows]
    assert ["layer 0, head 1", "0 of 1"] in [row[::2] for row in rows]
    drawn = list(RESULT.draw(path))
    assert [figure.name for figure in drawn] == ["heads", "tokens"] and "layer 1 head 0" in drawn[0].alt
