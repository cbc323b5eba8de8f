"""Tables of scores: their cells, and that differences are between the same questions."""

import json
import re

import pytest
from duo_eval.show.score_table import score_summary, score_table
from duo_eval.stats.scores import NOTHING, in_words, shared

MACHINE = {"processor": "a processor", "cores": 2, "python": "3.11", "versions": {"jax": "0.1"}, "commit": "abc1234"}


@pytest.fixture
def scores(tmp_path):
    def write(*records):
        head = {"about": {"task": "needle"}, "gates": {}, "runs": [{"command": "duo eval needle", "machine": MACHINE}]}
        path = tmp_path / "scores.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
        return path

    return write


def record(method, length, sample, score, **more):
    budget = 1.0 if method == "full" else 0.5
    job = {"method": method, "budget": budget, "length": length, "depth": 0.0, "sample": sample}
    return {"job": job, "score": score, "held_bytes": int(1000 * length * budget), **more}


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"][2:]


def test_differences_are_of_the_questions_that_both_were_asked(scores):
    # At 2000 tokens duo was asked one question more, which it got wrong.
    asked = [record("full", 1000, n, 1.0) for n in range(3)] + [record("full", 2000, 0, 0.0)]
    asked += [record("duo", 1000, n, float(n > 0)) for n in range(3)] + [record("duo", 2000, n, 0.0) for n in range(2)]
    path = scores(*asked)
    full, duo = rows(score_summary(path))
    assert full[:2] == ["full", "100%"] and full[2] == "100.0 (43.9 to 100.0)" and full[4] == ""
    assert duo[:2] == ["duo", "50%"] and duo[2].startswith("66.7 (") and duo[3].startswith("0.0 (")
    assert re.search(r"\| +1000 tokens, n = 3 \| +2000 tokens, n = 1 \|", score_summary(path))
    assert duo[4].startswith("-25.0 (") and duo[4].endswith("n = 4")
    cells = rows(score_table(path))
    assert [cell[:3] for cell in cells] == [
        ["1000", "full", "100%"],
        ["1000", "duo", "50%"],
        ["2000", "full", "100%"],
        ["2000", "duo", "50%"],
    ]
    assert cells[1][4].startswith("-33.3 (") and [cell[5] for cell in cells] == ["1.0", "0.5", "2.0", "1.0"]
    assert "a processor" in score_table(path) and "abc1234" in score_summary(path)


def test_bytes_read_and_a_question_that_comes_later_are_shown_where_they_are(scores):
    one, other = record("full", 1000, 0, 1.0), record("duo+quest", 1000, 0, 1.0, read_bytes=250_000)
    assert "KV read" not in score_table(scores(one)) and "before the question" not in score_table(scores(one))
    path = scores(one, other)
    assert [row[6] for row in rows(score_table(path))] == ["", "0.2"] and "bounds of pages" in score_table(path)
    path.write_text(path.read_text().replace('{"task": "needle"}', '{"task": "needle", "question_later": true}', 1))
    for table in (score_summary(path), score_table(path)):
        assert "compressed before the question was known" in table


def test_tasks_count_the_same_however_many_questions_they_have(scores):
    asked = [("easy", n, 1.0) for n in range(9)] + [("hard", n, 0.5) for n in range(3)]
    records = [record("full", 1000, n, score) for _, n, score in asked]
    for one, (task, _, _) in zip(records, asked, strict=True):
        one["job"]["task"] = task
    (row,) = rows(score_summary(scores(*records)))
    assert row[2].startswith("75.0 (")
    assert next(in_words(records)).endswith("; easy 100.0, hard 50.0")


def test_only_questions_that_all_have_a_score_for_are_compared():
    records = [record("full", 1000, n, 1.0) for n in range(3)] + [record("duo", 1000, n, 1.0) for n in (0, 1)]
    records.append(record("duo", 1000, 2, None))  # too short for its budget
    assert {one["job"]["sample"] for one in shared(records)} == {0, 1} and len(shared(records)) == 4
    assert [line.rsplit("n = ", 1)[1] for line in in_words(records)] == ["2", "2"]


def test_what_was_not_asked_is_left_open(scores):
    path = scores(record("duo", 1000, 0, 0.3), record("h2o", 2000, 0, None, refused="too small"))
    (duo,) = rows(score_summary(path))
    assert duo == ["duo", "50%", "30.0 (2.1 to 89.7)", ""]
    assert "1 questions have no score" in score_table(path)
    assert score_table(scores()) == score_summary(scores()) == NOTHING


def test_budgets_of_a_method_are_shown_together_or_one_at_a_time(scores):
    records = [record("full", 1000, 0, 1.0), record("duo", 1000, 0, 1.0)]
    for budget in (0.75, 0.25):
        records.append(record("duo", 1000, 0, 1.0))
        records[-1]["job"] = records[-1]["job"] | {"budget": budget}
    path = scores(*records)
    assert [row[:2] for row in rows(score_summary(path))] == [
        ["full", "100%"],
        ["duo", "25%"],
        ["duo", "50%"],
        ["duo", "75%"],
    ]
    assert [row[1] for row in rows(score_summary(path, budget=0.5))] == ["100%", "50%"]
