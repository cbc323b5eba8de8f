"""RULER: examples follow the paper's rules, fill their length, and are scored as it says; bad files are refused."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from duo_eval.runner.record import read
from duo_eval.runner.run import Comparison
from duo_eval.tasks.lm_eval.files import literal
from duo_eval.tasks.prompt import known_tokens, prompt
from duo_eval.tasks.ruler import qa
from duo_eval.tasks.ruler.command import Entry, RulerTask
from duo_eval.tasks.ruler.kind import Material, fitted
from duo_eval.tasks.ruler.tasks import TASKS, score
from duo_train.data.haystack import load_haystack

from tests.text_models import assert_refused

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The {animal} of house {house} is called {name}.",
                    "qas": [
                        {"question": f"What is the {animal} called?", "answers": [{"text": name}, {"text": f"{name}!"}]}
                    ],
                }
                for animal, name in (("cat", "Tom"), ("dog", "Rex"), ("owl", "Eule"))
            ]
        }
        for house in range(20)
    ]
}
HOTPOT = [{"question": "Who?", "answer": "Ada", "context": [["One", ["It was Ada. ", "Yes."]], ["Two", ["Not so."]]]}]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    path.write_text(json.dumps(SQUAD))
    words = tuple(load_haystack(max_chars=20_000).split())
    return lambda length: Material(words, qa.load(path, "squad"), length)


def made(material, name, length=4000, sample=0):
    kind = TASKS[name]
    return fitted(kind, (0, name, length, sample), material(length), lambda example: len(example.text + example.answer))


@pytest.mark.parametrize("name", TASKS)
def test_an_example_fills_its_length_and_its_right_answer_scores_one(material, name):
    kind, length = TASKS[name], 4000
    example, size = made(material, name)
    seed = Random(repr((0, name, length, 0, 0)))
    assert len(example.text + example.answer) + kind.max_new_tokens <= length
    larger = kind.make(seed, size + 1, material(length))
    if larger is None:
        assert name.startswith("qa") and size == 60, "all paragraphs are in it"
    else:
        assert len(larger.text + larger.answer) + kind.max_new_tokens > length
    assert all(output in example.text for output in example.outputs[:1] if kind.match == "any" or output)
    assert score(kind, example, f" {', '.join(example.outputs).upper()}.\x00") == 1.0
    assert score(kind, example, "no idea") == 0.0
    half = score(kind, example, example.outputs[0])
    assert half == (1.0 if kind.match == "any" else 1 / len(example.outputs))
    assert made(material, name) == (example, size)
    assert made(material, name, sample=1)[0].text != example.text


@pytest.mark.parametrize("name", TASKS)
def test_the_question_begins_where_it_does_in_kvpresss_data(material, name):
    begin = {
        "niah": r"What (is|are all) the special magic",
        "vt": "Question: Find all variables that are assigned the value",
        "cwe": r"Question: What are the 10 most common words",
        "fwe": r"Question: Do not provide any explanation",
        "qa": r"Answer the question based on the",
    }[name.partition("_")[0]]
    example, _ = made(material, name)
    assert example.text == example.context + example.question and example.context.endswith("\n")
    assert re.match(begin, example.question) and "\n" not in example.question.partition("Question: ")[0].strip()
    last = [found.start() for found in re.finditer(begin, example.text)][-1]
    assert last == len(example.context)


def test_a_later_question_leaves_the_prompt_as_it_is(chat_model):
    """What is known first depends on the text alone; the question, the end of its message and the answer follow."""
    comparison, options = Comparison(str(chat_model)), {"haystack": "pydoc", "haystack_chars": 5000}
    job = Entry("full", 1.0, "fwe", 900, 0)
    inside, later = (RulerTask(comparison, question_later=later, **options)._question(job) for later in (False, True))
    assert inside.later == 0 and inside.tokens.tolist() == later.tokens.tolist()
    decode = comparison.tokenizer.decode
    known, asked = later.tokens[: -later.later], later.tokens[-later.later :]
    assert decode(known).startswith("[user] Read the following") and "Question" not in decode(known)
    assert re.fullmatch(r"Question: Do not .*\?\[assistant\] Answer: .*are:", decode(asked))
    # A token that the end of the text shares with the question is not known.
    tokenizer = comparison.tokenizer
    assert known_tokens(tokenizer, "some text", prompt(tokenizer, "some more", use_chat=True), use_chat=True) == len(
        prompt(tokenizer, "some ", use_chat=True)
    ) - len("[assistant] ")


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_the_values_asked_for_are_in_the_text_under_their_keys(material, name):
    kind, (example, _) = TASKS[name], made(material, name)
    pairs = re.findall(r"magic \w+ for (\S+) is: ([\w-]+)\.", example.text)
    expected = kind.num_queries * kind.num_values
    assert len(example.outputs) == expected
    for output in example.outputs:
        (key,) = {key for key, value in pairs if value == output}
        assert key in example.text.rpartition("\n")[2] and key in example.answer
        assert sum(found == key for found, _ in pairs) == kind.num_values
    if kind.haystack != "needle":
        assert len(pairs) == kind.num_keys * kind.num_values
    assert example.answer.endswith(" is" if expected == 1 else " are")
    assert ("What are all" in example.text) == (expected > 1)


def test_a_chain_leads_through_its_variables(material):
    example, size = made(material, "vt")
    before, _, asked = example.text.partition("\n\n\n")
    (start,) = re.findall(r"VAR (\w+) = (\d+)", asked)
    found = [start[0]]
    # In the order of the text: an assignment comes after the one that it refers to.
    for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", asked):
        assert old == found[-1]
        found.append(new)
    assert tuple(found) == example.outputs and len(found) == 5
    assert asked.count("The grass is green") == size and f"the value {start[1]}" in asked
    assert start[0] not in before and start[1] in example.answer


@pytest.mark.parametrize(("length", "common", "other"), [(4000, 6, 1), (30_000, 30, 3)])
def test_common_words_are_the_ten_most_common(material, length, common, other):
    example, size = made(material, "cwe", length)
    listed = example.text.rpartition("Below is")[2].partition("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed))
    assert {word for word, count in counts.items() if count == common} == set(example.outputs)
    assert set(counts.values()) == {common, other} and len(counts) == size and len(example.outputs) == 10


def test_frequent_words_are_the_three_most_frequent_but_for_the_noise(material):
    example, _ = made(material, "fwe")
    context = example.text.partition("coded words. ")[2].partition("\nQuestion")[0]
    (noise, _), *top = Counter(context.split()).most_common(5)
    assert noise == "..." and tuple(word for word, _ in top[:3]) == example.outputs
    assert len({count for _, count in top}) == len(top), "no ties"


def test_a_question_has_its_paragraph_then_those_of_its_article(material):
    data = material(0).questions
    assert len(data.questions) == len(data.paragraphs) == 60
    for size in (1, 3, 4):
        example = TASKS["qa_squad"].make(Random(1), size, material(0))
        assert example.text.count("Document ") == size
        houses = Counter(re.findall(r"house (\d+)", example.text))
        assert houses.most_common(1)[0][1] == min(size, 3) and len(houses) == (2 if size == 4 else 1)


def test_files_of_both_formats_are_read(tmp_path):
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(HOTPOT))
    data = qa.load(path, "hotpot")
    assert data.paragraphs == ("One\nIt was Ada. Yes.", "Two\nNot so.") and data.questions[0].needed == (0, 1)
    unanswerable = {"data": [{"paragraphs": [{"context": "A.", "qas": [{"question": "B?", "answers": []}]}]}]}
    path.write_text(json.dumps(unanswerable))
    with pytest.raises(ValueError, match="no question with an answer"):
        qa.load(path, "squad")


@pytest.mark.parametrize(
    ("style", "content", "message"),
    [
        ("squad", '{"data": [\n1,\n}', ":3 is not JSON"),
        ("squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\] has no 'context'"),
        ("squad", "[]", "has no 'data'"),
        ("hotpot", '{"data": []}', "must be a list"),
        ("hotpot", '[{"context": [["One"]]}]', r"\[0\].context must hold"),
        ("hotpot", '[{"context": [], "question": 1}]', r"\[0\] has no 'question'"),
    ],
)
def test_a_file_of_another_format_is_refused_with_the_place(tmp_path, style, content, message):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        qa.load(path, style)


def test_a_length_without_room_and_another_lm_eval_are_refused(material, tmp_path):
    with pytest.raises(ValueError, match=r"takes \d+ tokens.*length of 300"):
        made(material, "niah_single_1", 300)
    path = tmp_path / "utils.py"
    path.write_text("TEMPLATE = OTHER + 'text'\n")
    with pytest.raises(ValueError, match="has no TEMPLATE"):
        literal(path, "TEMPLATE")


@pytest.mark.full_matrix
def test_ruler_asks_every_method_resumes_and_refuses(duo, chat_model, tmp_path):
    squad, out, model = tmp_path / "dev.json", tmp_path / "ruler.jsonl", tmp_path / "model"
    squad.write_text(json.dumps(SQUAD))
    shutil.copytree(chat_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    common = ("--model", model, "--out", out, "--haystack", "pydoc", "--haystack-chars", "5000")
    sizes = ("--sink-size", "4", "--recent-size", "16", "--lengths", "900")
    run = lambda *args: duo("eval", "ruler", *common, *sizes, *args)  # noqa: E731
    methods = ("--methods", "full", f"duo={chat_model / 'pattern'}")
    tasks = ("--tasks", "fwe", "qa_squad", "--squad", squad)
    assert_refused(run(*methods, "--tasks", "chess"), "unknown task chess", "niah_single_1")
    assert_refused(run(*methods, "--tasks", "qa_hotpot"), "--hotpot")
    assert_refused(run(*methods, *tasks, "--haystack-chars", "0"), "--haystack-chars must be at least 1, got 0")
    assert_refused(run(*methods, *tasks, "--lengths", "100000"), "trained for")
    assert_refused(run(*methods, "--tasks", "qa_squad", "--squad", tmp_path / "none.json"), "none.json")
    assert_refused(run(*methods, "--tasks", "cwe", "--lengths", "310"), "the smallest example takes")
    assert not out.exists()
    done = run(*methods, *tasks, "--samples", "1")
    assert done.code == 0 and "900 tokens" in done.out, done
    _, records = read(out)
    assert [(record["job"]["task"], record["job"]["budget"]) for record in records] == [
        (task, budget) for task in ("fwe", "qa_squad") for budget in (1.0, 0.5)
    ]
    assert all(record["tokens"] <= 900 and 0 <= record["score"] <= 1 for record in records)
    assert "already complete" in run(*methods, *tasks, "--samples", "1").out
    squad.write_text(json.dumps(SQUAD).replace("Rex", "Max"))
    assert_refused(run(*methods, *tasks), "other qa_squad under the same name")
    assert_refused(run(*methods, *tasks[:2], "--seed", "1"), "seed was 0, now 1")
    assert_refused(run(*methods, *tasks[:2], "--question-later"), "question_later was None, now True")
    assert read(out)[1] == records


def test_no_text_of_lm_eval_is_in_this_project():
    folder = Path(__file__).parent.parent / "eval"
    text = "".join(path.read_text() for path in folder.rglob("*.py"))
    for phrase in ("hidden within the following text", "The grass is green", "coded text and track", "given documents"):
        assert phrase not in text
