"""`score` against the golden logits, and recall and its tables on a small model."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.show.registry import type_of
from duo_eval.show.result_type import ResultType
from duo_eval.stats.intervals import Estimate, of_differences, of_scores, ratio
from duo_eval.stats.recall_cells import FULL_ATTENTION, STREAMING, Key, recall_cells
from duo_eval.tasks.passkeys import UNSEEN, fit, score_sample
from duo_eval.tasks.precision import precision_table
from duo_eval.tasks.recall_results import prose_table, recall_details, recall_table
from duo_train.gated import GatedModel
from transformers import AutoTokenizer

from duo_jax import HeadPattern, KVCache, load_model, prefill, score
from duo_jax.generation import infer
from tests.shapes import GOLDEN
from tests.text_models import assert_refused

QUICK = (
    *(
        "--samples",
        "2",
        "--random",
        "2",
        "--prose",
        "1",
        "--prose-length",
        "60",
        "--lengths",
        "300",
        "--sparsity",
        "0.5",
    ),
    *("--sink-size", "4", "--recent-size", "16", "--data.haystack", "pydoc", "--data.num-passkeys", "2"),
    *("--data.passkey-words", "2", "--data.needle", "<{ordinal} {words}>", "--data.question", "{ordinal}?"),
    *("--data.answer", "{ordinal} {words}."),
)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.full_matrix), "duo"])
@pytest.mark.parametrize("chunk_size", [pytest.param(None, marks=pytest.mark.full_matrix), 33])
def test_scores_equal_those_of_the_golden_logits(kind, chunk_size, monkeypatch):
    monkeypatch.setattr(infer, "SCORE_BLOCK", 7)
    folder = GOLDEN / "qwen3"
    with np.load(folder / "golden.npz") as arrays:
        ids, logits = arrays["ids"], arrays[f"{kind}_logits"].astype(np.float64)
    model = load_model(folder)
    pattern = HeadPattern.load(folder / "pattern") if kind == "duo" else None
    cache = KVCache.init(model.config, pattern, 2, ids.shape[1])
    # The first 20 tokens are there already; the second row ends earlier.
    _, cache = prefill(model, ids[:, :20], cache)
    rest = np.array([ids.shape[1] - 20, 57])
    scores, cache = score(model, ids[:, 20:], cache, lengths=rest, chunk_size=chunk_size)
    assert cache.length.tolist() == (20 + rest).tolist() and scores.logprobs.shape == (2, ids.shape[1] - 21)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, count in enumerate(rest):
        at = np.arange(20, 20 + count - 1)
        found = np.asarray(scores.logprobs)[row, : count - 1]
        np.testing.assert_allclose(found, wanted[row, at, ids[row, at + 1]], rtol=0, atol=2e-4)
        top = logits[row, at].argmax(-1) == ids[row, at + 1]
        np.testing.assert_array_equal(np.asarray(scores.is_top)[row, : count - 1], top)


def test_a_text_that_does_not_fit_is_refused(tiny):
    cache = KVCache.init(tiny.config, None, 1, 16)
    with pytest.raises(ValueError, match="row 0 has 0 tokens"):
        score(tiny, np.zeros((1, 17), np.int32), cache)


def test_a_sample_s_answers_are_scored_given_all_before_them(text_model):
    model, tokenizer = load_model(text_model), AutoTokenizer.from_pretrained(text_model)
    config = UNSEEN.__class__(num_passkeys=2, passkey_words=2, needle="<{ordinal} {words}>", question="{ordinal}?")
    data = fit(config, tokenizer, 400)
    assert all(360 < len(data[number].tokens) <= 400 for number in range(40))
    sample = data[0]
    found = score_sample(model, sample, 400, HeadPattern.full(model.config))
    hidden, _ = GatedModel().teacher(model, jnp.asarray(sample.tokens)[None])
    logprobs = np.asarray(jax.nn.log_softmax(model.decoder.logits(hidden))[0], np.float64)
    for (first, last), tokens, hits, nll in zip(sample.answers, *found.values(), strict=True):
        at = np.arange(first, last)
        assert tokens == last - first
        assert nll == pytest.approx(-logprobs[at - 1, sample.tokens[at]].sum(), abs=1e-3)
        assert hits == (logprobs[at - 1].argmax(-1) == sample.tokens[at]).sum()


def test_recall_resumes_refuses_and_makes_tables(duo, text_model, tmp_path, monkeypatch):
    out = tmp_path / "recall.jsonl"
    run = lambda *args: duo("eval", "recall", "--model", text_model, *QUICK, "--out", out, *args)  # noqa: E731
    pattern = f"mine={text_model / 'pattern'}"
    done = run("--patterns", pattern)
    assert done.code == 0, done
    whole = out.read_text()
    jobs = [json.loads(line)["job"] for line in whole.splitlines()[1:]]
    assert len(jobs) == len({json.dumps(job) for job in jobs}) == 2 * 4 + 3
    assert {job["method"] for job in jobs} == {"full attention", "all streaming", "mine", "random 0", "random 1"}
    assert list(tmp_path.glob("*.png"))
    monkeypatch.setattr(ResultType, "show_figures", lambda *_: None)
    # Cut off in the middle of a line: what is there is not computed again, what is missing is.
    out.write_text(whole[:-40])
    assert run("--patterns", pattern).code == 0
    assert out.read_text().splitlines()[1:] == whole.splitlines()[1:]
    assert len(json.loads(out.read_text().splitlines()[0])["runs"]) == 2
    whole = out.read_text()
    assert "already complete" in run("--patterns", pattern).out
    for table in (recall_table, recall_details, prose_table):
        text = table(out)
        assert "mine" in text and "nan" not in text
    assert_refused(run("--patterns", "mine=smollm2-135m-instruct"), "other mine under the same name")
    assert_refused(run("--patterns", pattern, "--recent-size", "17"), "other settings")
    assert_refused(run("--patterns", "random=x"), "NAME=FOLDER")
    assert out.read_text() == whole
    out.write_text(whole.replace('{"job"', '{job"', 1))
    assert_refused(run("--patterns", pattern), f"{out}:2 is not JSON")
    for foreign in ("years of work", '{"mine": 1}', "one\ntwo"):
        out.write_text(foreign)
        assert run("--patterns", pattern).code == 2
        assert out.read_text() == foreign


@pytest.mark.full_matrix
def test_precision_is_measured_against_float32(duo, text_model, tmp_path):
    gates = tmp_path / "gates"
    HeadPattern.from_gates(np.array([[1.0, 0.0] * 2, [0.0, 1.0] * 2]), sink_size=4, recent_size=16).save(gates)
    out, needles = tmp_path / "precision.jsonl", QUICK[QUICK.index("--sink-size") :]
    command = ("eval", "precision", "--model", text_model, "--pattern", gates, "--out", out, *needles)
    command += ("--lengths", 300, "--samples", 2, "--prose", 1, "--caches", "int4", "--weights", "int8", "--both")
    assert_refused(duo(*command, "--caches", "int3"), "must be one of float32, bfloat16", "'int3'")
    assert duo(*command).code == 0
    table = precision_table(out)
    assert type_of(out).title == "Quantization"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if " 300 |" in line]
    assert [row[1:4] for row in rows] == [
        [stream, *pair]
        for pair in (["float32", "float32"], ["float32", "int4"], ["int8", "float32"])
        for stream in ("0%", "50%")
    ]
    assert [bool(row[5].strip()) for row in rows] == [False, False, True, True, True, True]
    before = out.read_text()
    assert "already complete" in duo(*command).out and out.read_text() == before


@pytest.mark.full_matrix
def test_recall_compares_sizes(duo, text_model, tmp_path):
    out = tmp_path / "sizes.jsonl"
    sizes = ("--sink-size", "4", "--recent-size", "16", "--sparsity", "0.5", "--random", "0", "--prose", "0")
    run = lambda *args: duo("eval", "recall", "--model", text_model, *QUICK, *sizes, "--out", out, *args)  # noqa: E731
    pattern = ("--patterns", f"mine={text_model / 'pattern'}")
    assert run(*pattern).code == 0
    done = run(*pattern, "--recent-sizes", "16", "24")
    assert done.code == 0, done
    _, cells = recall_cells(out)
    found = {(key.method, key.sink_size, key.recent_size) for key in cells}
    assert found == {
        (FULL_ATTENTION, 0, 0),
        *((method, 4, recent) for method in (STREAMING, "mine") for recent in (16, 24)),
    }
    assert "already complete" in run(*pattern, "--sink-sizes", "4", "--recent-sizes", "24", "16").out
    table = recall_table(out)
    assert re.search(r"\| +sinks \| +16 recent \| +24 recent \|", table) and "nan" not in table + recall_details(out)
    key = Key(300, "mine", 0.5, 4, 16)
    assert key.kv_fraction == pytest.approx(0.5 + 0.5 * 20 / 300)
    drawn = duo("eval", "plot", out)
    figures = [line.rsplit("/", 1)[1] for line in drawn.out.split()]
    assert drawn.code == 0 and figures == ["sizes-sizes.png", "sizes-sizes.svg"]
    figure = (tmp_path / "sizes-sizes.svg").read_text()
    assert all(text in figure for text in ("all streaming, 100% stream", "mine, 50% stream", "4 sinks"))
    assert_refused(run(*pattern, "--recent-sizes", "0"), "--recent-size must be at least 1, got 0")


def test_intervals_are_of_samples_and_differences_are_paired():
    rng = np.random.default_rng(1)
    counts = np.full(50, 10.0)
    hard = rng.normal(0, 3, 50)  # what makes a sample hard makes it hard for both
    full, less = 60 + hard, 59 + hard + rng.normal(0, 0.1, 50)
    alone, paired = ratio(full, counts), ratio(less, counts, full)
    assert alone.low < 6 < alone.high and alone.mean == pytest.approx(full.mean() / 10)
    assert paired.low < -0.1 < paired.high and paired.high - paired.low < (alone.high - alone.low) / 5
    # The interval of a mean of normal values is known.
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * full.std() / 10 / 50**0.5, rel=0.1)


def test_scores_that_are_all_right_leave_room_for_doubt():
    # Wilson's interval of 10 of 10: z² / (10 + z²) below 1.
    sure = of_scores(np.ones(10))
    assert sure.mean == sure.high == 1.0 and sure.low == pytest.approx(1 - 1.96**2 / (10 + 1.96**2), abs=1e-3)
    assert all(of_scores(np.ones(n)).high == 1.0 and of_scores(np.zeros(n)).low == 0.0 for n in range(1, 50))
    parts = np.array([0.4, 0.4, 0.6])
    assert of_scores(parts) == ratio(parts, np.ones(3))
    alike = of_scores(np.full(10, 0.6))
    assert alike.low < 0.35 and alike.high > 0.8, "not a point where all are alike"
    # Each of two tasks counts the same.
    assert of_scores(np.array([1.0, 1.0, 1.0, 0.0]), np.array([1, 1, 1, 3]) / 3).mean == pytest.approx(0.5)
    assert of_scores(np.array([0.2, 1.0])) == Estimate(0.6, 0.0, 1.0), "no score lies beyond"


def test_paired_scores_that_all_agree_leave_room_for_doubt():
    # Bonett and Price: one disagreement more either way.
    ours, theirs = np.array([1.0, 0.0] * 5), np.array([1.0, 0.0] * 5)
    same = of_differences(ours, theirs)
    half = 1.96 * (2 / 12 / 12) ** 0.5
    assert same.mean == 0.0 and (same.low, same.high) == pytest.approx((-half, half), abs=1e-3)
    ours[:3] = 0.0, 1.0, 0.0  # two right answers lost, one gained
    fewer = of_differences(ours, theirs)
    half = 1.96 * ((5 / 12 - 1 / 144) / 12) ** 0.5
    assert fewer.mean == pytest.approx(-0.1)
    assert (fewer.low, fewer.high) == pytest.approx((-1 / 12 - half, -1 / 12 + half), abs=1e-3)
    parts = np.array([0.4, 0.5, 0.6])
    assert of_differences(parts, np.ones(3)) == ratio(parts, np.ones(3), np.ones(3))
    assert of_differences(parts, parts).high > 0.3
    assert of_differences(parts, parts + 0.2).low < -0.3, "not a point where all differ alike"


@pytest.mark.full_matrix
def test_the_cost_of_a_training_step_is_measured(duo, text_model, tmp_path):
    out = tmp_path / "training.json"
    done = duo("eval", "training", "--model", text_model, "--lengths", "64", "--steps", "1", "--out", out)
    assert done.code == 0, done
    results = json.loads(out.read_text())["results"]
    assert [result["rematerialize"] for result in results] == [True, False]
    assert all(0 < result["fraction_of_matmul_rate"] < 1 and result["temporary_bytes"] > 0 for result in results)
    assert_refused(duo("eval", "training", "--lengths", "0"), "at least 1")
    for text, words in (
        ('{"command": "duo eval needle --out training.json", "machine": {}, "results": []}', "a result of needle"),
        ("[]", "training.json must contain a JSON object"),
    ):
        out.write_text(text)
        assert_refused(duo("eval", "training", "--out", out), words, "choose another --out")


def test_memory_of_another_machine_s_gpu_says_what_is_missing(duo):
    assert_refused(duo("eval", "memory", "--model", "gpt-9"), "unknown shape", "llama-3-8b")
    assert_refused(duo("eval", "memory", "--gpu", "abacus"), "unknown GPU", "a100-80g")
