"""`duo eval harness`: lm-eval's tasks with local data, in one process, offline; generated code in the sandbox."""

import json
from pathlib import Path

import pytest
from duo_eval.tasks.lm_eval import batches
from duo_eval.tasks.lm_eval.code_eval import CodeEval
from duo_eval.tasks.lm_eval.tasks import load_tasks

from tests.text_models import assert_refused, make_model

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
  cache_dir: {folder}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = [{"question": f"Which one is {n}?", "choices": ["yes", "no", "it"], "answer": n % 3} for n in range(4)]
MBPP = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk width and one length of cache: every other would be a program to compile."""
    monkeypatch.setattr(batches, "WIDTHS", (32,))
    monkeypatch.setattr(batches, "MIN_ROOM", 512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("harness") / "model", layers=1)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a YAML task over a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = write(tmp_path / "toy.jsonl", ROWS)
    (folder / "toy.yaml").write_text(TASK.format(file=file, folder=tmp_path / "datasets"))
    return folder


def harness(duo, model: Path, out: Path, *more):
    return duo("eval", "harness", "--model", model, "--batch-size", 1, "--out", out, *more)


def test_a_yaml_task_over_a_local_file(tmp_path, duo, model, tasks):
    out = tmp_path / "out.json"
    flags = ("--tasks", "toy_choice", "--include-path", tasks, "--samples", "--pattern", model / "pattern")
    flags = (*flags, "--sparsity", 0.5, "--sink-size", 4, "--recent-size", 8)
    done = harness(duo, model, out, *flags)
    assert done.code == 0 and "toy_choice" in done.out, done
    record = json.loads(out.read_text())
    assert {"machine", "command", "about", "results", "samples"} <= set(record)
    assert record["about"]["pattern"]["sparsity"] == 0.5
    samples = record["samples"]["toy_choice"]
    assert len(samples) == 4 and all(len(sample["resps"]) == 3 for sample in samples)
    right = [max(range(3), key=lambda n: float(one["resps"][n][0][0])) == one["target"] for one in samples]
    assert record["results"]["toy_choice"]["acc,none"] == sum(right) / 4
    assert not list(tmp_path.glob("out.json.*")), "the store of answers is gone once the result is written"
    # The same again is the same; anything else is another run.
    assert harness(duo, model, out, *flags).code == 0
    assert json.loads(out.read_text())["results"] == record["results"]
    assert_refused(harness(duo, model, out, *flags, "--limit", 2), "limit was None, now 2", "--out")
    with (tasks / "toy.yaml").open("a") as file:
        file.write("# Another task.\n")
    assert_refused(harness(duo, model, out, *flags), "files.", "toy.yaml was")


def test_a_task_by_another_method(tmp_path, duo, model, tasks):
    out, flags = tmp_path / "out.json", ("--tasks", "toy_choice", "--include-path", tasks, "--method", "h2o:block=16")
    done = harness(duo, model, out, *flags)
    assert done.code == 0, done
    record = json.loads(out.read_text())
    assert (record["about"]["method"], record["about"]["budget"]) == ("h2o:block=16", 0.5)
    assert_refused(harness(duo, model, out, *flags, "--budget", 0.75), "budget was 0.5, now 0.75")
    # A pattern is named after the model where a method has none of its own.
    refused = harness(duo, model, tmp_path / "new.json", *flags[:-1], "duo")
    assert_refused(refused, f"'{model.name}'")
    refused = harness(duo, model, tmp_path / "new.json", *flags, "--budget", 0.01)
    assert_refused(refused, "a budget of 0.01 is too small for a context of", "every request: raise --budget")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--budget", 0.5), ["--budget is a method's", "--method"]),
        (("--method", "h2o", "--pattern", "here"), ["--method takes the place of --pattern"]),
        (("--method", "h2o", "--backend", "xla", "--sink-size", 4), ["leave out --sink-size, --backend"]),
        (("--method", "h2o", "--batch-size", 4), ["leave out --batch-size"]),
        (("--method", "h2o", "--budget", 0), ["--budget is a fraction", "got 0"]),
        (("--method", "h2o", "--budget", 1.5), ["--budget is a fraction", "got 1.5"]),
        (("--method", "full", "--budget", 0.5), ["--budget must be 1"]),
    ],
)
def test_flags_without_an_effect_are_refused(tmp_path, duo, flags, words):
    assert_refused(duo("eval", "harness", "--model", "none", "--tasks", "a", "--out", tmp_path / "o", *flags), *words)


@pytest.mark.usefixtures("isolated")
def test_mbpp_from_a_local_file(tmp_path, duo, model):
    data = write(tmp_path / "mbpp.jsonl", [MBPP, MBPP | {"task_id": 12}])
    flags = ("--tasks", "mbpp", "--data", f"mbpp={data}", "--num-fewshot", 0, "--gen-kwargs", "max_gen_toks=4")
    assert_refused(harness(duo, model, tmp_path / "out.json", *flags), "mbpp runs code", "--run-code")
    done = harness(duo, model, tmp_path / "out.json", *flags, "--run-code")
    assert done.code == 0, done
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["results"]["mbpp"]["pass_at_1,none"] == 0.0 and "time, memory" in record["sandbox"]


@pytest.mark.usefixtures("isolated")
def test_mbpp_judges_in_the_sandbox(tmp_path):
    data = write(tmp_path / "mbpp.jsonl", [MBPP])
    loaded, _ = load_tasks(["mbpp"], data={"mbpp": data})
    (task,) = loaded["tasks"].values()
    (doc,) = task.test_docs()
    assert task.process_results(doc, [MBPP["code"]]) == {"pass_at_1": 1.0}
    assert task.process_results(doc, ["def add(a, b):\n    return a - b"]) == {"pass_at_1": 0.0}
    assert task.process_results(doc, ["import os\nos.fork()\n" + MBPP["code"]]) == {"pass_at_1": 0.0}
    assert "Write a function to add two numbers." in task.doc_to_text(doc)


def test_pass_at_k_is_the_unbiased_estimator():
    test, right, wrong = "assert f() == 1", "def f(): return 1", "def f(): return 2"
    means, outcomes = CodeEval().compute(references=[test], predictions=[[right, wrong, wrong, wrong]], k=[1, 2, 9])
    assert means == {"pass@1": pytest.approx(1 / 4), "pass@2": pytest.approx(1 / 2)}
    assert outcomes == {0: ["passed", "failed", "failed", "failed"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["toy.jsonl:3", "not JSON"]),
        ({"data": "toy_choice"}, ["TASK=FILE"]),
        ({"data": "toy_choice=none.jsonl"}, ["no data file", "none.jsonl"]),
        ({"data": "other=none.jsonl"}, ["other", "--tasks does not name"]),
        ({"include-path": "nowhere"}, ["no folder of tasks", "nowhere"]),
    ],
)
def test_bad_data_is_refused_before_a_model_is_loaded(tmp_path, duo, tasks, change, words):
    lines = (tmp_path / "toy.jsonl").read_text().splitlines()
    (tmp_path / "toy.jsonl").write_text("\n".join([*lines[:2], lines[2][:9], *lines[3:]]))
    flags = {"tasks": "toy_choice", "include-path": tasks} | change
    found = harness(duo, "none", tmp_path / "out.json", *(x for name, y in flags.items() for x in (f"--{name}", y)))
    assert_refused(found, *words)


def test_files_that_are_no_result_are_refused(tmp_path, duo, tasks):
    flags = ("--tasks", "toy_choice", "--include-path", tasks)
    (tmp_path / "out.json").write_text("[]")
    assert_refused(harness(duo, "none", tmp_path / "out.json", *flags), "out.json must contain a JSON object", "--out")
    assert_refused(harness(duo, "none", tmp_path, *flags), "is a folder")


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_its_neighbours(tmp_path, duo):
    found = harness(duo, "none", tmp_path / "out.json", "--tasks", "helaswag")
    assert_refused(found, "no task 'helaswag'", "hellaswag")
