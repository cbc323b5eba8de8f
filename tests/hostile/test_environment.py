"""The command's surroundings: streams that are closed, full or of another encoding, no home, no device."""

import contextlib
import io
import os
import sys
from pathlib import Path

import jax
import pytest

from duo_jax.cli import _status
from duo_jax.sizes import group_available
from pallas_kernels.user_cache import cache_folder
from tests.text_models import assert_refused

PRESET = ("inspect", "--model", "llama-3-8b")


def in_one_line(text):
    return len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [("--version",), ("--help",), PRESET, ("inspect", "--help")])
def test_a_full_output_is_reported(args, duo, monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        done = duo(*args)
    assert done.code == 2 and "standard output cannot be written to: No space left" in done.err
    assert in_one_line(done.err)


def test_a_closed_output_is_refused_before_the_work(duo, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    done = duo(*PRESET)
    assert done.code == 2 and "standard output is closed" in done.err and in_one_line(done.err)


def test_a_closed_error_output_changes_nothing(duo, monkeypatch):
    expected = duo(*PRESET).out
    monkeypatch.setattr(sys, "stderr", None)
    assert duo(*PRESET).out == expected
    sys.stderr.close()


def test_a_closed_input_is_an_empty_one(duo, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(duo("generate", "--model", "none", "-"), "the prompt is empty")
    sys.stdin.close()


def test_an_encoding_without_a_character_is_named(duo, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    done = duo(*PRESET, "--pattern", "llama-3-8b-instruct-gradient-1048k")
    assert done.code == 2 and "ascii has no '\\u2588': set PYTHONIOENCODING=utf-8" in done.err and in_one_line(done.err)


@pytest.mark.parametrize("args", [("a\udcff",), ("chat", "--system", "\ud83d"), ("plot", "gates", "\udc80")])
def test_arguments_that_are_no_text_are_refused(args, duo):
    done = duo(*args)
    assert_refused(done, "is not UTF-8 text", repr(args[-1])[1:-1])
    assert in_one_line(done.err)


def test_without_a_home_folder_there_is_no_cache(duo, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("DUO_JAX_CACHE", raising=False)
    assert duo(*PRESET).code == 0
    with pytest.raises(FileNotFoundError, match="set HOME, or DUO_JAX_CACHE"):
        cache_folder()
    monkeypatch.setenv("HOME", "")
    assert_refused(duo("inspect", "--model", "~nobody-of-this-name/model"), "no model '~nobody-of-this-name/model'")


@pytest.mark.parametrize("message", ["", "Unable to initialize backend 'cuda': no GPU\nmore"])
def test_a_platform_that_is_not_there_is_named(message, monkeypatch, capsys):
    # jax raises an AssertionError without a message for some platforms, from wherever a device is first used.
    def devices():
        raise RuntimeError(message) if message else AssertionError

    def work():
        raise AssertionError

    with pytest.raises(AssertionError):
        _status("duo x", work)
    monkeypatch.setattr(jax, "devices", devices)
    assert _status("duo x", work) == 2
    err = capsys.readouterr().err
    assert in_one_line(err) and err.startswith("duo x: jax finds no device of JAX_PLATFORMS=") and message[:20] in err


def test_errors_of_files_are_not_blamed_on_the_output(capsys):
    def work():
        raise OSError(28, os.strerror(28), "r.jsonl")

    assert _status("duo x", work) == 2
    assert capsys.readouterr().err == "duo x: r.jsonl: No space left on device\n"


def test_a_name_that_is_too_long_is_cut(duo):
    result = duo("inspect", "--model", "x" * 5000)
    assert_refused(result, "File name too long", "xxx")
    assert len(result.err) < 300


@pytest.mark.parametrize(
    ("version", "names"),
    [(2, ("memory.max", "memory.current")), (1, ("memory.limit_in_bytes", "memory.usage_in_bytes"))],
)
def test_the_memory_of_a_container_is_that_of_its_control_groups(tmp_path, version, names):
    own, root = tmp_path / "own", tmp_path / "cgroup" / ("memory" if version == 1 else "")
    own.write_text("4:memory:/jobs/1\n" if version == 1 else "0::/jobs/1\n")
    assert group_available(tmp_path / "cgroup", own) is None
    for folder, limit, used, cached in (("jobs/1", "900", "500", 100), ("jobs", "600", "400", 0), ("", "max", "1", 0)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / names[0]).write_text(f"{limit}\n")
        (root / folder / names[1]).write_text(f"{used}\n")
        (root / folder / "memory.stat").write_text(f"anon 7\n{'total_' * (version == 1)}inactive_file {cached}\n")
    assert group_available(tmp_path / "cgroup", own) == 200
    (root / "jobs" / names[0]).write_text("max\n")
    assert group_available(tmp_path / "cgroup", own) == 500
