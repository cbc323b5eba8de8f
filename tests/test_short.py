"""Short tasks: their data, their comparison item by item, resuming, and what is refused; on small checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from duo_eval.tasks import humaneval, mmlu
from duo_eval.tasks.item_by_item import compared, short_table
from duo_eval.tasks.lm_eval import batches

import duo_jax
from duo_jax.text.chat import Chat
from tests.text_models import assert_refused, make_model

SUBJECTS = ("sums", "colours")


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk width and one length of cache: every other would be a program to compile."""
    monkeypatch.setattr(batches, "WIDTHS", (64,))
    monkeypatch.setattr(batches, "MIN_ROOM", 512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: each costs seconds of compilation in every program."""
    return make_model(tmp_path_factory.mktemp("short") / "model", layers=1)


def row(number: int, subject: str, answer: str = "B") -> dict:
    choices = {f"answer_{letter}": f"{letter}{number}" for letter in "abcd"}
    return {"question": f"What is {number} of {subject}?", **choices, "correct_answer": answer, "topic": subject}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def mmlu_file(tmp_path: Path) -> Path:
    header = {name: name for name in mmlu.FIELDS} | {"correct_answer": "answer", "topic": "sums"}
    rows = [row(number, subject, "ABCD"[number % 4]) for number in range(4) for subject in SUBJECTS]
    return write(tmp_path / "mmlu.jsonl", [header, *rows, rows[0]])  # One of the questions is there twice.


def test_worked_examples_are_of_the_subject_and_never_asked(mmlu_file):
    asked = mmlu.questions(mmlu_file, shots=2, count=100, seed=0)
    assert 4 <= len(asked) <= 5  # of 9 questions, 2 of each subject are held out, and copies of these
    for question in asked:
        *examples, last = question.prompt.split("\n\n")[1:]
        assert question.subject in question.prompt.split("\n\n")[0] and len(examples) == 2
        assert last.endswith("Answer:") and all(example[-1] in mmlu.LETTERS for example in examples)
        assert not {example[:-2] for example in examples} & {other.prompt.split("\n\n")[-1] for other in asked}
    assert mmlu.questions(mmlu_file, shots=2, count=3, seed=0) == asked[:3]
    assert mmlu.questions(mmlu_file, shots=2, count=100, seed=1) != asked


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["mmlu.jsonl:2", "not JSON"]),
        ("[]", ["mmlu.jsonl:2", "list"]),
        ('{"question": "?"}', ["mmlu.jsonl:2", "answer_a"]),
        (json.dumps(row(1, "sums", "E")), ["mmlu.jsonl:2", "'E'"]),
    ],
)
def test_a_malformed_line_is_named(tmp_path, duo, line, words):
    path = tmp_path / "mmlu.jsonl"
    path.write_text(json.dumps(row(0, "sums")) + "\n" + line + "\n")
    assert_refused(duo("eval", "mmlu", "--data", path, "--out", tmp_path / "out.jsonl"), *words)


def test_missing_data_and_wrong_settings_are_refused(tmp_path, duo, model, mmlu_file):
    out = ("--out", tmp_path / "out.jsonl")
    assert_refused(duo("eval", "mmlu", "--data", tmp_path / "none.jsonl", *out), "no data file", "none.jsonl")
    assert_refused(duo("eval", "mmlu", "--data", mmlu_file, "--shots", 9, *out), "too few", "--shots")
    wrong = ("--model", model, "--methods", "full", "duo:sparsity=2")
    assert_refused(duo("eval", "mmlu", "--data", mmlu_file, "--shots", 1, *wrong, *out), "duo:sparsity", "got 2")
    assert not (tmp_path / "out.jsonl").exists()


def run_mmlu(duo, folder: Path, data: Path, out: Path, *more, pattern: Path | None = None):
    half, none = (f"duo={pattern or folder / 'pattern'}:sparsity={sparsity}" for sparsity in (0.5, 0.0))
    methods = ("--methods", "full", half, none, "snapkv:window=64", "--budgets", 0.1, 0.9)
    methods += ("--sink-size", 4, "--recent-size", 16)
    return duo(
        "eval",
        "mmlu",
        "--model",
        folder,
        *methods,
        "--data",
        data,
        "--shots",
        1,
        "--batch-size",
        1,
        "--out",
        out,
        *more,
    )


@pytest.mark.full_matrix
def test_mmlu_compares_item_by_item_and_resumes(tmp_path, duo, model, mmlu_file):
    out = tmp_path / "out.jsonl"
    pattern = shutil.copytree(model / "pattern", tmp_path / "pattern")
    whole = run_mmlu(duo, model, mmlu_file, out, pattern=pattern)
    assert whole.code == 0, whole
    assert short_table(out).count("% stream") == 2 and "duo eval mmlu" in short_table(out)
    assert "snapkv window 64 at 0.9" in short_table(out) and "snapkv window 64 at 0.1" not in short_table(out)
    head, *records = [json.loads(line) for line in out.read_text().splitlines()]
    count = len(mmlu.questions(mmlu_file, shots=1, count=500, seed=0))
    assert len(records) == 5 * count and head["about"]["shots"] == 1
    # A tenth of the bytes is less than the window of snapkv: these have no answer, and the run goes on.
    refused = [one for one in records if one["job"]["budget"] == 0.1]
    assert len(refused) == count and all("snapkv needs 65" in one["refused"] for one in refused)
    records = [one for one in records if one not in refused]
    by_job = {(one["job"]["method"], one["job"]["item"]): one for one in records}
    for (method, item), record in by_job.items():
        assert record["answer"] == "ABCD"[int(np.argmax(record["logprobs"]))]
        full = by_job["full", item]["logprobs"]
        # A pattern in which no head streams is full attention, one in which half stream is not.
        assert np.allclose(record["logprobs"], full, atol=1e-4) is (method == "full" or "=0.0" in method)
    # A run that was killed in the middle of a line ends with the same records.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:20])
    again = run_mmlu(duo, model, mmlu_file, out, pattern=pattern)
    assert again.code == 0 and again.out == whole.out
    done = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert {(one["job"]["method"], one["job"]["item"]): one["answer"] for one in done if "answer" in one} == {
        job: one["answer"] for job, one in by_job.items()
    }
    assert len(done) == 5 * count
    assert_refused(run_mmlu(duo, model, mmlu_file, out, "--seed", 1, pattern=pattern), "seed was 0, now 1")
    gates = 1 - duo_jax.HeadPattern.load(pattern).gates
    duo_jax.HeadPattern.from_gates(gates, sink_size=4, recent_size=16).save(tmp_path / "other")
    shutil.rmtree(pattern)
    shutil.move(tmp_path / "other", pattern)
    assert_refused(run_mmlu(duo, model, mmlu_file, out, pattern=pattern), "made with other duo=", "under the same name")


def test_a_prompt_beyond_the_model_is_refused(tmp_path, duo, model):
    rows = [row(number, "sums") | {"question": "x" * 300} for number in range(2)]
    rows[1]["question"] += "y"
    path = write(tmp_path / "mmlu.jsonl", rows)
    assert_refused(run_mmlu(duo, model, path, tmp_path / "out.jsonl"), "are more than the 512", "trained for")


def test_the_table_is_of_pairs():
    def record(method, item, answer, correct):
        return {"job": {"method": method, "item": str(item)}, "answer": answer, "correct": correct}

    records = [record("full", item, "A", item < 6) for item in range(10)]
    records += [record("half", item, "A" if item < 8 else "B", item < 4 or item == 9) for item in range(10)]
    records.append(record("half", 10, "A", True))  # without its pair
    full, half = compared(records)
    assert full[:2] == ["full", "10"] and full[2].startswith("60.0 (") and full[3:] == ["", "", ""]
    assert [half[0], half[1], *(cell.split(" ")[0] for cell in half[2:])] == [
        "half",
        "10",
        "50.0",
        "80.0",
        "70.0",
        "-10.0",
    ]


PROBLEM = {
    "task_id": "Toy/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(2, 3) == 5\n",
}


def test_a_solution_is_judged_by_its_tests(tmp_path):
    (problem,) = humaneval.problems(write(tmp_path / "p.jsonl", [PROBLEM]))
    assert problem.prompt == "def add(a, b):", "a completion begins with the line break"
    assert problem.judge("\n    return a + b\n").outcome == "passed"
    assert problem.judge("\n    return a - b\n").reason.startswith("AssertionError")
    assert problem.judge("").reason.startswith("IndentationError")
    with pytest.raises(ValueError, match=r"p\.jsonl:2: no prompt"):
        humaneval.problems(write(tmp_path / "p.jsonl", [PROBLEM, {"task_id": "Toy/1"}]))


@pytest.mark.usefixtures("isolated")
def test_humaneval_writes_judges_and_compares(tmp_path, duo, model):
    problems = [PROBLEM, PROBLEM | {"task_id": "Toy/1", "prompt": "def other(a, b):\n", "entry_point": "other"}]
    data, out = write(tmp_path / "p.jsonl", problems), tmp_path / "out.jsonl"
    pattern = ("--methods", "full", f"duo={model / 'pattern'}:sparsity=0.5,sink_size=4,recent_size=16")
    flags = ("--model", model, *pattern, "--data", data, "--max-new-tokens", 4, "--out", out)
    done = duo("eval", "humaneval", *flags)
    assert done.code == 0, done
    records = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert sorted(one["job"]["item"] for one in records) == ["Toy/0"] * 2 + ["Toy/1"] * 2
    assert not any(one["correct"] for one in records) and all(one["verdict"] for one in records)
    assert duo("eval", "humaneval", *flags).out == done.out.replace("is complete", "is already complete")
    assert_refused(duo("eval", "humaneval", *flags[:-4], "--max-new-tokens", 5, "--out", out), "max_new_tokens was 4")


def questions(path: Path, count: int) -> Path:
    rows = [
        {"question_id": 81 + number, "category": "math", "turns": [f"Question {number}?", "And then?"]}
        for number in range(count)
    ]
    return write(path, rows)


def test_mtbench_answers_are_a_conversation_in_fastchats_format(tmp_path, duo, chat_model):
    asked, out = questions(tmp_path / "question.jsonl", 3), tmp_path / "answers" / "toy.jsonl"
    flags = ("--model", chat_model, "--max-new-tokens", 6, "--max-length", 256, "--out", out)
    assert duo("eval", "mtbench", *flags, "--questions", asked).code == 0
    text = out.read_text()
    answers = [json.loads(line) for line in text.splitlines()]
    assert [one["question_id"] for one in answers] == [81, 82, 83]
    assert all(set(one) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for one in answers)
    assert {one["model_id"] for one in answers} == {"chat"} and len({one["answer_id"] for one in answers}) == 3
    chat = Chat(duo_jax.load(chat_model), max_length=256)
    said = []
    for turn in ("Question 1?", "And then?"):
        running = chat.say(turn, max_new_tokens=6)
        list(running)
        said.append(str(running.reply).strip())
    assert answers[1]["choices"] == [{"index": 0, "turns": said}]
    # Cut off in the second answer: the first stays as it was, the others say the same again.
    out.write_text(text[: text.index("\n") + 40])
    assert duo("eval", "mtbench", *flags, "--questions", asked).code == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[0] == answers[0] and [one["choices"] for one in again] == [one["choices"] for one in answers]
    assert "already complete" in duo("eval", "mtbench", *flags, "--questions", asked).out
    other = duo("eval", "mtbench", *flags, "--questions", asked, "--model-id", "other")
    assert_refused(other, "model_id was 'chat', now 'other'")
    asked.write_text(asked.read_text().replace("Question 1?", "Something else?"))
    assert_refused(duo("eval", "mtbench", *flags, "--questions", asked), "other question 82 under the same name")
    # More of them may join.
    questions(asked, 4)
    assert duo("eval", "mtbench", *flags, "--questions", asked).code == 0 and len(out.read_text().splitlines()) == 4


def test_mtbench_resumes_answers_of_the_first_release(tmp_path, duo, chat_model):
    asked, out = questions(tmp_path / "question.jsonl", 2), tmp_path / "toy.jsonl"
    flags = ("--model", chat_model, "--max-new-tokens", 6, "--max-length", 256, "--out", out, "--questions", asked)
    assert duo("eval", "mtbench", *flags).code == 0
    path = tmp_path / "toy.jsonl.about.json"
    head = json.loads(path.read_text())
    settings = {name: value for name, value in head["about"].items() if name != "task"}
    prefix = "question "
    prints = {name: value for name, value in head["gates"].items() if name.startswith(prefix)}
    settings["questions"] = {name.removeprefix(prefix): value for name, value in prints.items()}
    run = {name: head["runs"][0][name] for name in ("command", "machine")}
    old = json.dumps({"about": settings, **run})
    path.write_text(old)
    assert "already complete" in duo("eval", "mtbench", *flags).out and path.read_text() == old
    assert_refused(duo("eval", "mtbench", *flags, "--seed", 1), "seed was 0, now 1")
    first = out.read_text().splitlines()[0]
    out.write_text(first + "\n")
    assert duo("eval", "mtbench", *flags).code == 0
    assert [out.read_text().splitlines()[0], len(out.read_text().splitlines())] == [first, 2]
    asked.write_text(asked.read_text().replace("Question 1?", "Something else?"))
    assert_refused(duo("eval", "mtbench", *flags), "other question 82 under the same name")


def test_mtbench_refuses_what_it_cannot_read(tmp_path, duo, chat_model):
    asked = questions(tmp_path / "question.jsonl", 1)
    asked.write_text(asked.read_text() + '{"question_id": 82, "category": "math", "turns": []}\n')
    flags = ("--model", chat_model, "--out", tmp_path / "out.jsonl")
    assert_refused(duo("eval", "mtbench", *flags, "--questions", asked), "question.jsonl:2", "turns")
    assert_refused(duo("eval", "mtbench", *flags, "--questions", tmp_path / "none"), "no data file")
    (tmp_path / "out.jsonl").write_text('{"some": "thing"}\n')
    asked = questions(tmp_path / "question.jsonl", 1)
    assert_refused(duo("eval", "mtbench", *flags, "--questions", asked), "out.jsonl:1", "question_id")
