"""A package that an extra installs and that is missing is reported first, with the extra."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from duo_jax.extras import EXTRAS, missing_package, require
from tests.text_models import Result, assert_refused

ROOT = Path(__file__).resolve().parents[1]
# Names of distributions that differ from the names that are imported. Those that lm-eval's extras install have none.
DISTRIBUTIONS = {"lm_eval": "lm-eval", "prometheus_client": "prometheus-client"}
INDIRECT = {"wonderwords"}
# A command that would fail otherwise for want of its model, the missing packages, and the extra to install.
CASES = [
    (("identify", "--model", "none", "--out", "o", "--data.haystack", "hub:a/b"), ("datasets",), "train"),
    (("identify", "--model", "none", "--out", "o", "--data.haystack", "a.txt.zst"), ("zstandard",), "train"),
    (("plot", "gates", "none"), ("matplotlib",), "train"),
    (("plot", "attention", "--model", "none", "--layer", "0", "--head", "0"), ("matplotlib",), "train"),
    (("plot", "sample", "--model", "none", "--haystack", "hub:a/b"), ("datasets",), "train"),
    (("inspect", "--model", "none", "--png", "x.png"), ("matplotlib",), "train"),
    (("report", "--results", "none"), ("matplotlib", "scipy", "tabulate"), "eval"),
    (("report", "--results", "none"), ("tabulate",), "eval"),
    (("serve", "--model", "none"), ("starlette", "uvicorn"), "serve"),
    *(
        ((*f"eval {task}".split(), "--model", "none"), (package,), extra)
        for task in ("recall", "needle", "ruler", "longbench", "harness --tasks t", "humaneval", "mmlu", "precision")
        for package, extra in (("scipy", "eval"), ("lm_eval", "eval"), ("matplotlib", "train"))
    ),
    (("eval", "plot", "none.jsonl"), ("matplotlib", "scipy"), "eval"),
]


@pytest.mark.parametrize(("command", "missing", "extra"), CASES, ids=lambda value: str(value))
def test_a_missing_package_is_reported_before_the_work(
    command: tuple[str, ...],
    missing: tuple[str, ...],
    extra: str,
    tmp_path: Path,
    duo: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    words = f"duo {command[0]} needs {', '.join(missing)}, not installed here: pip install 'duo-jax[{extra}]'"
    assert_refused(duo(*command), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("inspect", "--model", "llama-3-8b"), ("plan", "--model", "llama-3-8b")])
def test_what_a_command_does_not_use_may_be_missing(
    command: tuple[str, ...], duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for packages in EXTRAS.values():
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
    flags = ("--context", "1000") if command[0] == "plan" else ()
    assert duo(*command, *flags).code == 0


def test_an_import_that_fails_in_the_middle_is_reported_too(
    duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ImportError("No module named 'scipy.stats'", name="scipy.stats")

    def run(self: object) -> None:
        raise error

    monkeypatch.setattr("duo_jax.cli.listing.Patterns.run", run)
    assert missing_package(error) is None  # It is installed: another version, or a damaged one.
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert_refused(duo("patterns"), "needs scipy", "pip install 'duo-jax[eval]'")
    assert missing_package(ImportError("x", name="flax.nnx")) is None


def test_the_table_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[\[>=<]", each)[0] for each in project["optional-dependencies"][extra]}
        assert {DISTRIBUTIONS.get(package, package) for package in packages} - INDIRECT == listed
    require("this test", ("numpy",))
    with pytest.raises(NotImplementedError, match="this test needs package_that_does_not_exist"):
        require("this test", ("numpy", "package_that_does_not_exist"))
