"""`Chat` beyond its turns: answering again, taking back, dropping the oldest turns; and the commands of `duo chat`."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import duo_jax
from duo_jax import Categorical, Greedy, RepetitionPenalty, Temperature, TopK, TopP
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.open import open_source
from duo_jax.cli.chat import _CONTROLS, COMMANDS, ChatCommand
from duo_jax.cli.lines import Lines
from duo_jax.cli.options import ChatSamplingOptions
from duo_jax.cli.terminal import MOST_HISTORY, Commands, Terminal, history_path, open_history
from duo_jax.cli.timings import show_status
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.text.chat import Chat
from duo_jax.text.lm import LM, TextStream
from tests.hostile.gguf_bytes import File, metadata

NEW = 6
LENGTH = 256  # of all caches here, which then share programs
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def lm(chat_model: Path) -> LM:
    return duo_jax.load(chat_model, pattern=chat_model / "pattern")


def say(chat: Chat, text: str | None, **options) -> str:
    """The answer to a message, or to the last one again."""
    options = {"max_new_tokens": NEW, **options}
    running = chat.retry(**options) if text is None else chat.say(text, **options)
    assert "".join(running) == running.reply
    return str(running.reply)


def turn(text: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def cold(lm: LM, messages: list[dict[str, str]]) -> str:
    """The answer of a chat that computes all messages at once."""
    chat = Chat(lm, max_length=LENGTH)
    chat.restore(messages[:-1])
    return say(chat, messages[-1]["content"])


def test_a_retry_computes_the_last_turn_only_and_answers_the_same(lm, monkeypatch):
    chat, sizes = Chat(lm, max_length=LENGTH), []

    class Counted(TextStream):
        def __init__(self, lm, prompts, **options):
            sizes.append(len(prompts[0]))
            super().__init__(lm, prompts, **options)

    monkeypatch.setattr("duo_jax.text.chat.TextStream", Counted)
    first, second = say(chat, "Hi."), say(chat, "And then?")
    before = chat.num_tokens
    for _ in range(2):
        assert say(chat, None) == second and chat.num_tokens == before
        assert chat.messages == [*turn("Hi.", first), *turn("And then?", second)]
    assert sizes == [len("[user] Hi.[assistant] "), *[len("[user] And then?[assistant] ")] * 3]


def test_turns_of_all_sizes_share_programs(lm):
    chat, phases = Chat(lm, max_length=LENGTH), []
    for text in ("?", "Hello there, you.", "x" * 60):
        say(chat, text, watch=phases.append)
    assert "compile" not in phases[1:] and phases.count("prefill") == 3


def test_what_was_taken_back_leaves_no_trace(lm):
    chat = Chat(lm, max_length=LENGTH)
    first, _ = say(chat, "Hi."), say(chat, "And then?")
    after_first = len("[user] Hi.[assistant] ") + NEW
    assert chat.undo() == "And then?"
    assert chat.messages == turn("Hi.", first) and chat.num_tokens == after_first
    reply = say(chat, "What else?")
    assert reply == cold(lm, [*turn("Hi.", first), *turn("What else?", "")[:1]])
    assert [chat.undo(), chat.undo()] == ["What else?", "Hi."]
    assert (chat.num_tokens, chat.messages) == (0, [])
    for wrong in (chat.undo, chat.retry):
        with pytest.raises(ValueError, match="no message yet"):
            wrong()
    assert say(chat, "Hi.") == first


def test_replies_are_sampled_as_the_model_says_with_a_key_each(lm, chat_model, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "sampled")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 0, "eos_token_id": None}))
    random = duo_jax.load(folder, pattern=folder / "pattern")
    assert random.sampling.sampler() == Categorical((Temperature(1.0),))

    def talk(seed: int) -> list[str]:
        chat = Chat(random, max_length=LENGTH, seed=seed)
        return [say(chat, "Hello."), say(chat, None), say(chat, None)]

    replies = talk(seed=1)
    assert len(set(replies)) == 3 and talk(seed=1) == replies and talk(seed=2) != replies
    greedy = cold(lm, [{"role": "user", "content": "Hello."}])
    assert say(Chat(random, max_length=LENGTH), "Hello.", sampler=Greedy()) == greedy


def test_the_oldest_turns_make_room_and_the_system_message_stays(lm):
    chat = Chat(lm, max_length=LENGTH, system="Be brief.")
    texts = [f"{word:.<25}" for word in ("One", "Two", "Three", "Four")]
    replies = [say(chat, text) for text in texts]
    with pytest.raises(ValueError, match="it is full"):
        say(chat, "5" * 40)
    assert chat.room("5" * 40) < 1
    assert chat.drop_oldest("5" * 40) == 6
    kept = [{"role": "system", "content": "Be brief."}, *turn(texts[3], replies[3])]
    assert chat.messages == kept
    reply = say(chat, "5" * 40)
    assert reply == cold(lm, [*kept, {"role": "user", "content": "5" * 40}])
    assert chat.num_tokens <= LENGTH // 2 + NEW
    # Nothing more is dropped where half of the cache is enough, or to answer again.
    assert chat.drop_oldest() == 0 and say(chat, None) == reply
    # All but the newest message, which itself must fit.
    assert chat.drop_oldest("6" * 90) == 4 and chat.messages == kept[:1]
    say(chat, "6" * 90)
    before = chat.messages
    with pytest.raises(ValueError, match="the cache has room for 256"):
        chat.drop_oldest("7" * LENGTH)
    assert chat.messages == before


def test_a_conversation_is_continued_in_another_chat(lm):
    old = Chat(lm, max_length=LENGTH, system="Be brief.")
    say(old, "Hello.")
    new = Chat(lm, max_length=LENGTH)
    say(new, "Something else.")
    new.restore(old.messages)
    assert (new.num_tokens, new.messages, new.system) == (0, old.messages, "Be brief.")
    assert say(new, "And then?") == say(old, "And then?")
    new.restore([])
    assert (new.messages, new.system) == ([], None)
    new.reset("Be kind.")
    assert new.messages == [{"role": "system", "content": "Be kind."}]
    new.reset("")
    assert new.messages == []


def test_an_interrupted_prompt_leaves_the_conversation_as_it_was(lm):
    chat = Chat(lm, max_length=LENGTH)
    first = say(chat, "Hello.")

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    for ask in (lambda: chat.say("And then?", progress=interrupt), lambda: chat.retry(progress=interrupt)):
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert (chat.num_tokens, chat.messages) == (0, turn("Hello.", first))
    reply = say(chat, "And then?")
    assert reply == cold(lm, [*turn("Hello.", first), {"role": "user", "content": "And then?"}])
    assert say(chat, None) == reply


def test_used_bytes_grow_to_all_bytes(lm):
    chat = Chat(lm, max_length=LENGTH)
    assert chat.nbytes_used == 0
    say(chat, "Hello.")
    half = chat.nbytes_used
    say(chat, "?", max_new_tokens=LENGTH)
    assert chat.num_tokens == LENGTH and 0 < half < chat.nbytes_used <= chat.nbytes


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({}, SamplingSettings()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingSettings()),  # transformers samples only with do_sample
        ({"do_sample": True}, SamplingSettings(1.0, 50)),
        ({"do_sample": True, "temperature": None, "top_k": None}, SamplingSettings(1.0, 50)),
        (SAMPLING, SamplingSettings(0.7, 20, 0.8, repetition_penalty=1.05)),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.05}, SamplingSettings(1.0, min_p=0.05)),
        ({"do_sample": True, "top_k": -1, "suppress_tokens": []}, SamplingSettings(1.0)),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingSettings(repetition_penalty=1.1)),
        ({"do_sample": True, "temperature": 0.0}, SamplingSettings()),
    ],
)
def test_generation_settings_are_those_of_transformers(values, settings):
    found = SamplingSettings.from_hf({"eos_token_id": 2, "transformers_version": "5.17.0", **values})
    assert found == settings and found.sampler()
    assert SamplingSettings.from_hf(found.to_hf()) == settings


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"do_sample": 1}, "'do_sample' must be true or false, got 1"),
        ({"do_sample": True, "temperature": "warm"}, "'temperature' must be a number"),
        ({"do_sample": True, "temperature": -1}, "'temperature' must be in"),
        ({"do_sample": True, "top_k": 2.5}, "'top_k' must be an integer"),
        ({"do_sample": True, "top_p": 1.5}, "'top_p' must be in"),
        ({"repetition_penalty": 0}, "'repetition_penalty' must be in"),
    ],
)
def test_wrong_generation_settings_are_refused_with_the_file(chat_model, tmp_path, duo, values, word, monkeypatch):
    folder = shutil.copytree(chat_model, tmp_path / "wrong")
    (folder / "generation_config.json").write_text(json.dumps(values))
    monkeypatch.setattr("duo_jax.text.lm.load_model", None)  # Before the weights are read.
    with pytest.raises(ValueError, match=f"generation_config.json: {word}"):
        duo_jax.load(folder)
    result = duo("chat", "--model", folder, "--temperature", 0.5)
    assert result.code == 2 and f"generation_config.json: {word}" in result.err


def test_generation_settings_of_a_gguf_file(tmp_path):
    keys = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "penalty_repeat": 1.0, "penalty_last_n": 64, "mirostat": 0}
    assert GgufFile(_gguf(tmp_path, keys)).sampling == SamplingSettings(0.5, 20, 0.75)
    assert GgufFile(_gguf(tmp_path, {"penalty_repeat": 1.5})).sampling == SamplingSettings(repetition_penalty=1.5)
    assert GgufFile(_gguf(tmp_path, {})).sampling == SamplingSettings()
    with pytest.raises(ValueError, match=r"model.gguf: 'temperature' must be a number, got 'hot'"):
        GgufFile(_gguf(tmp_path, {"temp": "hot"})).sampling  # noqa: B018
    with pytest.warns(UserWarning, match="mirostat is not supported"):
        GgufFile(_gguf(tmp_path, {"mirostat": 2})).sampling  # noqa: B018


def _gguf(folder: Path, keys: dict) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(File(metadata() | {f"general.sampling.{key}": value for key, value in keys.items()}).content())
    return path


def test_settings_that_are_not_supported_are_named():
    with pytest.warns(UserWarning, match="num_beams, typical_p is not supported and is left out"):
        SamplingSettings.from_hf({"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 0})


@pytest.mark.parametrize(
    ("flags", "sampler"),
    [
        ({}, Categorical((RepetitionPenalty(1.05), Temperature(0.7), TopK(20), TopP(0.8)))),
        ({"top_k": 5}, Categorical((RepetitionPenalty(1.05), Temperature(0.7), TopK(5), TopP(0.8)))),
        ({"temperature": 1.5}, Categorical((RepetitionPenalty(1.05), Temperature(1.5), TopK(20), TopP(0.8)))),
        ({"temperature": 0.0}, Greedy((RepetitionPenalty(1.05),))),
    ],
)
def test_flags_override_the_models_settings(flags, sampler):
    assert ChatSamplingOptions(**flags).settings(SamplingSettings.from_hf(SAMPLING)).sampler() == sampler


def test_a_saved_model_keeps_its_settings(chat_model, tmp_path, duo):
    folder = shutil.copytree(chat_model, tmp_path / "sampled")
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    assert duo("quantize", "--model", folder, "--weight-dtype", "int8", "--out", tmp_path / "int8").code == 0
    assert open_source(tmp_path / "int8").sampling == SamplingSettings.from_hf(SAMPLING)


# The command, line by line.


@pytest.fixture
def talk(chat_model, duo, monkeypatch):
    def run(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        options = ("--pattern", chat_model / "pattern", "--max-new-tokens", 4, "--max-length", LENGTH)
        result = duo("chat", "--model", chat_model, *options, *flags)
        assert result.code == 0 and "Traceback" not in result.err, result
        return result

    return run


def test_each_reply_is_followed_by_its_speed_and_the_cache(talk):
    result = talk("Hello.")
    assert "sampling: the most likely token" in result.out and "[0/256 tokens" in result.out
    assert "(4 tokens at " in result.err and "KV cache: 29 of 256 tokens, " in result.err
    assert "cut at --max-new-tokens 4" in result.err


def test_a_conversation_is_saved_loaded_answered_again_and_taken_back(talk, tmp_path):
    path = tmp_path / "saved.json"
    result = talk("Hello.", f"/save {path}", "/undo", "/retry", f"/load {path}", "/retry", "Bye.", f"/save {path}")
    assert "(taken back)" in result.out and f"(loaded 2 messages from {path})" in result.out
    assert "there is no message yet" in result.err and "--temperature 0.7 samples others" in result.err
    saved = json.loads(path.read_text())
    assert [message["content"] for message in saved if message["role"] == "user"] == ["Hello.", "Bye."]
    assert saved[1]["content"] and len(saved) == 4


def test_a_system_message_starts_over(talk, tmp_path):
    path = tmp_path / "saved.json"
    result = talk("Hello.", "/system", "/system Be brief.", "Hi.", "/system", "/help", f"/save {path}", "/system none")
    assert result.out.count("(system message: Be brief.)") == 2 and result.out.count("(system message: none)") == 2
    assert all(command.usage in result.out for command in COMMANDS.values())
    assert [message["content"] for message in json.loads(path.read_text())][:2] == ["Be brief.", "Hi."]


def test_a_file_comes_before_the_next_message_only(talk, tmp_path):
    notes, path = tmp_path / "notes.txt", tmp_path / "saved.json"
    notes.write_text("The key is\r\nunder the mat.")
    result = talk(f"/file {notes}", "Where?", "And?", f"/file {notes}", "/file", "Thanks.", f"/save {path}")
    assert f"({notes}, 25 tokens, comes before your next message)" in result.out and f"[+{notes}] > " in result.out
    saved = [message["content"] for message in json.loads(path.read_text()) if message["role"] == "user"]
    assert saved == ["The key is\nunder the mat.\n\nWhere?", "And?", "Thanks."]


def test_a_line_that_begins_with_a_space_is_a_message(talk, tmp_path):
    path = tmp_path / "saved.json"
    talk(" /exit is how to leave", f"/save {path}", "/exit", "never")
    assert json.loads(path.read_text())[0]["content"] == "/exit is how to leave"


def test_a_full_cache_drops_the_oldest_turns_if_it_may(talk, tmp_path):
    path, lines = tmp_path / "saved.json", [f"Message number {number}. {'x' * 40}" for number in range(5)]
    refused = talk(*lines)
    assert refused.err.count("it is full") == 2 and "--when-full drop drops its oldest turns" in refused.err
    dropped = talk(*lines, f"/save {path}", flags=("--when-full", "drop"))
    assert "it is full" not in dropped.err and "dropped the oldest 6 of 6 messages" in dropped.err
    assert json.loads(path.read_text())[-2]["content"] == lines[-1]
    # A message that fits with no other is refused, and the conversation goes on.
    result = talk(lines[0], "x" * LENGTH, "Bye.", flags=("--when-full", "drop"))
    assert result.err.count("shorten the message, which is too long by itself") == 1
    assert result.err.count(" 4 tokens at ") + result.err.count("(4 tokens at ") == 2


# The command in a terminal.


class Typist(Lines):
    """Types lines and answers every question in the same way."""

    keys = "any"

    def __init__(self, lines, answer=True):
        self.lines, self.answer, self.questions, self.prompts = iter(lines), answer, [], []

    def read(self, prompt, default=""):
        self.prompts.append(prompt + default)
        return next(self.lines, None)

    def confirm(self, question):
        self.questions.append(question)
        return self.answer


@pytest.mark.parametrize("answer", [True, False])
def test_a_full_cache_asks_whether_to_drop_the_oldest_turns(talk, monkeypatch, answer):
    typist = Typist([f"Message number {number}. {'x' * 40}" for number in range(4)] + ["/undo"], answer)
    monkeypatch.setattr(ChatCommand, "_lines", lambda self: typist)
    result = talk()
    assert len(typist.questions) == 1 and "has no room for a reply. Drop the oldest turns?" in typist.questions[0]
    assert ("dropped the oldest 6 of 6 messages" in result.err) == answer
    assert ("is full; /reset forgets" in result.err) == (not answer)
    # What was taken back is offered to be edited.
    assert typist.prompts[0] == "> " and typist.prompts[-1].startswith(f"> Message number {3 if answer else 2}.")


def test_what_a_model_writes_does_not_control_the_terminal():
    assert "a\x1b[2Jb\tc\n\x9b\r\x7fü".translate(_CONTROLS) == "a�[2Jb\tc\n���ü"


def test_a_status_line_removes_itself_and_no_text(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for status in ("", "compiling", "", ""):
        show_status(status)
    assert capsys.readouterr().err == "\r\x1b[Kcompiling\r\x1b[K"


@contextlib.contextmanager
def typed(*keys, **options):
    """A terminal in which these keys are pressed."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("".join(keys))
        yield Terminal({}, **options)


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "duo-jax" / "chat_history"


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("Hello.\r", ["Hello."]),
        ("a\\\rb\r", ["a\nb"]),
        ("a\x1b\rb\r", ["a\nb"]),
        ("a\x1b\nb\n", ["a\nb"]),
        ("\x1b[200~a\nb\n\x1b[201~c\r", ["a\nb\nc"]),
        ("Hallo\x01\x05\x7f\x7fp.\r", ["Halp."]),
        ("wrong\x03right\r", ["right"]),
        ("\x03a\r", ["a"]),
        ("a\x1b[31mred\r", ["ared"]),
    ],
)
def test_lines_are_edited(keys, lines):
    with typed(keys, "\x04") as terminal:
        assert [terminal.read("> ") for _ in lines] == lines
        assert terminal.read("> ") is None


def test_commands_and_their_paths_are_completed(tmp_path):
    (tmp_path / "conversation.json").touch()
    completer = Commands({"/exit": False, "/save": True, "/system": False})

    def completed(text: str) -> list[str]:
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + one.start_position] + one.text for one in found]

    assert completed("/") == ["/exit", "/save", "/system"] and completed("/s") == ["/save", "/system"]
    assert completed("not /ex") == completed("") == completed(f"/system {tmp_path}/conv") == []
    assert completed(f"/save {tmp_path}/conv") == [f"/save {tmp_path}/conversation.json"]


@pytest.mark.parametrize(("key", "answer"), [("y", True), ("n", False), ("\x03", False)])
def test_a_question_is_answered_by_a_key(key, answer):
    with typed(key) as terminal:
        assert terminal.confirm("Drop?") is answer


def test_a_text_that_was_taken_back_is_edited():
    with typed("!\r") as terminal:
        assert terminal.read("> ", "Hello") == "Hello!"


def test_the_history_is_kept_for_the_next_chat(state):
    with typed("secret\r", history=False) as terminal:
        terminal.read("> ")
    assert not state.exists()
    with typed("first\r", "second\\\rline\r") as terminal:
        assert [terminal.read("> ") for _ in range(2)] == ["first", "second\nline"]
    assert state.stat().st_mode & 0o777 == 0o600
    assert list(open_history(state).load_history_strings()) == ["second\nline", "first"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "inside a file", "read-only", "bytes", "no home"])
def test_a_history_that_cannot_be_used_is_left_alone(state, kind, monkeypatch):
    parent = state.parent
    parent.parent.mkdir()
    if kind == "inside a file":
        parent.touch()
    else:
        parent.mkdir()
    if kind == "folder":
        state.mkdir()
    elif kind == "pipe":
        os.mkfifo(state)
    elif kind == "read-only":
        state.touch(0o400)
    elif kind == "bytes":
        state.write_bytes(b"\xff\xfe\n+\x00\xff\n")
    elif kind == "no home":
        monkeypatch.setenv("XDG_STATE_HOME", "relative")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
        assert history_path() is None
    with typed("Hello.\r", "there\r") as terminal:
        assert [terminal.read("> ") for _ in range(2)] == ["Hello.", "there"]


def test_a_long_history_is_cut_to_its_newer_half(state):
    state.parent.mkdir(parents=True)
    state.write_text("".join(f"\n# 2026-01-01\n+{number:0100}\n" for number in range(MOST_HISTORY // 100)))
    newest = next(iter(open_history(state).load_history_strings()))
    assert newest == f"{MOST_HISTORY // 100 - 1:0100}"
    assert MOST_HISTORY // 3 < state.stat().st_size <= MOST_HISTORY // 2
    assert all(len(entry) == 100 for entry in open_history(state).load_history_strings())


@pytest.mark.process
def test_a_chat_in_a_terminal(chat_model):
    """Waits for each thing that a user would see before typing on."""
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "JAX_PLATFORMS": "cpu"}
    flags = ["--model", chat_model, "--max-new-tokens", "12", "--max-length", "152"]
    command = [Path(sys.executable).parent / "duo", "chat", *flags]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = ""

        def wait(text: str, seconds: float = 180) -> None:
            nonlocal shown
            end = time.monotonic() + seconds
            while text not in shown:
                assert time.monotonic() < end and select.select([controller], [], [], seconds)[0], shown
                shown += os.read(controller, 4096).decode(errors="replace")
            shown = shown.partition(text)[2]

        wait("/help lists the commands")
        for message in ("Hello.", "Once more.", "And more."):
            os.write(controller, f"{message}\r".encode())
            if message == "Hello.":
                wait("compiling")
            wait("KV cache: ")
        os.write(controller, b"Is there more?\r")
        wait("Drop the oldest turns?")
        os.write(controller, b"y")
        wait("dropped the oldest 4 of 6 messages")
        wait("KV cache: ")
        wait("\x1b[?2004h")  # It reads again: before, the terminal would keep the end of input to itself.
        os.write(controller, b"\x04")
        assert process.wait(60) == 0
    os.close(controller)
