"""The `duo` command as users run it: its output, and its refusals."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import duo_jax
from duo_jax import HeadPattern, published_patterns
from duo_jax.cli import _status
from duo_jax.cli.generate import _summary
from duo_jax.generation.chunks import cache_room
from tests.text_models import Result, assert_refused

DUO = Path(sys.executable).parent / "duo"
PROMPT = "What is a needle?\nIt is thin."
NEW = 8  # The same number of new tokens everywhere: one compilation serves many tests.
FIELDS = {
    "text",
    "tokens",
    "logprobs",
    "prompt_tokens",
    "new_tokens",
    "compile_seconds",
    "prefill_seconds",
    "decode_seconds",
    "kv_bytes",
    "kv_bytes_full",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
}


@pytest.fixture(scope="module")
def model(text_model: Path) -> Path:
    return text_model


def shell(*args: object, stdin: str | bytes = b"", cwd: Path | None = None) -> Result:
    """The command as a shell starts it."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([DUO, *map(str, args)], input=data, capture_output=True, cwd=cwd, timeout=120)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


# Output.


def test_the_prompt_may_come_three_ways(
    model: Path, tmp_path: Path, duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    options = ("generate", "--model", model, "--max-new-tokens", NEW)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    by_stdin = duo(*options, "-")
    assert by_stdin.code == 0, by_stdin
    assert len(by_stdin.out.removesuffix("\n")) >= NEW
    assert f"prompt {len(PROMPT)} tokens" in by_stdin.err and "KV cache" in by_stdin.err
    assert duo(*options, "--prompt", PROMPT).out == by_stdin.out
    assert duo(*options, "--prompt-file", tmp_path / "prompt.txt").out == by_stdin.out


@pytest.mark.parametrize("length, is_short", [(256, True), (4096, False)])
def test_a_cache_larger_than_full_attention_says_why(length: int, is_short: bool) -> None:
    """A streaming head's window has its whole size, however short the text is."""
    window, sizes = 320, ("prompt_tokens", "prefill_seconds", "prefill_tokens_per_second", "new_tokens")
    record = dict.fromkeys((*sizes, "decode_tokens_per_second", "compile_seconds"), 1.0)
    record |= {"kv_bytes": 1e6 * (length + window), "kv_bytes_full": 1e6 * 2 * length}
    assert ("shorter than the windows of streaming heads" in _summary(record)) is is_short


def test_the_text_is_that_of_the_library(model: Path, duo: Callable[..., Result]) -> None:
    loaded, tokenizer = duo_jax.load_model(model), duo_jax.load_tokenizer(model)
    out = duo_jax.generate(loaded, np.asarray([tokenizer.encode(PROMPT)]), max_new_tokens=NEW)
    found = json.loads(duo("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", NEW, "--json").out)
    assert found["tokens"] == np.asarray(out.tokens)[0].tolist()
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
    np.testing.assert_allclose(found["logprobs"], np.asarray(out.logprobs)[0], atol=1e-5)


def test_json_is_one_object(model: Path, duo: Callable[..., Result]) -> None:
    result = duo("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", NEW, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    assert set(found) == FIELDS
    assert found["new_tokens"] == len(found["tokens"]) == len(found["logprobs"]) == NEW
    assert found["prompt_tokens"] == len(PROMPT)
    assert all(logprob <= 0 for logprob in found["logprobs"])
    assert found["kv_bytes"] == found["kv_bytes_full"] > 0
    times = {name for name in FIELDS if name.endswith(("seconds", "second"))}
    assert all(found[name] > 0 for name in times - {"compile_seconds"})
    assert found["compile_seconds"] >= 0  # Programs that this process has compiled before take no time.
    assert len(result.out.splitlines()) == 1


def test_a_pattern_saves_memory(model: Path, duo: Callable[..., Result]) -> None:
    sizes = {"sink_size": 4, "recent_size": 16}
    flags = ("--sink-size", 4, "--recent-size", 16, "--max-new-tokens", NEW, "--json")
    options = ("generate", "--model", model, "--prompt", PROMPT * 8, "--pattern", model / "pattern", *flags)
    half, budget = (json.loads(duo(*options, *rule).out) for rule in (("--sparsity", 0.5), ("--kv-budget", 0.55)))
    # With half of the 8 heads streaming, (4 * 240 + 4 * 20) of 8 * 240 tokens are kept: 54 %.
    length = len(PROMPT) * 8 + NEW
    room = cache_room(length)
    config = duo_jax.load_model(model).config
    for rule, run in (
        ({"sparsity": 0.5}, half),
        ({"kv_budget": 0.55, "context_length": length}, budget),
    ):
        pattern = HeadPattern.load(model / "pattern", **rule, **sizes)
        assert pattern.num_retrieval == 4
        assert run["kv_bytes"] == duo_jax.KVCache.bytes_for(config, pattern, 1, room, dtype="float32")
        assert run["kv_bytes"] < 0.7 * run["kv_bytes_full"]


def test_a_pattern_of_retrieval_heads_only_changes_nothing(model: Path, duo: Callable[..., Result]) -> None:
    options = ("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", NEW)
    assert duo(*options, "--pattern", model / "pattern", "--sparsity", 0).out == duo(*options).out


def test_sampling_depends_only_on_the_seed(model: Path, duo: Callable[..., Result]) -> None:
    options = ("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", NEW, "--temperature", 2)
    first, again, other = (duo(*options, "--seed", seed).out for seed in (3, 3, 4))
    assert first == again != other


def test_one_candidate_is_greedy_whatever_the_temperature(model: Path, duo: Callable[..., Result]) -> None:
    options = ("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", NEW)
    assert duo(*options, "--temperature", 2, "--top-k", 1, "--seed", 5).out == duo(*options).out


def test_chat_wraps_the_prompt(chat_model: Path, duo: Callable[..., Result]) -> None:
    options = ("generate", "--model", chat_model, "--max-new-tokens", NEW, "--json", "--prompt")
    chat = json.loads(duo(*options, "Hi, how are", "--chat").out)
    plain = json.loads(duo(*options, "[user] Hi, how are[assistant] ").out)
    assert chat["prompt_tokens"] == len("[user] Hi, how are[assistant] ")
    assert chat["tokens"] == plain["tokens"]


@pytest.mark.parametrize("prompt", ["\x00\x07\x1b[31m", "--prompt", "- é漢😀", " "])
def test_any_characters_may_be_a_prompt(prompt: str, model: Path, duo: Callable[..., Result]) -> None:
    result = duo("generate", "--model", model, f"--prompt={prompt:<{len(PROMPT)}}", "--max-new-tokens", NEW)
    assert result.code == 0 and result.out, result


def test_help_lists_the_commands(duo: Callable[..., Result]) -> None:
    for args in ([], ["--help"], ["-h"]):
        result = duo(*args)
        assert result.code == 0 and not result.err
        assert "usage: duo COMMAND" in result.out
        assert re.search(r"^  generate +Continue a prompt", result.out, re.MULTILINE) and "  demo " in result.out


def test_help_of_a_command_lists_its_flags(duo: Callable[..., Result]) -> None:
    result = duo("generate", "--help")
    assert result.code == 0
    for flag in ("--model", "--prompt-file", "--sparsity", "--kv-budget", "--top-p", "--json"):
        assert flag in result.out


def test_version(duo: Callable[..., Result]) -> None:
    assert duo("--version") == Result(0, f"duo-jax {duo_jax.__version__}\n", "")


@pytest.mark.process
def test_folders_named_train_and_eval_do_not_disturb(model: Path, tmp_path: Path) -> None:
    for name in ("train", "eval", "duo_jax", "pallas_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"raise RuntimeError('imported {name} of the working directory')\n"
        )
    assert "  demo " in shell("--help", cwd=tmp_path).out
    # Refused by the command itself, after everything was imported.
    assert_refused(shell("generate", "--model", model, "--prompt", "", cwd=tmp_path), "a value of --prompt is empty")


def test_a_shell_pipes_a_prompt_and_an_interrupt_ends_it_with_130(model: Path) -> None:
    command = [DUO, "generate", "--model", model, "--max-new-tokens", "50000", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(PROMPT.encode())
        process.stdin.close()
        process.stdin = None
        assert process.stdout.read(1)  # The first characters are there: it is decoding.
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"duo generate: interrupted" in err and b"Traceback" not in err


def test_an_interrupt_that_becomes_another_error_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def load_extension() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("an error while initializing the extension") from None

    try:
        assert _status("duo serve", load_extension) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "the process ends"
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "\nduo serve: interrupted\n"


def test_a_closed_pipe_is_no_error(model: Path) -> None:
    command = (
        f'"{DUO}" generate --model "{model}" --prompt x --max-new-tokens 3000 | head -c 3; echo ${{PIPESTATUS[0]}}'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout[3:].strip() == "0" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


# Refusals: arguments after `generate --model MODEL`, and words that the message must contain.


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no prompt": ([], ["give the prompt once", "--prompt-file"]),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], ["give the prompt once"]),
    "prompt and stdin": (["-", "--prompt", "a"], ["give the prompt once"]),
    "empty prompt": (["--prompt", ""], ["a value of --prompt is empty: set it, or leave it out"]),
    "missing file": (["--prompt-file", "no/such.txt"], ["no/such.txt"]),
    "a folder": (["--prompt-file", "."], [". is a folder", "only regular files"]),
    "unknown pattern": (["--prompt", "a", "--pattern", "no-such"], ["no-such", *published_patterns()]),
    "sparsity 1.5": (["--prompt", "a", "--pattern", "{pattern}", "--sparsity", "1.5"], ["[0, 1]", "1.5"]),
    "sparsity nan": (
        ["--prompt", "a", "--pattern", "{pattern}", "--sparsity", "nan"],
        ["--sparsity must be a finite number, got nan"],
    ),
    "budget 2": (["--prompt", "a", "--pattern", "{pattern}", "--kv-budget", "2"], ["[0, 1]"]),
    "two rules": (["--prompt", "a", "--pattern", "{pattern}", "--sparsity", "0.5", "--threshold", "0.5"], ["give one"]),
    "sparsity without pattern": (["--prompt", "a", "--sparsity", "0.5"], ["--sparsity", "without --pattern"]),
    "sink size without pattern": (["--prompt", "a", "--sink-size", "4"], ["--sink-size", "without --pattern"]),
    "recent size 0": (
        ["--prompt", "a", "--pattern", "{pattern}", "--recent-size", "0"],
        ["--recent-size must be at least 1, got 0"],
    ),
    "pattern of another model": (
        ["--prompt", "a", "--pattern", "smollm2-135m-instruct"],
        ["30 layers x 3 KV heads", "2 x 4"],
    ),
    "no new tokens": (["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens", "got 0"]),
    "top-k, greedy": (["--prompt", "a", "--top-k", "4"], ["--top-k", "give a temperature above 0"]),
    "top-k 0": (["--prompt", "a", "--temperature", "1", "--top-k", "0"], ["0"]),
    "top-p 2": (["--prompt", "a", "--temperature", "1", "--top-p", "2"], ["2"]),
    "negative temperature": (["--prompt", "a", "--temperature", "-1"], ["--temperature", "-1", "0 takes the most"]),
    "nan temperature": (["--prompt", "a", "--temperature", "nan"], ["temperature", "nan"]),
    "chat without template": (["--prompt", "a", "--chat"], ["no chat template"]),
    "unknown flag": (["--prompt", "a", "--no-such-flag", "1"], ["--no-such-flag"]),
    "not a number": (["--prompt", "a", "--sparsity", "half"], ["half"]),
    "unknown dtype": (["--prompt", "a", "--dtype", "int4"], ["int4"]),
    "bytes that are no text": (["--prompt", "a\udcff"], ["UTF-8"]),
}


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_refused_in_a_line(
    args: list[str], words: list[str], model: Path, duo: Callable[..., Result]
) -> None:
    args = [arg.format(pattern=model / "pattern") for arg in args]
    assert_refused(duo("generate", "--model", model, *args), *words)


@pytest.mark.parametrize("args", [("--results", ""), ("--results=",), ("--results", "a", "")])
def test_an_empty_path_is_not_the_working_folder(args: tuple[str, ...], duo: Callable[..., Result]) -> None:
    assert_refused(duo("report", *args, "--out", "page.html"), "a value of --results is empty")


def test_an_empty_standard_input_is_refused(
    model: Path, duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(duo("generate", "--model", model, "-"), "prompt is empty")


@pytest.mark.process
def test_standard_input_that_is_not_utf8_is_refused(model: Path) -> None:
    assert_refused(shell("generate", "--model", model, "-", stdin=b"ab\xff\xfe"), "UTF-8")


def test_a_file_that_is_not_utf8_is_refused(model: Path, tmp_path: Path, duo: Callable[..., Result]) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    assert_refused(
        duo("generate", "--model", model, "--prompt-file", tmp_path / "latin.txt"), "latin.txt is not UTF-8 text"
    )


def test_an_unknown_model_is_refused(duo: Callable[..., Result]) -> None:
    assert_refused(duo("generate", "--model", "no-such", "--prompt", "a"), "'no-such'", "smollm2-135m-instruct")


def test_an_unknown_command_is_refused(duo: Callable[..., Result]) -> None:
    assert_refused(duo("generat"), "no command 'generat'", "generate", "duo --help")


def test_no_model_is_refused(duo: Callable[..., Result]) -> None:
    assert_refused(duo("generate", "--prompt", "a"), "--model")


@pytest.mark.parametrize("bad", ["nan", "inf", "x"])
def test_a_file_of_bad_gates_is_refused(bad: str, model: Path, tmp_path: Path, duo: Callable[..., Result]) -> None:
    shutil.copytree(model / "pattern", tmp_path / "bad")
    gates = tmp_path / "bad" / "full_attention_heads.tsv"
    rows = gates.read_text().split("\t", 1)
    gates.write_text(f"{bad}\t{rows[1]}")
    assert_refused(
        duo("generate", "--model", model, "--prompt", "a", "--pattern", gates.parent),
        "gates" if bad != "x" else "full_attention_heads.tsv",
    )


def test_a_cut_checkpoint_is_refused(model: Path, tmp_path: Path, duo: Callable[..., Result]) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 500_000)
    result = duo("generate", "--model", broken, "--prompt", "a")
    assert_refused(result, "model.safetensors is truncated", "download it again")


@pytest.mark.parametrize(
    "flags", [("--prompts", "no.jsonl", "--out", "a.jsonl"), ("--prompt-file", "no.jsonl")], ids=str
)
def test_a_file_that_is_not_there_is_named_with_the_way_out(
    flags: tuple, model: Path, tmp_path: Path, duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "no.jsonl: No such file or directory: check the path, which is relative to the working folder"
    assert_refused(duo("generate", "--model", model, *flags), words)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.process
def test_wrong_use_is_refused_by_the_shell_command_too(model: Path) -> None:
    assert_refused(shell("generate", "--model", model, "--no-such-flag", "1"), "--no-such-flag")


def test_a_traceback_is_shown_on_request(
    model: Path, duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a value of --prompt is empty"):
        duo("generate", "--model", model, "--prompt", "")
