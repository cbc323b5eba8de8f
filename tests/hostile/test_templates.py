"""Chat templates, messages, documents, ends of replies: what templates and users write, and the tokens of it."""

import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from duo_eval.tasks.prompt import prompt
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

import duo_jax
from duo_jax.checkpoint.open import load_tokenizer
from duo_jax.cli.prompt import PromptOptions
from duo_jax.text import renderer, template
from duo_jax.text.ends import Ends, eos_ids_of, stop_ends
from duo_jax.text.reply import MOST_OPEN, Row
from duo_jax.text.template import DocumentFrame, checked_messages, encode_chat, render
from duo_jax.text.tokens import encode, encode_inside, special_tokens
from tests.hostile.chat_tokenizers import CHATML, MAKERS, byte_level, tokenizer_of
from tests.shapes import TINY
from tests.text_models import assert_refused


def user(text: object) -> list[dict]:
    return [{"role": "user", "content": text}]


def with_template(text: str) -> PreTrainedTokenizerFast:
    tokenizer = MAKERS["prepend"]()
    tokenizer.chat_template = text
    return tokenizer


TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
TEMPLATES = {
    "security": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "type": ("{{ 1 + 'x' }}", "TypeError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "its own": ("{{ raise_exception('roles must alternate') }}", "messages: roles must alternate"),
    "memory": ("{{ messages[0].content * 10000000000 }}", "memory"),
    "output": ("{% for _ in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxx' }}{% endfor %}", "more than"),
    "surrogate": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    "drops the message": ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "leaves out message 0, 'user'"),
}


@pytest.mark.parametrize(("text", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_whatever_a_template_does_is_a_refusal(text, words):
    with pytest.raises(ValueError, match="chat template") as error:
        render(with_template(text), user("Hi"))
    assert words in str(error.value) and len(str(error.value)) < 400


def test_a_template_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 0.3)
    rounds = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"more than 0\.3 seconds"):
        render(with_template(rounds), user("Hi"))
    monkeypatch.undo()
    assert render(tokenizer_of("prepend"), user("Hi")) == "<s>[INST] Hi [/INST]"


def test_a_template_that_changes_a_message_is_not_one_that_drops_it():
    assert render(with_template("{{ messages[0].content | upper }}"), user("Hi")) == "HI"


@pytest.mark.parametrize("name", MAKERS)
def test_templates_are_rendered_as_transformers_renders_them(name):
    tokenizer = tokenizer_of(name)
    messages = [*user("Hi é\u2028 \x00"), {"role": "assistant", "content": " Ho "}, *user("x" * 300)]
    for start in (True, False):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=start)
        assert render(tokenizer, messages, add_generation_prompt=start) == expected


def test_a_template_gets_the_tools():
    tokenizer, tools = with_template("{{ tools[0].function.name }}: {{ messages[0].content }}"), [TOOL]
    assert render(tokenizer, user("Hi"), tools=tools) == "look: Hi"
    assert render(tokenizer, user("Hi"), tools=tools) == tokenizer.apply_chat_template(
        user("Hi"), tools=tools, tokenize=False
    )


def test_after_a_fork_each_process_has_its_own_renderer():
    code = """if True:
        import os, sys
        from duo_jax.text import renderer
        ask = lambda: renderer.render("{{ messages[0].content }}", [{"content": str(os.getpid())}], {})
        renderer.start()
        parent = renderer._RENDERER._process.pid
        child = os.fork()
        for _ in range(20):
            assert ask() == str(os.getpid())
        is_own = renderer._RENDERER._process.pid == parent
        if not child:
            renderer._RENDERER.close()
            os._exit(is_own)
        print(is_own, os.waitpid(child, 0)[1])
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True 0\n", "")


def test_a_refused_template_ends_the_command_with_one_line(chat_model, duo, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in chat_model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    assert_refused(duo("generate", "--model", folder, "--prompt", "Hi", "--chat"), "SecurityError", "chat template")
    assert_refused(duo("chat", "--model", chat_model, "--system", "a\ud800"), "UTF-8")
    assert_refused(duo("chat", "--model", chat_model, "--max-length", 0), "--max-length must be at least 1, got 0")


MESSAGES = {
    "text": ("Hi", "must be a list"),
    "object": ({"role": "user", "content": "Hi"}, "must be a list"),
    "none": (None, "must be a list"),
    "empty": ([], "not empty"),
    "numbers": ([1], "message 0 must be an object"),
    "no role": ([{"content": "Hi"}], "the role of message 0 must be a string, got None"),
    "a role of 1": ([{"role": 1, "content": "Hi"}], "the role of message 0"),
    "no content": ([*user("a"), {"role": "user"}], "the content of message 1 must be a string, got None"),
    "bytes": (user(b"Hi"), "the content of message 0 must be a string"),
    "an image": (user([{"type": "image", "url": "x"}]), "part of type 'image'"),
    "a part of text": (user(["Hi"]), "part of type 'str'"),
    "a part without text": (user([{"type": "text"}]), "a text part of message 0"),
    "surrogate": (user("a\ud83d"), "half of a surrogate pair"),
    "surrogate in a part": (user([{"type": "text", "text": "\udc00"}]), "half of a surrogate pair"),
    "surrogate elsewhere": ([{"role": "user", "content": "a", "name": "\ud800"}], "half of a surrogate pair"),
    "no JSON": ([{"role": "user", "content": "a", "name": {1, 2}}], "strings, numbers, lists"),
}


@pytest.mark.parametrize(("messages", "words"), MESSAGES.values(), ids=MESSAGES)
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(ValueError, match=r"messages|message 0|message 1|list|part") as error:
        render(tokenizer_of("prepend"), checked_messages(messages))
    assert words in str(error.value) and len(str(error.value)) < 300


def test_deeply_nested_messages_are_refused():
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested"):
        encode_chat(tokenizer_of("prepend"), [{"role": "user", "content": "a", "name": deep}])


def test_text_parts_are_joined():
    parts = user([{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}])
    assert encode_chat(tokenizer_of("byte-level"), parts) == encode_chat(
        tokenizer_of("byte-level"), user("Hello world")
    )


# Any text, with what spells a special token, or almost, and what templates and merges care about.
TEXTS = st.lists(
    st.sampled_from(["the", "The ", " ", "  ", "\n", "\n\n", "a", "ab", "é", "漢", "[", "INST", "x", ".", "<", "|im_"]),
    min_size=1,
    max_size=8,
).map("".join)
SPELLED = {"byte-level": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]}


def rendered_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15, deadline=None)
@given(first=TEXTS, second=TEXTS)
def test_without_special_tokens_a_chat_has_the_tokens_of_the_rendered_text(name, first, second):
    tokenizer = tokenizer_of(name)
    messages = [*user(first), {"role": "assistant", "content": second}, *user(second)]
    assert encode_chat(tokenizer, messages) == rendered_ids(tokenizer, messages)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15, deadline=None)
@given(before=TEXTS, after=TEXTS, place=st.integers(0, 2))
def test_special_tokens_in_a_message_are_text(name, before, after, place):
    tokenizer = tokenizer_of(name)
    written = SPELLED.get(name, ["</s>", "<s>", "<unk>"])[place]
    specials = set(special_tokens(tokenizer).values())
    plain = [index for index in encode_chat(tokenizer, user(before + "@" + after)) if index in specials]
    found = encode_chat(tokenizer, user(before + written + after))
    assert [index for index in found if index in specials] == plain  # the template's own, in their places
    decoded = tokenizer.decode([index for index in found if index not in specials])
    assert tokenizer.decode(found, skip_special_tokens=True) == decoded
    assert decoded.strip() == decoded_rendering(tokenizer, before + written + after).strip()
    assert len(encode_chat(tokenizer, user(before + written + after), parse_special=True)) < len(found)
    # The text is split as text: with another spelling in place of the special token, its neighbours keep their tokens.
    literal = encode(tokenizer, before + written + after, parse_special=False)
    assert not specials & set(literal)
    assert literal == tokenizer.encode(before + written + after, add_special_tokens=False, split_special_tokens=True)


def decoded_rendering(tokenizer: PreTrainedTokenizerFast, content: str) -> str:
    """The rendered text without the special tokens that the template wrote."""
    text = tokenizer.apply_chat_template(user("\ue000"), tokenize=False, add_generation_prompt=True)
    for token in special_tokens(tokenizer):
        text = text.replace(token, "")
    return text.replace("\ue000", content)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("use_chat", [True, False])
def test_a_question_of_an_evaluation_has_the_tokens_of_one_text(name, use_chat):
    tokenizer, text, answer = tokenizer_of(name), "The cache. What does it hold?", "It holds"
    before, after = template.split(tokenizer) if use_chat else ("", "\n")
    whole = tokenizer.encode(f"{before}{text}{after}{answer}", add_special_tokens=not use_chat)
    assert prompt(tokenizer, text, answer, use_chat=use_chat) == whole
    rest = "\nRemember this. The key is 7.\n"
    assert tokenizer.encode(f"{text}{rest}") == tokenizer.encode(text) + encode_inside(tokenizer, rest)


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10, deadline=None)
@given(end=TEXTS, question=TEXTS)
def test_a_document_is_the_beginning_of_the_whole(name, is_chat, end, question):
    # A question may continue the last word of a plain text: `duo generate --cache` refuses it.
    assume(is_chat or not (end[-1].isalnum() and question[0].isalnum()))
    tokenizer, document = tokenizer_of(name), f"The cache. {end}"
    frame = DocumentFrame.chat(tokenizer) if is_chat else DocumentFrame(tokenizer)
    text = f"{document}{frame.between}{question}"
    whole = frame.whole(document, question)
    assert whole == (rendered_ids(tokenizer, user(text)) if is_chat else tokenizer.encode(text))
    known = frame.document(document)
    assert known[0] == whole[0] and whole[: len(known)] == known
    assert frame.question(document, known, question) == whole[len(known) :]


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=5, deadline=None)
@given(end=TEXTS, question=TEXTS)
def test_after_a_long_document_only_its_end_is_tokenized(name, is_chat, end, question):
    tokenizer, document = tokenizer_of(name), f"{'The cache holds keys. ' * 9}{end}"
    frame = DocumentFrame.chat(tokenizer) if is_chat else DocumentFrame(tokenizer)
    with mock.patch.multiple(template, _TAIL=100, _SAME=8):
        known, whole = frame.document(document), frame.whole(document, question)
        rest = frame.question(document, known, question)
        assert frame.is_document(document, known)
        other = DocumentFrame(tokenizer) if is_chat else DocumentFrame.chat(tokenizer)
        assert not frame.is_document(document, other.document(document))
    assert rest == (whole[len(known) :] if whole[: len(known)] == known else None)


def test_a_question_that_changes_the_end_of_a_prefilled_text_is_refused():
    tokenizer, text = tokenizer_of("byte-level"), "The a"
    known = np.asarray(DocumentFrame(tokenizer).document(text), np.int32)
    asked = PromptOptions().encode_question(tokenizer, " What?", known, text)
    assert [*known, *asked] == tokenizer.encode("The a What?")
    with pytest.raises(ValueError, match="begin the question with another character"):
        PromptOptions().encode_question(tokenizer, "the", known, text)
    long = "The cache holds keys. " * 9
    known = np.asarray(DocumentFrame.chat(tokenizer).document(long), np.int32)
    with pytest.raises(ValueError, match=r"other flags.*with --chat"):
        PromptOptions().encode_question(tokenizer, "What?", known, long)


def test_a_long_document_is_tokenized_once_and_its_end_with_every_question(monkeypatch, chat_model):
    lm, encoded = duo_jax.load(chat_model), []
    whole = template.encode_marked
    monkeypatch.setattr(template, "encode_marked", lambda own, text: encoded.append(len(text)) or whole(own, text))
    monkeypatch.setattr(template, "_TAIL", 100)
    text = "The cache holds keys. " * 20
    with lm.document(text, room=64) as document:
        for question in ("What?", "Which?"):
            document.ask(question, max_new_tokens=2)
        assert sum(size > 200 for size in encoded) == 1 and len(encoded) > 20


def test_a_document_with_special_tokens_is_known_by_all_its_tokens():
    tokenizer, text = tokenizer_of("byte-level"), f"{'The cache. ' * 300}<|im_end|>{' The cache.' * 300}"
    literal, control = (DocumentFrame(tokenizer, parse_special=parse) for parse in (False, True))
    known = literal.document(text)
    assert literal.is_document(text, known) and not control.is_document(text, known)


def test_a_cache_without_text_is_refused_for_a_chat():
    with pytest.raises(ValueError, match=r"this cache has no text.*run duo prefill --chat again"):
        PromptOptions(chat=True).encode_question(tokenizer_of("byte-level"), "What?", np.ones(3, np.int32))


# Ends.


def test_the_ends_of_model_tokenizer_and_template_are_one_set():
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = replace(TINY, vocab_size=49152, eos_ids=(7,))
    assert eos_ids_of(config, tokenizer) == (7, end, turn)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert eos_ids_of(config, tokenizer) == (7, end)


def test_a_template_is_rendered_once_for_its_end(monkeypatch):
    tokenizer, rendered = with_template(f"{CHATML}{{# once #}}"), []
    whole = renderer.render
    monkeypatch.setattr(renderer, "render", lambda *args: rendered.append(args) or whole(*args))
    assert len({template.end_of_turn(tokenizer) for _ in range(3)}) == len(rendered) == 1


def test_special_tokens_are_listed_once_until_there_are_more():
    tokenizer = MAKERS["metaspace-first"]()
    specials = special_tokens(tokenizer)
    assert list(specials) == ["<unk>", "</s>", "<s>"] and special_tokens(tokenizer) is specials
    tokenizer.add_tokens(["<|more|>"], special_tokens=True)
    tokenizer.eos_token = "a"
    assert list(special_tokens(tokenizer)) == ["<|more|>", "<unk>", "</s>", "<s>", "a"]
    assert special_tokens(tokenizer)["<|more|>"] not in encode(tokenizer, "x<|more|>", parse_special=False)


def test_an_empty_special_token_is_none():
    tokenizer = tokenizer_of("byte-level")
    expected = encode(tokenizer, "Hi you", parse_special=False)
    tokenizer.bos_token = ""  # As some tokenizer_config.json have it.
    assert "" not in special_tokens(tokenizer)
    assert encode(tokenizer, "Hi you", parse_special=False) == expected


def test_a_stop_string_that_is_a_special_token_is_a_token():
    tokenizer = tokenizer_of("byte-level")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ends(tokenizer, 49152, (7,), ["<|im_end|>", "\n"]) == Ends((7,), (turn,), ("\n",))
    row = Row(tokenizer, Ends((7,), (turn,)))
    tokens = [*tokenizer.encode("Hi"), turn]
    assert "".join(row.add(token) for token in tokens) == "Hi"
    assert row.reply.finish_reason == "stop" and row.reply.tokens == tokens and row.reply == "Hi"


@pytest.mark.parametrize(
    ("stop", "words"),
    [("abc", "list of strings"), ([""], "none of them empty"), ([1], "list of strings"), (5, "list of strings"),
     (["x<|im_end|>"], "never appears"), (["\ud800"], "surrogate")],
)  # fmt: skip
def test_stop_strings_that_cannot_stop_are_refused(stop, words):
    with pytest.raises(ValueError, match=words):
        stop_ends(tokenizer_of("byte-level"), 49152, (), stop)


# Detokenization.


@pytest.mark.parametrize("token", ["<0xE2>", "<0x41>", "</s>", "a", "▁", "<0xC3>"])
def test_the_work_for_a_token_does_not_grow_with_the_reply(token, monkeypatch):
    tokenizer, decoded = tokenizer_of("prepend"), []
    whole = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda own, ids, **how: decoded.append(len(ids)) or whole(own, ids, **how)
    )
    row, index = Row(tokenizer, Ends(strings=("User:",))), tokenizer.convert_tokens_to_ids(token)
    pieces = [row.add(index) for _ in range(10 * MOST_OPEN)]
    assert max(decoded, default=0) <= 2 * MOST_OPEN + 2 and sum(decoded) <= 10 * MOST_OPEN * 4 * MOST_OPEN
    pieces.append(row.rest())
    assert "".join(pieces) == row.reply == whole(tokenizer, row.reply.tokens, skip_special_tokens=True)


@settings(max_examples=15, deadline=None)
@given(text=st.text("é漢🧵a ", min_size=30, max_size=120))
def test_long_runs_of_byte_tokens_are_decoded_as_one(text):
    tokenizer = tokenizer_of("prepend")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    row = Row(tokenizer)
    pieces = [row.add(token) for token in tokens]
    assert "".join([*pieces, row.rest()]) == row.reply == tokenizer.decode(tokens) == text


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), end=st.sampled_from([None, "eos", "stop"]))
def test_a_whole_reply_has_the_text_of_its_tokens_one_by_one(name, data, end):
    tokenizer = tokenizer_of(name)
    text = st.text("é漢🧵ab T\n", max_size=40).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    tokens = data.draw(text | st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    eos, stop = list(special_tokens(tokenizer).values())[:2]
    ends = Ends((eos,), (stop,))
    tokens = [token for token in tokens if token not in ends.ids] + {"eos": [eos], "stop": [stop]}.get(end, [])
    logprobs = [float(place) for place in range(len(tokens))]
    rows = Row(tokenizer, ends), Row(tokenizer, ends)
    rows[0].add_all(tokens, logprobs)
    for token, logprob in zip(tokens, logprobs, strict=True):
        rows[1].add(token, logprob)
    whole, single = (row.reply for row in rows)
    assert (whole, whole.__dict__) == (single, single.__dict__) and whole.finish_reason == (end or "length")


def test_a_tokenizer_that_panics_is_refused(chat_model):
    tokenizer = load_tokenizer(chat_model)
    tokenizer.backend_tokenizer.decoder = decoders.Strip(" ", 1, 1)
    row = Row(tokenizer)
    with pytest.raises(ValueError, match="the tokenizer cannot decode its tokens"):
        for token in tokenizer.encode("the a", add_special_tokens=False):
            row.add(token)
