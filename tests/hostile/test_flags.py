"""Flags: what is impossible is refused in one line that names the flag, its value and the rule."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from duo_jax.cli import flags
from tests.text_models import Result, assert_refused

HUGE = "99999999999999999999999"
GENERATE = ("generate", "--prompt", "hi", "--max-new-tokens", "2")
PLAN = ("plan", "--model", "llama-3-8b")
NEEDLE = ("eval", "needle", "--methods", "full", "--lengths")

# Arguments, without the model; words of the message.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "seed beyond int64": (
        (*GENERATE, "--temperature", "1", "--seed", HUGE),
        "--seed must be at most 9223372036854775807",
    ),
    "seed below 0": ((*GENERATE, "--seed=-1"), "--seed must be at least 0, got -1"),
    "temperature below 0": ((*GENERATE, "--temperature", "-1"), "--temperature must be in"),
    "temperature that underflows": (
        (*GENERATE, "--temperature", "1e-320"),
        "got 1e-320; 0 takes the most likely token",
    ),
    "temperature inf": ((*GENERATE, "--temperature", "inf"), "--temperature must be a finite number, got inf"),
    "penalty nan": ((*GENERATE, "--repetition-penalty", "nan"), "--repetition-penalty must be a finite number"),
    "top-p 0": ((*GENERATE, "--temperature", "1", "--top-p", "0"), "--top-p must be in"),
    "top-k 0": ((*GENERATE, "--temperature", "1", "--top-k", "0"), "--top-k must be at least 1, got 0"),
    "memory beyond a float": ((*GENERATE, "--memory", "1e400GB"), "--memory must be a number above 0"),
    "context 0": ((*GENERATE, "--max-context", "0"), "--max-context must be at least 1, got 0"),
    "2**62 new tokens": (
        ("generate", "--prompt", "hi", "--max-new-tokens", str(2**62)),
        "--max-new-tokens must be at most",
    ),
    "1e9 new tokens": (("generate", "--prompt", "hi", "--max-new-tokens", "1000000000"), "what would fit: up to"),
    "mesh 0": ((*GENERATE, "--mesh", "tensor=0"), "tensor must be at least 1, got 0"),
    "chat without room": (("chat", "--max-length", "0"), "--max-length must be at least 1, got 0"),
    "chat without answers": (("chat", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
    "chunk 0": (("prefill", "--prompt", "hi", "--out", "no/such/folder", "--chunk", "0"), "--chunk must be at least 1"),
    "window beyond int64": (
        ("inspect", "--pattern", "{model}/pattern", "--recent-size", HUGE),
        "--recent-size must be at most",
    ),
    "window beyond positions": (
        ("inspect", "--pattern", "{model}/pattern", "--recent-size", str(2**31)),
        "--recent-size must be at most 2147483647",
    ),
    "length 0": (("inspect", "--lengths", "0"), "--lengths must be at least 1, got 0"),
    "batch 0": (("inspect", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
    "plan of 0 tokens": ((*PLAN, "--context", "0"), "--context must be at least 1, got 0"),
    "plan of 0 rows": ((*PLAN, "--memory", "80GB", "--batch", "0"), "--batch must be at least 1, got 0"),
    "two memories": ((*PLAN, "--gpu", "h200", "--memory", "80GB"), "give --memory or --gpu, not both"),
    "depths 0": ((*NEEDLE, "512", "--depths", "0"), "--depths must be at least 2, got 0"),
    "depths 1e9": ((*NEEDLE, "512", "--depths", "1000000000"), "--depths must be at most"),
    "length without room": ((*NEEDLE, "8", "--depths", "2"), "--lengths must be at least 13, got 8"),
    "length without text": ((*NEEDLE, "20", "--depths", "2"), "--lengths of 20 has 12 tokens for the answer"),
    "results without end": ((*NEEDLE, "512", "--samples", "1000000000"), "more than 200000 results"),
    "recall": (("eval", "recall", "--lengths", "0"), "--lengths must be at least 1, got 0"),
    "no question": (("eval", "mmlu", "--questions", "0"), "--questions must be at least 1, got 0"),
    "shots below 0": (("eval", "mmlu", "--shots", "-1"), "--shots must be at least 0, got -1"),
    "no problem": (("eval", "humaneval", "--problems", "0"), "--problems must be at least 1, got 0"),
    "no program": (("eval", "humaneval", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
    "no example": (("eval", "ruler", "--samples", "0"), "--samples must be at least 1, got 0"),
    "no row": (("eval", "longbench", "--limit", "0"), "--limit must be at least 1, got 0"),
    "no length": (("eval", "longbench", "--max-length", "0"), "--max-length must be at least 1, got 0"),
    "no document": (("eval", "harness", "--tasks", "x", "--limit", "0"), "--limit must be at least 1, got 0"),
    "no request": (("eval", "harness-bench", "--count", "0"), "--count must be at least 1, got 0"),
    "another command's flag": (("eval", "recall", "--nope", "x"), "duo eval recall --help"),
}


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED)
def test_an_impossible_value_is_refused_by_its_flag(
    args: tuple[str, ...], words: str, text_model: Path, tmp_path: Path, duo: Callable[..., Result]
) -> None:
    command = [arg.format(model=text_model) for arg in args]
    if "--model" not in command:
        command += ["--model", str(text_model)]
    if command[0] == "eval":
        command += ["--out", str(tmp_path / "r.jsonl")]
    result = duo(*command)
    assert_refused(result, words)
    assert "self." not in result.err and "(model=" not in result.err
    assert not list(tmp_path.iterdir())


def test_none_is_still_the_value_of_a_flag_that_has_another_default(
    duo: Callable[..., Result], text_model: Path
) -> None:
    options = ("eval", "needle", "--model", text_model, "--methods", "full", "--lengths", "8", "--haystack-chars")
    assert_refused(duo(*options, "None"), "--lengths must be at least 13")
    assert "haystack-chars" in duo(*options, "x").err


@dataclass(frozen=True)
class Data:
    seed: int = 0


@dataclass(frozen=True)
class Run:
    data: Data = Data()
    more: tyro.conf.OmitArgPrefixes[Data] = Data()


@pytest.mark.parametrize("wrong", ["--seed", "--data.seed"])
def test_of_two_flags_with_one_ending_the_wrong_one_is_named(wrong: str) -> None:
    other = {"--seed": "--data.seed", "--data.seed": "--seed"}[wrong]
    for args in ((wrong, "-1", other, "1"), (f"{other}=1", f"{wrong}=-1")):
        with pytest.raises(ValueError, match=rf"^{wrong} must be at least 0, got -1"):
            contextvars.copy_context().run(flags.parse, Run, "x", args)


def test_a_flag_is_found_by_the_end_of_its_path() -> None:
    args = ["--data.num_samples=3", "--seed", "1", "--data.seed", "2", "--out.path", "x"]
    names = ("data.seed", "seed", "num_samples", "data.num_samples", "sampling.seed", "path", "data")
    found = ["--data.seed", "--seed", *["--data.num_samples"] * 2, "--seed", "--out.path", "data"]
    assert [flags.flag(name, args) for name in names] == found
