"""LongBench from small files of its format: lm-eval's prompts and metrics, long prompts lose their middle."""

import json

import numpy as np
import pytest
from duo_eval.runner.record import read
from duo_eval.tasks.longbench import LongBenchTask, Row, Task, load_task, names
from duo_eval.tasks.prompt import frame, prompt
from duo_train.data.needles import beginning

from duo_jax import load_tokenizer
from duo_jax.text.tokens import encode
from tests.text_models import assert_refused

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

ROW = {"input": "Who is it?", "context": "It is Ada. " * 60, "answers": ["Ada", "Ada Lovelace"], "length": 180}
TREC = {**ROW, "input": "What is it?\nType:", "answers": ["Animal"], "all_classes": ["Animal", "Plant"]}


@pytest.fixture
def folder(tmp_path):
    def write(name, *rows):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path.parent

    return write


def test_there_are_21_tasks_and_each_can_be_asked_and_scored():
    assert len(names()) == 21 and "narrativeqa" in names()
    special = {"passage_count": "7", "passage_retrieval_zh": "段落7"}
    for name in names():
        task, answer = load_task(name), special.get(name, "Paragraph 7")
        row = {**ROW, "question": "Who?", "answers": [answer], "all_classes": [answer]}
        text = task.prompt(row)
        assert ROW["context"] in text and "{" not in text and 0 < task.max_new_tokens <= 512
        assert task.score(row, "") == 0.0 and task.score(row, answer) == pytest.approx(1.0), name


def test_metrics_are_those_of_the_task():
    assert load_task("hotpotqa").score(ROW, "It was Ada Lovelace") == pytest.approx(2 * 0.5 * 1 / 1.5)
    trec = load_task("trec")
    assert trec.score(TREC, "Animal\nPlant") == 1.0 and not trec.is_chat, "an answer ends with its line"
    assert trec.score(TREC, "Plant") == 0.0
    assert load_task("passage_count").score({"answers": ["7"]}, "7 or 8") == 0.5
    assert load_task("gov_report").is_chat and not load_task("lcc").is_chat


def test_a_long_prompt_loses_its_middle_and_keeps_its_frame(chat_model):
    tokenizer = load_tokenizer(chat_model)
    text = "".join(chr(97 + n % 26) for n in range(300))
    for use_chat in (True, False):
        before, after = frame(tokenizer, use_chat=use_chat) or ("", "")
        head = encode(tokenizer, before) if use_chat else beginning(tokenizer)
        whole = prompt(tokenizer, text, use_chat=use_chat, joint="")
        assert prompt(tokenizer, text, use_chat=use_chat, joint="", limit=len(whole)) == whole
        cut = prompt(tokenizer, text, use_chat=use_chat, joint="", limit=101)
        assert len(cut) == 101
        kept = 101 - len(head) - len(after)
        expected = text[: kept - kept // 2] + text[300 - kept // 2 :]
        assert tokenizer.decode(cut[len(head) :]) == expected + after
    with pytest.raises(ValueError, match="leave"):
        prompt(tokenizer, text, use_chat=True, joint="", limit=10)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "2 is not JSON"),
        ("[]", "2 must contain a JSON object, not a list"),
        (json.dumps({**ROW, "context": None}), "2: no string in field 'context'"),
        (json.dumps({**ROW, "answers": "Ada"}), "2: no list of strings in field 'answers'"),
        (json.dumps({**ROW, "answers": []}), "2: no list of strings in field 'answers'"),
        (json.dumps({**ROW, "all_classes": [1]}), "2: no list of strings in field 'all_classes'"),
    ],
)
def test_a_row_of_another_format_is_refused_with_its_line(folder, line, said):
    where = folder("qasper", ROW)
    with (where / "qasper.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"qasper.jsonl:{said}"):
        load_task("qasper").rows(where)


def test_rows_of_the_hub_have_the_same_form(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "test.jsonl").write_text(json.dumps({**ROW, "question": "Who?"}) + "\n")
    source = {"dataset_path": str(tmp_path), "dataset_name": "default", "test_split": "test"}
    (row,) = Task(source).rows(None)
    assert row["question"] == "Who?" and row["answers"] == ROW["answers"]
    with pytest.raises((FileNotFoundError, ValueError), match="could not be"):
        Task(source | {"dataset_path": "no/such-set"}).rows(None)


@pytest.mark.full_matrix
def test_longbench_asks_every_method_resumes_and_refuses(duo, chat_model, folder, tmp_path):
    where, out = folder("hotpotqa", ROW, {**ROW, "context": "Short."}), tmp_path / "longbench.jsonl"
    folder("trec", TREC)
    common = ("--model", chat_model, "--out", out, "--data", where, "--sink-size", "4", "--recent-size", "60")
    methods = ("--methods", "full", f"duo={chat_model / 'pattern'}")
    run = lambda *args: duo("eval", "longbench", *common, *methods, "--budgets", "0.5", *args)  # noqa: E731
    assert_refused(run("--tasks", "chess"), "unknown task 'chess'", "narrativeqa")
    assert_refused(run("--tasks", "qasper"), "qasper.jsonl")
    assert_refused(run("--max-length", "100000"), "trained for")
    assert_refused(run("--max-length", "60"), "twice the longest answer")
    assert_refused(run("--data", tmp_path), "no file of LongBench")
    assert not out.exists()
    done = run("--max-length", "400")
    assert done.code == 0 and "at 0.5 of the KV bytes" in done.out, done
    _, records = read(out)
    assert [(record["job"]["task"], record["job"]["row"]) for record in records[::2]] == [
        ("hotpotqa", 0),
        ("trec", 0),
        ("hotpotqa", 1),
    ]
    assert [record["tokens"] for record in records[:4]] == [400 - 32] * 2 + [400 - 64] * 2
    assert "already complete" in run("--max-length", "400").out
    assert_refused(run("--max-length", "401"), "max_length was 400, now 401")
    folder("trec", ROW)
    assert_refused(run("--max-length", "400"), "other trec under the same name")
    assert read(out)[1] == records


def test_a_prompt_too_short_for_a_budget_has_a_record_without_a_score(duo, chat_model, folder, tmp_path):
    where, out = folder("trec", {**TREC, "context": "Short."}), tmp_path / "longbench.jsonl"
    sizes = ("--sink-size", "100", "--recent-size", "200")
    done = duo(
        *("eval", "longbench", "--model", chat_model, "--out", out, "--data", where, *sizes),
        *("--methods", f"duo={chat_model / 'pattern'}", "--budgets", "0.5"),
    )
    assert done.code == 0 and "1 without a score" in done.out and "streaming heads keep already" in done.out, done
    assert read(out)[1][0]["score"] is None


def test_the_whole_prompt_goes_through_the_method(chat_model, folder):
    task = LongBenchTask(data=folder("hotpotqa", ROW), max_length=300)
    object.__setattr__(task, "comparison", type(task.comparison)(model=str(chat_model)))
    question = task._question(Row("full", 1.0, "hotpotqa", 0))
    assert isinstance(question.tokens, np.ndarray) and len(question.tokens) + question.max_new_tokens == 300
    assert question.score("Ada") == 1.0
