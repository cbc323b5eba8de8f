"""`duo choose` on a small model: what it asks, resuming, what is stored and refused. And the rule on results."""

import json
import shutil

import numpy as np
import pytest
from duo_eval.runner import run as runner
from duo_eval.runner.record import read
from duo_eval.stats.scores import FULL
from duo_eval.tasks.choose import command
from duo_eval.tasks.choose.results import choose, rows_of

import duo_jax
from duo_jax import HeadPattern
from tests.text_models import assert_refused

# One length and two budgets: each is two programs to compile.
QUICK = ("--context", "400", "--needles", "3", "--text-chars", "9000", "--budgets", "0.5")


@pytest.fixture
def own(text_model, tmp_path):
    """A pattern's folder that may be written to, with windows that fit the context."""
    folder = tmp_path / "pattern"
    pattern = HeadPattern.load(text_model / "pattern", sink_size=4, recent_size=16)
    pattern.save(folder)
    return folder


@pytest.fixture
def run(duo, text_model, own, tmp_path):
    out = tmp_path / "choose.jsonl"
    return lambda *args: duo("choose", "--model", text_model, "--pattern", own, "--out", out, *QUICK, *args)


def record(method, budget, number, score, *, recall=1.0, text=0.5, stretches=100):
    return {
        "job": {"method": method, "budget": budget, "length": 400, "depth": 0.5, "sample": number},
        "score": score,
        "recall": {"tokens": 5, "hits": 5 * recall, "nll": 0.1, "probability": 5 * recall},
        "text": {"tokens": 100, "hits": 50, "nll": 69.3, "probability": 100 * text},
        "sparsity": 1 - budget,
        "stretches": stretches,
        "held_bytes": 1000 * budget,
    }


def results(number, lost=None, **texts):
    """Answers of full attention, all right, and of budgets that lose some of them."""
    found = [record(FULL, 1.0, each, 1.0) for each in range(number)]
    for budget, count in (lost or {}).items():
        rng = np.random.default_rng(0)
        for each in range(number):
            score, text = float(each >= count), 0.5 + 1e-4 * rng.standard_normal()
            found.append(record("duo=x", budget, each, score, recall=score, text=text, **texts))
    return rows_of(found)


def test_too_few_needles_choose_nothing_and_say_how_many_it_takes():
    few = choose(results(20, {0.5: 0, 0.75: 0}), 0.01)
    assert few.row is None and "No budget is shown to lose at most 1 point" in few.reasons[0]
    assert "needles 0.00 points, at most 13.91" in few.reasons[1] and "To tell, it takes 299 needles" in few.reasons[1]
    # The same answers are enough for a larger loss.
    enough = choose(results(20, {0.5: 0, 0.75: 0}), 0.15)
    assert enough.row is not None and enough.row.budget == 0.5 and enough.row.sparsity == 0.5


def test_the_smallest_budget_within_the_loss_is_chosen_and_others_are_explained():
    made = choose(results(300, {0.25: 30, 0.5: 0, 0.75: 0}), 0.01)
    assert made.row is not None and made.row.budget == 0.5
    assert made.reasons[0].startswith("Chosen: 50% of the KV bytes, a sparsity of 0.500. With 95 % confidence")
    assert "25%, 300 needles: loses needles 10.00 points, at most 13" in made.reasons[1]
    assert "To tell" not in made.reasons[1], "more needles would not help"
    # A larger budget that loses keeps a smaller one out.
    odd = choose(results(300, {0.25: 0, 0.5: 30, 0.75: 0}), 0.01)
    assert odd.row is not None and odd.row.budget == 0.75
    assert odd.reasons[-1] == "25%: within the loss, but a larger budget is not."


def test_a_model_that_finds_nothing_has_nothing_to_lose():
    rows = results(300, {0.5: 0})
    for row in rows:
        for each in (*row.full, *row.records):
            each["score"] = 0.0
    made = choose(rows, 0.01)
    assert made.row is None and "Full attention itself finds 0 of 300 needles" in made.reasons[0]


def test_questions_of_one_short_text_do_not_count_as_many_texts():
    assert choose(results(300, {0.5: 0}), 0.01).row is not None
    made = choose(results(300, {0.5: 0}, stretches=1), 0.01)
    assert made.row is None and "text's probability" in made.reasons[1] and "any number" in made.reasons[1]
    noisy = results(300, {0.5: 0}, stretches=2)
    for number, each in enumerate(noisy[0].records):
        each["text"]["probability"] += number % 2
    assert "To tell, it takes a longer --text, if" in choose(noisy, 0.01).reasons[1]


def test_choose_measures_all_budgets_and_resumes(run, tmp_path):
    out = tmp_path / "choose.jsonl"
    done = run("--loss", "100")
    assert done.code == 0 and "6 questions of" in done.out + done.err and "on this device" in done.out + done.err, done
    head, records = read(out)
    assert head["about"]["task"] == "choose" and [each["job"]["sample"] for each in records] == [0, 0, 1, 1, 2, 2]
    for full, half in zip(records[::2], records[1::2], strict=True):
        assert full["key"] == half["key"] and full["position"] == half["position"] and full["tokens"] == 388
        assert half["held_bytes"] <= 0.5 * full["held_bytes"] and full["sparsity"] == 0 < half["sparsity"]
        assert full["recall"]["tokens"] == len(f" {full['key']}") and full["text"]["tokens"] > 150
    assert (tmp_path / "choose-loss.png").stat().st_size > 5000
    # A random model finds nothing, so nothing can be chosen or stored.
    assert "Full attention itself finds 0 of 3" in done.out
    refused = run("--loss", "100", "--copy-to", tmp_path / "copy")
    assert refused.code == 2 and "no budget was chosen" in refused.err and "already complete" in refused.out
    assert not (tmp_path / "copy").exists()


def asked(text_model, own):
    """The first question at half of the bytes, and the model with its pattern."""
    task = command.Choose(str(text_model), str(own), 400, (0.5,), needles=1, text_chars=9000)
    job = [*task._jobs()][1]
    model, (needle, prompt) = duo_jax.load_model(text_model), task._hide(job)
    pattern = task._comparison.resolved[job.method].pattern_at(model, job.budget, len(prompt.tokens))
    return task, job, needle, prompt, duo_jax.LM(model, task._comparison.tokenizer, pattern)


def test_text_and_answers_are_scored_as_by_one_pass(text_model, own):
    _, _, needle, prompt, lm = asked(text_model, own)
    measured = command.ask(lm, needle, prompt)
    assert lm.tokenizer.decode(prompt.right) == f" {needle.key[0]}"
    # The prompt followed by the right answer, in one go.
    whole = np.concatenate([prompt.tokens, prompt.right])
    scores, _ = duo_jax.score(lm.model, whole[None], lm.make_cache(416))
    logprobs, is_text = np.asarray(scores.logprobs[0], np.float64), prompt.is_text[1:]
    assert measured["recall"]["nll"] == pytest.approx(-logprobs[-len(prompt.right) :].sum(), rel=1e-4)
    assert is_text.sum() == measured["text"]["tokens"] and not is_text[-1]
    assert measured["text"]["nll"] == pytest.approx(-logprobs[: len(is_text)][is_text].sum(), rel=1e-4)
    assert 0 < measured["text"]["probability"] < measured["text"]["tokens"]


@pytest.mark.full_matrix
def test_choose_asks_what_duo_eval_needle_asks_and_gets_the_same_answers(text_model, own):
    # There the method prefills the whole prompt.
    task, job, needle, prompt, lm = asked(text_model, own)
    measured, method = command.ask(lm, needle, prompt), task._comparison.resolved[job.method]
    other = task._task.question(job).ask(method, job.budget, lm.model, lm.tokenizer)
    assert [other[name] for name in ("answer", "key", "tokens")] == [
        measured[name] for name in ("answer", "key", "tokens")
    ]
    assert measured["held_bytes"] == pytest.approx(other["held_bytes"], rel=0.01)


def found(lm, needle, prompt):
    """In place of `ask`: a model that loses nothing."""
    made = record("", lm.pattern.kv_fraction(400), 0, 1.0)
    return {name: made[name] for name in ("score", "recall", "text", "held_bytes")} | {"seconds": 1.0}


def test_a_choice_is_stored_and_every_command_then_loads_it(run, duo, text_model, own, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ask", found)
    gates = (own / "full_attention_heads.tsv").read_bytes()
    copy = tmp_path / "copy"
    assert run("--loss", "70", "--copy-to", copy).code == 0
    assert "default_sparsity" in (copy / "config.json").read_text()
    assert "default_sparsity" not in (own / "config.json").read_text()
    done = run("--loss", "70", "--apply")
    assert done.code == 0 and f"{own} now loads with a sparsity of" in done.out, done
    stored = json.loads((own / "config.json").read_text())
    assert stored["chosen"] == {
        "model": str(text_model), "context": 400, "kv_budget": 0.5, "loss": 70.0, "needles": 3, "text": "pydoc",
    }  # fmt: skip
    assert (own / "full_attention_heads.tsv").read_bytes() == gates
    sparsity = stored["default_sparsity"]
    assert 0 < sparsity < 1
    # One place decides: the library, and the flags of all commands.
    assert HeadPattern.load(own).sparsity == sparsity and HeadPattern.load(own, threshold=0.0).sparsity == 0
    assert duo_jax.load(text_model, pattern=own).pattern.sparsity == sparsity
    shown = json.loads(duo("inspect", "--model", text_model, "--pattern", own, "--json").out)
    assert shown["heads"]["streaming"] / (shown["heads"]["streaming"] + shown["heads"]["retrieval"]) == sparsity
    # A file that was changed by hand is refused by name, as in a report.
    out, edited = tmp_path / "choose.jsonl", tmp_path / "edited.jsonl"
    for field, value in (("recall", None), ("score", None), ("sparsity", "x")):
        head, *lines = map(json.loads, out.read_text().splitlines())
        edited.write_text("\n".join(map(json.dumps, [head, *(line | {field: value} for line in lines)])) + "\n")
        assert "edited.jsonl has results of another shape" in run("--loss", "70", "--out", edited).err
    # The measured budgets are the same as before; those of another pattern have nothing to do with them.
    assert "already complete" in run("--loss", "70").out
    assert_refused(run("--loss", "70", "--pattern", copy), "choose.jsonl was made with other settings: pattern was")


def test_an_interrupt_loses_only_the_question_in_hand(run, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return found(*args)

    with monkeypatch.context() as patch:
        patch.setattr(command, "ask", interrupted)
        stopped = run()
    assert stopped.code == 130 and "Traceback" not in stopped.err
    first = read(tmp_path / "choose.jsonl")[1]
    assert len(first) == 2
    monkeypatch.setattr(command, "ask", found)
    assert run().code == 0
    assert read(tmp_path / "choose.jsonl")[1][:2] == first and len(read(tmp_path / "choose.jsonl")[1]) == 6


def test_choose_refuses_what_cannot_be_right(run, duo, text_model, own, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    text = tmp_path / "short.txt"
    text.write_text("A short text. " * 50)
    assert_refused(run("--text", text), "700 tokens", "twice --context 400")
    assert_refused(run("--context", "100000"), "--context of 100000", "trained for")
    assert_refused(run("--context", "60"), "--context of 60", "leaves -")
    assert_refused(run("--budgets", "1.5"), "in (0, 1]")
    assert_refused(run("--loss", "0"), "--loss must be in")
    assert_refused(run("--needles", "0"), "--needles must be at least 1")
    assert_refused(run("--text-chars", "0"), "--text-chars must be at least 1")
    assert_refused(run("--pattern", ""), "a value of --pattern is empty")
    assert_refused(run("--copy-to", ""), "a value of --copy-to is empty")
    assert_refused(run("--pattern", "mistral-7b-instruct-v0.2"), "made for another model")
    assert_refused(run("--pattern", tmp_path / "none"), "no folder and no published pattern")
    assert_refused(duo("choose", "--model", text_model, *QUICK), "no pattern is published", "--pattern", "duo identify")
    published = tmp_path / "package" / "own"
    shutil.copytree(own, published)
    monkeypatch.setattr(command, "is_published", lambda folder: folder == published)
    assert_refused(run("--pattern", published, "--apply"), "part of the installed package", "--copy-to")
    assert_refused(run("--copy-to", text_model), "config.json exists and is not a pattern's")
    assert not (tmp_path / "choose.jsonl").exists()
