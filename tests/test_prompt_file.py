"""`duo generate --prompts`: the answers of single prompts, in batches, whatever stops the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duo_jax.cli.answers import Answers
from tests.text_models import Result, assert_refused

# Of lengths that share their programs, each of which takes seconds to compile.
TEXTS = ("What is a needle?", "Is it very thin?", "A pin is thinner.", "A haystack is a stack.", "And where is it?")
NEW = ("--max-new-tokens", 8)
Duo = Callable[..., Result]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def half(model: Path) -> tuple[object, ...]:
    return "--pattern", model / "pattern", "--sparsity", 0.5


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "in.jsonl", [{"prompt": text, "id": f"q{i}", "of": i} for i, text in enumerate(TEXTS)])


@pytest.mark.full_matrix  # tests/test_lm.py compares batches with single calls.
def test_a_batch_answers_as_single_prompts_do(text_model: Path, prompts: Path, tmp_path: Path, duo: Duo) -> None:
    options = ("generate", "--model", text_model, *NEW, *half(text_model))
    out = tmp_path / "out.jsonl"
    result = duo(*options, "--prompts", prompts, "--out", out, "--batch-size", 2)
    assert result.code == 0 and result.out == f"{out}: 5 answers, 5 of them new\n"
    head, *answers = lines_of(out)
    assert head["about"]["max_new_tokens"] == 8 and set(head["contents"]) == {"prompts", "weights", "pattern"}
    assert [(line["index"], line["id"], line["of"]) for line in answers] == [(i, f"q{i}", i) for i in range(5)]
    for text, line in zip(TEXTS[:2], answers, strict=False):
        single = json.loads(duo(*options, "--prompt", text, "--json").out)
        assert (line["text"], line["tokens"]) == (single["text"], single["tokens"])
        assert line["finish_reason"] == "length"


@pytest.mark.full_matrix
def test_draws_depend_on_the_seed_and_the_place_in_the_file(
    text_model: Path, prompts: Path, tmp_path: Path, duo: Duo
) -> None:
    texts = []
    for size in (2, 3):
        options = ("--temperature", 1, "--seed", 3, "--batch-size", size)
        out = tmp_path / f"{size}.jsonl"
        assert duo("generate", "--model", text_model, *NEW, "--prompts", prompts, "--out", out, *options).code == 0
        texts.append([(line["text"], line["finish_reason"]) for line in lines_of(out)[1:]])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


@pytest.mark.full_matrix
def test_messages_are_answered_as_a_chat(chat_model: Path, tmp_path: Path, duo: Duo) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompts = written(tmp_path / "in.jsonl", [{"messages": messages}, {"prompt": "Hello"}])
    options = ("generate", "--model", chat_model, *NEW)
    assert duo(*options, "--chat", "--prompts", prompts, "--out", tmp_path / "out.jsonl").code == 0
    first, second = lines_of(tmp_path / "out.jsonl")[1:]
    assert first["tokens"] == second["tokens"]
    assert first["text"] == json.loads(duo(*options, "--chat", "--prompt", "Hello", "--json").out)["text"]


def test_a_stopped_run_is_resumed_wherever_it_was_cut(
    text_model: Path, prompts: Path, tmp_path: Path, duo: Duo, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    options = (
        "generate",
        "--model",
        text_model,
        *NEW,
        *half(text_model),
        "--prompts",
        prompts,
        "--out",
        out,
        "--batch-size",
        2,
    )

    def stopping(self: Answers, lines: list[dict[str, Any]]) -> None:
        add(self, lines)
        raise KeyboardInterrupt

    add = Answers.add
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", stopping)
        stopped = duo(*options)
    assert stopped.code == 130 and "run the same command again" in stopped.err
    assert [line["index"] for line in lines_of(out)[1:]] == [3, 0]  # The longest first.
    assert "5 answers, 3 of them new" in duo(*options).out
    whole = out.read_text(encoding="utf-8")
    assert [line["index"] for line in lines_of(out)[1:]] == [0, 1, 2, 3, 4]
    assert "0 of them new" in duo(*options).out and out.read_text(encoding="utf-8") == whole
    # A kill cut the last line off.
    out.write_text(whole[:-20], encoding="utf-8")
    assert "1 of them new" in duo(*options).out and out.read_text(encoding="utf-8") == whole


def test_a_file_of_answers_is_read_wherever_it_was_cut(tmp_path: Path) -> None:
    path, head = tmp_path / "out.jsonl", {"about": {"model": "m"}, "contents": {"prompts": "p"}}
    answers = Answers.open(path, head, 3)
    answers.begin()
    answers.add({"index": i, "text": "é", "tokens": [i], "finish_reason": "eos"} for i in range(3))
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for end in range(start, len(content) + 1):  # Inside a character too.
        path.write_bytes(content[:end])
        assert len(Answers.open(path, head, 3).lines) == content[start:end].count(b"\n")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda head: head["about"] | {"model": "n"}, "--model was 'm', now 'n'"),
        (lambda head: head["about"] | {"seed": 1}, "--seed was not given, now 1"),
    ],
)
def test_answers_of_another_run_are_refused(change: Callable[[Any], Any], word: str, tmp_path: Path) -> None:
    path, head = tmp_path / "out.jsonl", {"about": {"model": "m"}, "contents": {"prompts": "p"}}
    Answers.open(path, head, 3).begin()
    with pytest.raises(ValueError, match=word):
        Answers.open(path, head | {"about": change(head)}, 3)
    with pytest.raises(ValueError, match="other prompts"):
        Answers.open(path, head | {"contents": {"prompts": "q"}}, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n', "head of a file of answers"),
        ("some notes\n", "no file of answers"),
        ('{"about": {}, "contents": {}}\nnonsense\n{"index": 0}\n', "out.jsonl:2"),
        ('{"about": {}, "contents": {}}\n{"index": 3, "text": "", "tokens": [], "finish_reason": ""}\n', "out.jsonl:2"),
        ('{"about": {}, "contents": {}}\n{"index": 0}\n', "not an answer"),
    ],
)
def test_another_file_is_never_overwritten(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        Answers.open(path, {"about": {}, "contents": {}}, 3)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"}', '"prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', '"prompt" or "messages"'),
        ('{"prompt": "a", "id": 1.5}', "the id must be"),
        ('{"prompt": "a", "id": 7}', "the id of"),
        ('{"prompt": "a", "tokens": 1}', "'tokens', which the answer sets"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": 5}', "must be a text"),
        ('{"messages": [{"role": "user"}]}', "chat template"),
        ("[1]", "JSON object"),
        ('{"prompt": "a"', "is not JSON"),
    ],
)
def test_a_bad_row_is_refused_before_the_model_is_loaded(
    row: str, words: str, text_model: Path, tmp_path: Path, duo: Duo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": 7}\n\n' + row + "\n", encoding="utf-8")
    monkeypatch.setattr("duo_jax.cli.options.load_model", None)
    assert_refused(
        duo("generate", "--model", text_model, "--prompts", path, "--out", tmp_path / "out.jsonl"),
        f"{path}:3",
        words,
    )
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompts", "in.jsonl"), "add --out FILE"),
        (("--out", "out.jsonl"), "--prompts FILE"),
        (("--prompts", "in.jsonl", "--out", "o", "--prompt", "a"), "--prompts replaces --prompt"),
        (("--prompts", "in.jsonl", "--out", "o", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--prompts", "in.jsonl", "--out", "o", "--cache", "c"), "--cache continues one text"),
        (("--prompts", "in.jsonl", "--out", "in.jsonl"), "in.jsonl:1"),
        (("--prompts", "none.jsonl", "--out", "o"), "none.jsonl"),
        (("--prompts", "in.jsonl", "--out", "o", "--max-context", "9"), "--max-context 9"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: tuple[str, ...], words: str, text_model: Path, prompts: Path, duo: Duo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prompts.parent)
    before = prompts.read_bytes()
    assert_refused(duo("generate", "--model", text_model, *flags), words)
    assert prompts.read_bytes() == before
