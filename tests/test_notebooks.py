"""The notebook runs from beginning to end, and what it tells about itself is true."""

from pathlib import Path

import pytest

from duo_jax.checkpoint.packaged import cache_folder

QUICKSTART = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra")


def printed(notebook) -> str:
    """Everything that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def check_answers(text: str) -> None:
    answers = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("full", "half", "wrong")))
    assert "71432" in answers["full attention"]
    assert "71432" in answers["half stream"]
    assert "71432" not in answers["wrong half streams"]
    replies = text.splitlines()[-3:]
    for reply, expected in zip(replies, ("71432", "Lisbon", "purple"), strict=True):
        assert expected in reply.split("?")[1], reply


def test_the_committed_notebook_is_small_and_has_the_outputs_of_one_run():
    assert QUICKSTART.stat().st_size < 200_000
    notebook = nbformat.read(QUICKSTART, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert str(Path.home()) not in QUICKSTART.read_text()
    check_answers(printed(notebook))


@pytest.mark.slow
def test_the_notebook_runs_and_finds_what_is_hidden(smollm2_gguf, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compiled"))  # a second run compiles less
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    folder = {"metadata": {"path": str(QUICKSTART.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    check_answers(printed(notebook))
