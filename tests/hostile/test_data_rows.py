"""Data files of tasks with values of a wrong type, and limits that cannot be: refused before a model is read."""

import json

import pytest
from duo_eval.tasks.lm_eval import files
from duo_eval.tasks.lm_eval.files import fingerprints
from duo_eval.tasks.sandbox import sandbox

from tests.hostile.readers import PROBLEM, ROWS
from tests.text_models import assert_refused


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("humaneval", {"prompt": 1}, "prompt must be a text, got 1"),
        ("humaneval", {"task_id": None}, "task_id must be a text, got None"),
        ("humaneval", {"entry_point": "f; g"}, "entry_point must be the name of a function"),
        ("mmlu", {"answer_a": 3}, "answer_a must be a text, got 3"),
        ("mmlu", {"topic": ["x"]}, "topic must be a text"),
        ("mtbench", {"category": []}, "category must be a text"),
        ("mtbench", {"question_id": [1]}, "question_id must be a number or a text"),
        ("mtbench", {"required_temperature": "hot"}, "required_temperature must be a number"),
        ("longbench", {"answers": "c"}, "no list of strings in field 'answers'"),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path, name, change, words):
    reader, row = ROWS[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=f"{name}.jsonl:1: {words}"):
        reader(path)


def test_two_problems_of_one_name_are_refused(tmp_path, duo, text_model):
    data = tmp_path / "p.jsonl"
    data.write_text(2 * (json.dumps(PROBLEM) + "\n"))
    flags = ("--model", text_model, "--unsafe", "--out", tmp_path / "out.jsonl")
    assert_refused(duo("eval", "humaneval", "--data", data, *flags), "several items named 'T/0'")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e300"])
def test_limits_are_refused_before_data_and_model_are_read(tmp_path, duo, value):
    flags = ("--model", tmp_path / "none", "--data", tmp_path / "none", "--limits.seconds", value)
    done = duo("eval", "humaneval", *flags, "--out", tmp_path / "out.jsonl")
    assert_refused(done, "--limits.seconds must be", f"got {float(value)}")
    assert not (tmp_path / "out.jsonl").exists()


def test_without_isolation_humaneval_refuses_before_data_and_model_are_read(tmp_path, duo, monkeypatch):
    monkeypatch.setattr(sandbox, "_missing", lambda: "no Landlock")
    flags = ("--model", tmp_path / "none", "--data", tmp_path / "none", "--out", tmp_path / "out.jsonl")
    assert_refused(duo("eval", "humaneval", *flags), "cannot isolate", "no Landlock", "--unsafe")
    assert_refused(duo("eval", "humaneval", *flags, "--unsafe"), "no data file")


def test_a_folder_of_tasks_is_not_read_without_bounds(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("task: a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.yaml").write_text("task: c")
    assert list(fingerprints([tmp_path])) == [str(tmp_path / "a.yaml"), str(tmp_path / "b" / "c.yaml")]
    for name, most in (("MOST_FILES", 1), ("MOST_BYTES", 13)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"^{tmp_path} .*more than {most} "):
            patch.setattr(files, name, most)
            fingerprints([tmp_path])
