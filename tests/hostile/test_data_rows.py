"""Data files of tasks with values of a wrong type, and limits that cannot be: refused before a model is read."""

import json
from pathlib import Path

import pytest
from duo_eval.tasks import humaneval, mmlu, mtbench
from duo_eval.tasks.longbench import Task
from duo_eval.tasks.rows import read_rows
from duo_eval.tasks.ruler import qa
from duo_eval.tasks.sandbox import sandbox
from hypothesis import given
from hypothesis import strategies as st

from tests.text_models import assert_refused

PROBLEM = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f()\n"}
CHOICES = dict.fromkeys(mmlu.FIELDS, "A")
TURNS = {"question_id": 1, "category": "math", "turns": ["Hello"]}
LONG = {"context": "a", "input": "b", "answers": ["c"]}

words = st.text("aB1 é", max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


def humaneval_rows(path: Path) -> object:
    return humaneval.problems(path)


def mmlu_rows(path: Path) -> object:
    return mmlu.questions(path, shots=0, count=1, seed=0)


def mtbench_rows(path: Path) -> object:
    return read_rows(path, mtbench.QUESTION_FIELDS, mtbench._wrong, texts=("category",))


def longbench_rows(path: Path) -> object:
    return Task({"task": path.stem}).rows(path.parent)


READERS = {
    "humaneval": (humaneval_rows, PROBLEM),
    "mmlu": (mmlu_rows, CHOICES),
    "mtbench": (mtbench_rows, TURNS),
    "longbench": (longbench_rows, LONG),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("name", READERS)
@given(st.data())
def test_a_row_is_read_or_refused_with_its_line(folder, name, data):
    reader, row = READERS[name]
    changed = dict(row)
    for field in data.draw(st.sets(st.sampled_from(sorted(row)), min_size=1)):
        if data.draw(st.booleans()):
            changed[field] = data.draw(values)
        else:
            del changed[field]
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(changed) + "\n")
    try:
        reader(path)
    except ValueError as error:
        assert f"{name}.jsonl:2: " in str(error) and len(str(error)) < 700


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
    reader, row = READERS[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=f"{name}.jsonl:1: {words}"):
        reader(path)


def test_two_problems_of_one_name_are_refused(tmp_path, duo, text_model):
    data = tmp_path / "p.jsonl"
    data.write_text(2 * (json.dumps(PROBLEM) + "\n"))
    flags = ("--model", text_model, "--unsafe", "--out", tmp_path / "out.jsonl")
    assert_refused(duo("eval", "humaneval", "--data", data, *flags), "several items named 'T/0'")


@pytest.mark.parametrize("style", ["squad", "hotpot"])
@given(value=values)
def test_a_file_of_questions_is_refused_with_its_place(folder, style, value):
    path = folder / f"{style}.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{style}.json"):
        qa.load(path, style)


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
