"""Child processes import nothing from the folder in which the user works."""

from pathlib import Path

import pytest
from duo_eval.runner.process import in_fresh_process
from duo_eval.tasks.sandbox import sandbox

from duo_jax.checkpoint.packaged import _download


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with modules of the names that child processes import; each leaves a mark."""
    for name in ("pip", "json", "resource", "ctypes", "multiprocessing", "traceback"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'mark')!r}, 'w').write({name!r})\nraise SystemExit(9)"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_download_runs_the_installed_pip(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="pip could not download"):
        _download("=", tmp_path)
    assert not (folder / "mark").exists()


def test_a_worker_runs_the_installed_modules(folder):
    assert in_fresh_process("json:dumps", {"obj": [1]}) == "[1]"
    assert not (folder / "mark").exists()


def test_the_sandbox_runs_the_standard_library(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    assert sandbox.run("import json, resource\njson.dumps({})", unsafe=True).outcome == "passed"
    assert not (folder / "mark").exists()
