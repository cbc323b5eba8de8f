"""`duo eval needle` on a small model: cells, records, maps, resuming, and what is refused."""

import json

import pytest
from duo_eval.methods.registry import reply
from duo_eval.runner import run as runner
from duo_eval.runner.record import read
from duo_eval.runner.run import Comparison
from duo_eval.show.result_type import ResultType
from duo_eval.tasks.needle.command import Cell, NeedleTask

from tests.text_models import assert_refused

# One length and few depths: each bucket of lengths is two programs to compile.
QUICK = ("--lengths", "400", "--depths", "3", "--haystack-chars", "9000", "--sink-size", "4", "--recent-size", "16")


@pytest.fixture
def needle(duo, chat_model, tmp_path):
    out = tmp_path / "needle.jsonl"
    methods = ("--methods", "full", f"duo={chat_model / 'pattern'}")
    return out, lambda *args: duo(
        "eval", "needle", "--model", chat_model, "--out", out, *methods, "--budgets", "0.5", *QUICK, *args
    )


def test_needle_fills_its_cells_draws_and_resumes(needle, duo, monkeypatch):
    out, run = needle
    done = run()
    assert done.code == 0, done
    head, records = read(out)
    assert head["about"]["task"] == "needle" and set(head["gates"]) > {"full", "haystack"}
    assert [(record["job"]["depth"], record["job"]["budget"]) for record in records] == [
        (depth, budget) for depth in (0.0, 0.5, 1.0) for budget in (1.0, 0.5)
    ]
    for full, half in zip(records[::2], records[1::2], strict=True):
        # The same question, all of it and the answer within the length, and half of the bytes.
        assert full["key"] == half["key"] and full["position"] == half["position"]
        assert full["tokens"] + 12 == 400 and full["new_tokens"] <= 12 and full["score"] in (0.0, 1.0)
        assert half["held_bytes"] <= 0.5 * full["held_bytes"] and half["kv_bytes"] < full["kv_bytes"]
    assert len({record["key"] for record in records}) == 3
    for kind in ("png", "svg"):
        assert out.with_suffix(f".{kind}").stat().st_size > 5000
    monkeypatch.setattr(ResultType, "show_figures", lambda *_: None)
    # A kill in the middle of a line: the rest is done, nothing twice.
    whole = out.read_text()
    out.write_text(whole[:-300])
    left = len(read(out)[1])
    assert run().code == 0
    again = read(out)[1]
    assert left < len(again) == len(records)
    assert [{**a, "seconds": 0} for a in again] == [{**b, "seconds": 0} for b in records]
    assert "already complete" in run().out
    # More cells join the same file.
    assert run("--lengths", "400", "390").code == 0
    assert len(read(out)[1]) == 2 * len(records)
    # A question that comes later is another run: budgets are of the text alone.
    assert_refused(run("--question-later"), "question_later was None, now True")
    assert run("--question-later", "--out", out.with_name("later.jsonl")).code == 0
    later = read(out.with_name("later.jsonl"))[1]
    assert [one["key"] for one in later] == [one["key"] for one in records]
    assert all(one["held_bytes"] < other["held_bytes"] for one, other in zip(later, records, strict=True))
    # The figure can be had again, elsewhere.
    assert duo("eval", "plot", out, "--out", out.parent / "maps").code == 0
    assert "pattern at 0.5" in out.with_name("maps.svg").read_text()


def test_a_needle_depends_on_no_other_cell(chat_model):
    # The haystack is shorter than the longest prompt, and the cell that both have is longer than it.
    def asked(*lengths):
        task = NeedleTask(Comparison(str(chat_model)), lengths=lengths, haystack_chars=2000)
        return task.question(Cell("full", 1.0, 400, 0.5, 0))

    alone, among = asked(400), asked(400, 500)
    assert alone.facts == among.facts and (alone.tokens == among.tokens).all() and len(alone.tokens) == 388


def test_an_interrupt_loses_only_the_current_needle(needle, monkeypatch):
    out, run = needle
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reply(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "reply", interrupted)
        patch.setattr(ResultType, "show_figures", lambda *_: None)
        stopped = run()
    assert stopped.code == 130 and "interrupted" in stopped.err and "Traceback" not in stopped.err
    first = read(out)[1]
    assert len(first) == 2
    assert run().code == 0
    assert read(out)[1][:2] == first and len(read(out)[1]) == 6


def test_needle_refuses_what_cannot_be_right(needle, tmp_path):
    out, run = needle
    assert_refused(run("--lengths", "100000"), "100000 tokens", "trained for")
    assert_refused(run("--methods", "full", "abacus"), "unknown method 'abacus'", "full, duo")
    assert_refused(run("--methods", "duo"), "no published pattern")
    assert_refused(run("--methods", "full", "full"), "each of them once")
    assert_refused(run("--budgets", "1.5"), "in (0, 1]")
    assert_refused(run("--depths", "1"), "--depths must be at least 2")
    assert_refused(run("--haystack-chars", "0"), "--haystack-chars must be at least 1, got 0")
    assert_refused(run("--lengths", "60"), "leaves -")
    assert_refused(run("--haystack", tmp_path / "nothing"), "no haystack")
    assert not out.exists()
    assert_refused(run("--budgets", "0.01"), "streaming heads keep already")
    out.write_text(json.dumps({"about": {"task": "needle", "style": "words"}, "runs": []}) + "\n")
    before = out.read_text()
    assert_refused(run(), "made with other settings", "style was 'words', now 'digits'")
    assert out.read_text() == before


def test_a_figure_of_something_else_is_refused(duo, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"chess": 1}\n')
    assert_refused(duo("eval", "plot", path), "not a known result", "needle")
    path.write_text('{"about": {"task": "needle"}, "runs": []}\n')
    assert_refused(duo("eval", "plot", path), "no finished job")
    path.write_text("years of work")
    assert_refused(duo("eval", "plot", path), "is not JSON")
    assert_refused(duo("eval", "plot", tmp_path / "none.jsonl"), "none")
