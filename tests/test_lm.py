"""Text in, text out: `LM`, documents and chats, on a golden checkpoint whose tokens are characters."""

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import duo_jax
from duo_jax import Categorical, Greedy, RepetitionPenalty, Temperature
from duo_jax.checks import check_ids
from duo_jax.cli import doctor
from duo_jax.text.chat import Chat
from duo_jax.text.ends import Ends
from duo_jax.text.lm import LM, TextStream
from duo_jax.text.reply import Row

PROMPT = "What is a needle?"
NEW = 8
PATTERN = "llama-3-8b-instruct-gradient-1048k"


@pytest.fixture(scope="module")
def lm(text_model: Path) -> LM:
    return duo_jax.load(text_model, pattern=text_model / "pattern")


@pytest.fixture(scope="module")
def chat_lm(chat_model: Path) -> LM:
    return duo_jax.load(chat_model, pattern=chat_model / "pattern")


def test_a_call_gives_the_tokens_of_generate(lm):
    reply = lm(PROMPT, max_new_tokens=NEW)
    tokens = np.asarray([lm.tokenizer.encode(PROMPT)])
    out = duo_jax.generate(lm.model, tokens, pattern=lm.pattern, max_new_tokens=NEW)
    assert reply.tokens == np.asarray(out.tokens)[0].tolist()
    np.testing.assert_allclose(reply.logprobs, np.asarray(out.logprobs)[0], atol=1e-5)
    assert isinstance(reply, str) and reply == lm.tokenizer.decode(reply.tokens)
    assert reply.finish_reason == "length"


def test_a_batch_gives_the_replies_of_single_calls(lm):
    prompts = [PROMPT, "a", "A longer prompt than a."]
    assert lm(prompts, max_new_tokens=NEW) == [lm(prompt, max_new_tokens=NEW) for prompt in prompts]


def test_a_stream_is_the_reply_in_pieces(lm):
    running = lm.stream(PROMPT, max_new_tokens=NEW)
    pieces = list(running)
    assert "".join(pieces) == running.reply == lm(PROMPT, max_new_tokens=NEW)
    assert len(pieces) > NEW / 2


@pytest.mark.parametrize(
    "sampled", [False, pytest.param(True, marks=pytest.mark.full_matrix)], ids=["greedy", "sampled"]
)
def test_one_program_gives_the_replies_of_a_stream(lm, sampled):
    sampler = Categorical((RepetitionPenalty(1.3), Temperature(1.5))) if sampled else Greedy()
    prompts = [lm.encode(PROMPT), lm.encode("Another prompt")]
    free = lm.complete(prompts, max_new_tokens=NEW, sampler=sampler, seed=1)
    options = {"max_new_tokens": NEW, "sampler": sampler, "seed": 1, "eos_ids": (free[0].tokens[2], free[1].tokens[-1])}
    replies, streamed = lm.complete(prompts, **options), TextStream(lm, prompts, **options).finish()
    assert replies == streamed and replies[0].finish_reason == "eos"
    for reply, other in zip(replies, streamed, strict=True):
        assert (reply.tokens, reply.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(reply.logprobs, other.logprobs, atol=1e-5)


def test_an_eos_id_ends_a_reply_and_several_may(lm):
    whole = lm(PROMPT, max_new_tokens=NEW)
    ended = lm(PROMPT, max_new_tokens=NEW, eos_ids=(96, whole.tokens[3]))
    first = whole.tokens.index(whole.tokens[3])
    assert ended.tokens == whole.tokens[: first + 1]
    assert ended.finish_reason == "eos"


def test_a_stop_string_ends_each_row_on_its_own_and_is_not_shown(lm):
    prompts = [PROMPT, "Another prompt"]
    whole = lm(prompts, max_new_tokens=NEW)
    stop = whole[0][2:4]
    assert stop not in whole[1], "the test needs replies that differ"
    stopped = lm(prompts, max_new_tokens=NEW, stop=[stop])
    assert stopped[0] == whole[0][: whole[0].index(stop)]
    assert (stopped[0].finish_reason, stopped[1].finish_reason) == ("stop", "length")
    assert stopped[1] == whole[1]
    running = lm.stream(PROMPT, max_new_tokens=NEW, stop=[stop])
    assert "".join(running) == stopped[0]


def test_a_stop_string_that_never_comes_changes_nothing(lm):
    reply = lm(PROMPT, max_new_tokens=NEW, stop=["\x7f\x7f"])
    assert reply == lm(PROMPT, max_new_tokens=NEW)
    # Its first character is held back while it could begin, and shown when it did not.
    assert "".join(lm.stream(PROMPT, max_new_tokens=NEW, stop=[reply[-1] + "\x7f"])) == reply


def test_seeds_decide_random_replies(lm):
    def draw(seed: int) -> str:
        return lm(PROMPT, max_new_tokens=NEW, sampler=Categorical((Temperature(2.0),)), seed=seed)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_document_answers_as_the_whole_text_would(lm):
    text = "The haystack has many straws. " * 4
    with lm.document(text, room=64) as document:
        first = document.ask("Where?", max_new_tokens=NEW)
        second = document.ask("How many?", max_new_tokens=NEW)
        assert document.ask("Where?", max_new_tokens=NEW) == first
        # A question may be left before it is answered.
        left = document.stream("Where?", max_new_tokens=NEW)
        said = next(left)
        assert document.ask("How many?", max_new_tokens=NEW) == second
        with pytest.raises(ValueError, match="its cache was used for a later question"):
            next(left)
        assert left.reply == said
    assert first == lm(f"{text}\n\nWhere?\n", max_new_tokens=NEW)
    with pytest.raises(ValueError, match="document was closed"):
        document.ask("Where?")


def test_a_document_uses_the_chat_template(chat_lm):
    with chat_lm.document("Some straws.", room=128) as document:
        answer = document.ask("Where?", max_new_tokens=NEW)
    assert answer == chat_lm.chat([{"role": "user", "content": "Some straws.\n\nWhere?"}], max_new_tokens=NEW)


def test_a_chat_computes_only_what_is_new_and_answers_the_same(chat_lm):
    chat = Chat(chat_lm, max_length=256)
    first = _say(chat, "Hello.", max_new_tokens=NEW)
    before = chat.num_tokens
    second = _say(chat, "And then?", max_new_tokens=NEW)
    assert before < chat.num_tokens < 256
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert second == chat_lm.chat(messages, max_new_tokens=NEW)
    assert chat.messages == [*messages, {"role": "assistant", "content": second}]


def test_a_reply_that_is_left_early_stays_in_the_conversation(chat_lm):
    chat = Chat(chat_lm, max_length=256)
    running = chat.say("Hello.", max_new_tokens=NEW)
    said = next(running) + next(running)
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    again = _say(chat, "Go on.", max_new_tokens=NEW)
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Go on."},
    ]
    assert again == chat_lm.chat(messages, max_new_tokens=NEW)


def test_a_full_chat_refuses_and_a_reset_empties_it(chat_lm):
    chat = Chat(chat_lm, max_length=48)
    _say(chat, "Hello there, you.", max_new_tokens=100)
    assert chat.num_tokens == 48
    with pytest.raises(ValueError, match="it is full; reset it"):
        chat.say("More?")
    chat.reset()
    assert (chat.num_tokens, chat.messages) == (0, [])
    assert _say(chat, "Hi.", max_new_tokens=4)


def _say(chat: Chat, text: str, **options) -> str:
    running = chat.say(text, **options)
    for _ in running:
        pass
    return running.reply


def test_a_character_split_over_tokens_is_shown_whole(smollm2_gguf):
    tokenizer = duo_jax.load_tokenizer(smollm2_gguf)
    text = "naïve 🧵 straw"
    shown = Row(tokenizer)
    pieces = [shown.add(token) for token in tokenizer.encode(text)]
    assert "".join([*pieces, shown.rest()]) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def byte_fallback(*decoder) -> PreTrainedTokenizerFast:
    """A token for each byte, as SentencePiece vocabularies have, and some with leading spaces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁the", "é", "�"]
    ids = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(list(decoder))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġthe", "Ã©", "<s>"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {
    "llama-2": byte_fallback(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ),
    "metaspace": byte_fallback(decoders.ByteFallback(), decoders.Metaspace()),
    "byte-level": byte_level(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_tokens(name, data):
    """Any tokens: characters of several bytes, bytes that are not text, special tokens."""
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text("aé漢🧵 \n", max_size=8), label="text")
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=8)
    tokens = tokenizer.encode(text, add_special_tokens=False)[: data.draw(st.integers(0, 24))] + data.draw(some)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    shown = Row(tokenizer)
    pieces = [shown.add(token) for token in tokens]
    before = "".join(pieces)
    assert whole.startswith(before) and shown.reply == whole
    assert before + shown.rest() == whole == shown.reply


def test_a_stop_string_of_a_byte_token_ends_the_text_at_once():
    tokenizer = TOKENIZERS["llama-2"]
    shown = Row(tokenizer, Ends(strings=("\n",)))
    assert shown.add(tokenizer.convert_tokens_to_ids("a")) == "a"
    assert shown.add(tokenizer.convert_tokens_to_ids("<0x0A>")) == "" and shown.stopped
    assert shown.reply == "a"


def test_detokenization_takes_linear_time(monkeypatch):
    tokenizer, decoded = TOKENIZERS["byte-level"], []
    whole = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **how: decoded.append(len(ids)) or whole(self, ids, **how)
    )
    shown = Row(tokenizer, Ends(strings=("no such text",)))
    for _ in range(300):
        shown.add(70)
    assert max(decoded) <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm(""), "prompt is empty"),
        (lambda lm: lm([]), "no prompts"),
        (lambda lm: lm(PROMPT, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda lm: lm(PROMPT, stop=[""]), "none of them empty"),
        (lambda lm: lm(PROMPT, sampler=Categorical()), "pass key="),
        (lambda lm: check_ids(lm.model.config, "</s>"), "eos_ids must be a tuple of token ids"),
        (lambda lm: check_ids(lm.model.config, ("</s>",)), "eos_ids must be an integer"),
        (lambda lm: lm(PROMPT, stop=["a</s>"]), "never appears"),
        (lambda lm: lm("a\ud800"), "half of a surrogate pair"),
        (lambda lm: lm.document("\udc00"), "half of a surrogate pair"),
        (lambda lm: lm(PROMPT, eos_ids=(97,)), r"token ids must be in \[0, 97\)"),
        (lambda lm: lm.chat([{"role": "user", "content": "Hi"}]), "no chat template"),
        (lambda lm: Chat(lm), "no chat template"),
        (lambda lm: lm.document(""), "document is empty"),
        (lambda lm: lm.document("abc", room=1), "room must be at least 2"),
        (lambda lm: lm.document("abc" * 100, room=100, max_length=200), "shorten it, or raise max_length"),
        (lambda lm: lm.document("abc", room=40).ask("x" * 100), "larger room="),
        (lambda lm: lm.document("abc", room=40).ask(""), "question is empty"),
    ],
)
def test_wrong_use_is_refused(lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


@pytest.mark.parametrize("options", [{"pattern": None}, {"kv_dtype": "int4"}], ids=["pattern", "kv_dtype"])
def test_a_pattern_or_data_type_for_one_call_is_refused(lm, chat_lm, options):
    """They belong to the model that was loaded: a call would ignore them."""
    chat = [{"role": "user", "content": "Hi"}]
    for call in (lm, lm.stream, lm.document("abc").ask, lambda _, **options: chat_lm.chat(chat, **options)):
        with pytest.raises(TypeError, match=f"loaded with its {next(iter(options))}: give them to duo_jax.load"):
            call(PROMPT, **options)


def test_rules_without_a_named_pattern_are_refused(text_model):
    with pytest.raises(ValueError, match="choose heads from a named pattern"):
        duo_jax.load(text_model, sparsity=0.5)


def test_a_pattern_of_another_model_is_refused(text_model):
    with pytest.raises(ValueError, match="another model"):
        duo_jax.load(text_model, pattern="smollm2-135m-instruct", sparsity=0.5)


# The commands.


def test_chat_talks_saves_and_forgets(chat_model, duo, monkeypatch, tmp_path):
    lines = ["Hello.", f"/save {tmp_path}/said.json", "/save /dev/null/x", "/reset", "/what", "", "/exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    result = duo("chat", "--model", chat_model, "--max-new-tokens", 4, "--max-length", 64)
    assert result.code == 0, result
    said = json.loads((tmp_path / "said.json").read_text())
    assert said[0] == {"role": "user", "content": "Hello."} and said[1]["role"] == "assistant"
    assert "(forgotten)" in result.out and "[0/64 tokens" in result.out
    assert "is not a folder" in result.err and "no command /what; /help lists them" in result.err


def test_chat_reports_a_full_cache(chat_model, duo, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there.\nMore?\n"))
    result = duo("chat", "--model", chat_model, "--max-length", 40)
    assert result.code == 0, result
    assert "[40/40 tokens" in result.out and "it is full; /reset forgets" in result.err


@pytest.mark.process
def test_ctrl_c_stops_a_reply_and_not_the_chat(chat_model):
    command = [Path(sys.executable).parent / "duo", "chat", "--model", chat_model]
    options = ["--max-length", "20000", "--max-new-tokens", "19000"]
    with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as chat:
        chat.stdin.write("Hello.\n")
        chat.stdin.flush()
        shown = ""
        while len(shown.partition("> ")[2]) < 3:  # The reply has begun.
            shown += chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        while "(stopped)" not in shown:
            shown += chat.stdout.read(1)
        chat.stdin.write("/exit\n")
        chat.stdin.close()
        shown += chat.stdout.read()
    assert chat.returncode == 0
    assert shown.count("/20000 tokens") == 2  # It asked again.


@pytest.mark.parametrize("flags", [["--max-length", "0"], ["--max-new-tokens", "0"], ["--top-k", "3"]])
def test_chat_refuses_wrong_flags(chat_model, duo, flags):
    result = duo("chat", "--model", chat_model, *flags)
    assert result.code == 2 and "Traceback" not in result.err


def test_chat_refuses_a_model_without_a_template(text_model, duo):
    result = duo("chat", "--model", text_model)
    assert result.code == 2 and "no chat template" in result.err


def test_inspect_counts_bytes_exactly(text_model, duo, tmp_path):
    flags = ("--pattern", text_model / "pattern", "--lengths", 100, 1000, "--png", tmp_path / "heads.png")
    found = json.loads(duo("inspect", "--model", text_model, *flags, "--json").out)
    pattern = duo_jax.HeadPattern.load(text_model / "pattern")
    assert found["heads"]["is_retrieval"] == pattern.is_retrieval.astype(int).tolist()
    config = duo_jax.load_model(text_model).config
    for row in found["kv_bytes"]:
        assert row["pattern"] == duo_jax.KVCache.init(config, pattern, 1, row["length"]).nbytes
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_prints_a_table(duo):
    out = duo(
        "inspect", "--model", "llama-3-8b", "--pattern", "llama-3-8b-instruct-gradient-1048k", "--sparsity", 0.5
    ).out
    assert "128 retrieval (█), 128 streaming (·)" in out
    assert "137.4 GB" in out and "68.7 GB" in out and "50%" in out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--model", "no-such"], "no-such"),
        (["--model", "llama-3-8b", "--dtype", "int3"], "--dtype"),
        (["--model", "llama-3-8b", "--lengths", "0"], "--lengths"),
        (["--model", "llama-3-8b", "--png", "x.png"], "give --pattern"),
        (["--model", "llama-3-8b", "--pattern", "smollm2-135m-instruct"], "another model"),
        (
            ["--model", "smollm2-135m", "--pattern", "smollm2-135m-instruct", "--png", "/dev/null/x.png"],
            "is not a folder",
        ),
    ],
)
def test_inspect_refuses(duo, flags, word):
    result = duo("inspect", *flags)
    assert result.code == 2 and word in result.err and "Traceback" not in result.err


def test_a_pattern_of_another_model_is_refused_before_weights_are_read(chat_model, duo, monkeypatch):
    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("duo_jax.text.lm.load_model", read)
    monkeypatch.setattr("duo_jax.cli.options.load_model", read)
    with pytest.raises(ValueError, match="made for another model"):
        duo_jax.load(chat_model, pattern="smollm2-135m-instruct")
    result = duo("chat", "--model", chat_model, "--pattern", "smollm2-135m-instruct")
    assert result.code == 2 and "made for another model" in result.err


def test_doctor_tries_every_backend(duo):
    found = json.loads(duo("doctor", "--json").out)
    rest = dict(found["backends"])
    for name, why_not in (
        ("mosaic", "bfloat16 or float16"),
        ("jax_triton", "runs only on GPUs of compute capability 8.0"),
        ("cudnn", "has no kernel for decode"),
    ):
        decode = rest.pop(name)["decode"]
        assert decode["is_right"] is None and why_not in decode["why_not"]
    assert rest.keys() == {"reference", "xla", "triton"}
    assert all(tried["is_right"] for backend in rest.values() for tried in backend.values())
    assert found["default_backend"] == "xla" and found["packages"]["jax"]


def test_doctor_shows_each_line_as_it_is_known(duo, monkeypatch):
    monkeypatch.setattr(doctor, "OPERATIONS", ("decode",))
    lines = []
    doctor.examine(lines.append)
    assert lines[lines.index("decode") + 1] == "  reference   right, error 0.0e+00"
    assert any(line.startswith("  xla         right, error ") for line in lines)
    shown = duo("doctor").out.splitlines()
    assert shown[: len(lines) - len(doctor.BACKENDS)] == lines[: -len(doctor.BACKENDS)] and len(shown) == len(lines)


def test_doctor_reports_a_reference_that_fails(monkeypatch, capsys):
    def broken(request, sizes):
        raise RuntimeError("no memory\nand more lines")

    monkeypatch.setattr(doctor.cases, "make", broken)
    monkeypatch.setattr(doctor, "OPERATIONS", ("decode",))
    with pytest.raises(ValueError, match="a backend fails"):
        doctor.Doctor().run()
    assert capsys.readouterr().out.count("FAILED: the reference: no memory\n") == len(doctor.BACKENDS)


@pytest.mark.full_matrix
def test_a_repetition_penalty_counts_what_is_cached(chat_lm):
    sampler = Greedy((RepetitionPenalty(1.5),))
    chat = Chat(chat_lm, max_length=256)
    first = _say(chat, "Hello.", max_new_tokens=NEW, sampler=sampler)
    second = _say(chat, "And then?", max_new_tokens=NEW, sampler=sampler)
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert second == chat_lm.chat(messages, max_new_tokens=NEW, sampler=sampler)
    with chat_lm.document("Some straws.", room=128) as document:
        answer = document.ask("Where?", max_new_tokens=NEW, sampler=sampler)
    whole = [{"role": "user", "content": "Some straws.\n\nWhere?"}]
    assert answer == chat_lm.chat(whole, max_new_tokens=NEW, sampler=sampler)


def test_a_chat_continues_after_a_refused_turn(chat_lm):
    chat = Chat(chat_lm, max_length=256)
    with pytest.raises(ValueError, match="none of them empty"):
        chat.say("Hello.", stop=[""])
    again = _say(chat, "Hello.", max_new_tokens=NEW)
    assert again == chat_lm.chat([{"role": "user", "content": "Hello."}], max_new_tokens=NEW)


def test_a_refusal_of_the_template_is_reported_without_a_traceback(chat_model, duo, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "strict")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role here') }}")
    result = duo("chat", "--model", folder, "--system", "Be brief.")
    assert result.code == 2 and "no system role here" in result.err and "Traceback" not in result.err


def test_prompts_of_nearby_lengths_share_programs_in_the_command(text_model, duo):
    flags = ("generate", "--model", text_model, "--max-new-tokens", 3)
    found = {json.loads(duo(*flags, "--prompt", "x" * size, "--json").out)["kv_bytes"] for size in range(40, 44)}
    assert len(found) == 1
