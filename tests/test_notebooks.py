"""Each notebook runs from beginning to end, and what it tells about itself is true."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from duo_jax import HeadPattern
from pallas_kernels.user_cache import cache_folder

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
EXECUTE = """
import sys, nbformat
from pathlib import Path
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
folder = {"metadata": {"path": str(Path(sys.argv[1]).parent)}}
NotebookClient(notebook, timeout=3600, record_timing=False, kernel_name="python3", resources=folder).execute()
notebook.metadata["language_info"] = {"name": "python"}  # Any version.
nbformat.write(notebook, sys.argv[2])
"""
nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra")


def outputs_of(notebook) -> list:
    """The outputs of all cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook) -> str:
    """Everything that the cells printed."""
    return "".join(
        output.text for output in outputs_of(notebook) if output.output_type == "stream" and output.name == "stdout"
    )


def figures(notebook) -> int:
    """How many figures the cells show."""
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def answers(text: str) -> dict[str, str]:
    """What each kind of attention answered."""
    return dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("full", "half", "wrong")))


def check_gates(text: str) -> None:
    """The gates that the notebook drew are those of the shipped pattern."""
    gates = HeadPattern.load("smollm2-135m-instruct").gates.clip(0, 1)
    assert f"gates: mean {gates.mean():.4f}, {(gates > 0.5).sum()} of {gates.size} above 0.5\n" in text


def check_quickstart(notebook) -> None:
    text = printed(notebook)
    check_gates(text)
    found = answers(text)
    assert "71432" in found["full attention"]
    assert "71432" in found["half stream"]
    assert "71432" not in found["wrong half streams"]
    replies = text.splitlines()[-3:]
    for reply, expected in zip(replies, ("71432", "Lisbon", "purple"), strict=True):
        assert expected in reply.split("?")[1], reply
    assert figures(notebook) == 2


def check_identify_heads(notebook) -> None:
    text = printed(notebook)
    steps = re.findall(r"^step (\d+) of 40: loss ([\d.]+), mean gate ([\d.]+)$", text, re.MULTILINE)
    assert [int(step) for step, _, _ in steps] == [10, 20, 30, 40]
    assert all(float(loss) < 0.5 for _, loss, _ in steps)  # what it is while every gate is 1
    assert 0 < float(steps[-1][2]) < 1
    # The real run's curves.
    assert "30 steps of 3200 to 4480 tokens\nmean gate 0.50 to 0.33\nexpected sparsity 0.27 to 0.54\n" in text
    ranges = re.findall(r"^layer \d: gates from ([\d.]+) to ([\d.]+)$", text, re.MULTILINE)
    assert len(ranges) == 4
    assert all(0 <= float(least) <= float(most) <= 1 for least, most in ranges)
    assert "config.json, full_attention_heads.tsv" in text
    assert "8 of 16 heads keep every token" in text
    assert "45 heads keep every token, 45 stream" in text
    check_gates(text)
    found = answers(text)
    assert "71432" in found["full attention"]
    assert "71432" in found["half stream"]
    assert figures(notebook) == 5


def check_evaluate(notebook) -> None:
    text = printed(notebook)
    scores = {}
    for method in ("full at 1", "duo at 0.4", "random-heads=1 at 0.4"):  # The second call asks nothing.
        found = re.findall(rf"^{method} of the KV bytes: ([\d.]+) \(.*\), n = 8$", text, re.MULTILINE)
        assert len(found) == 2 and found[0] == found[1], method
        scores[method.split()[0]] = float(found[0])
    assert scores["full"] == 100
    assert scores["duo"] > scores["random-heads=1"]
    assert "jsonl is complete" in text and "is already complete" in text
    tables = [
        output.data["text/markdown"] for output in outputs_of(notebook) if "text/markdown" in output.get("data", {})
    ]
    assert len(tables) == 1 and "| random-heads=1 |" in tables[0]
    assert "1 result, 0 broken" in text
    assert figures(notebook) == 1
    shown = notebook.cells[-2].outputs[-1].data["text/html"]
    assert "Needle" in shown and "KV held, MB" in shown


# File, most bytes with outputs, what its outputs must say.
CASES = [
    pytest.param(NOTEBOOKS / "quickstart.ipynb", 200_000, check_quickstart, id="quickstart"),
    pytest.param(NOTEBOOKS / "identify_heads.ipynb", 400_000, check_identify_heads, id="identify_heads"),
    pytest.param(NOTEBOOKS / "evaluate.ipynb", 450_000, check_evaluate, id="evaluate"),
]


def test_every_notebook_is_tested():
    assert {case.values[0] for case in CASES} == set(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize(("path", "size", "check"), CASES)
def test_the_committed_notebook_is_small_and_has_the_outputs_of_one_run(path: Path, size: int, check: Callable):
    assert path.stat().st_size < size
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert not [output.text for output in outputs_of(notebook) if output.get("name") == "stderr"]
    # Where duo-jax is missing, as in a hosted notebook, the first cell installs it; nothing else of the clone is read.
    install, *others = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert 'find_spec("duo_jax") is None' in install and '%pip install --quiet "{SOURCE}"' in install
    assert not [source for source in others if "Path.cwd()" in source or "eval/results" in source or "../" in source]
    for folder in (Path.home(), NOTEBOOKS.parent, Path(tempfile.gettempdir())):
        assert f"{folder}/" not in path.read_text()
    check(notebook)


@pytest.mark.notebook
@pytest.mark.parametrize(("path", "size", "check"), CASES)
def test_the_notebook_runs_and_finds_what_is_hidden(path: Path, size: int, check: Callable, smollm2_gguf, tmp_path):
    for package in ("ipykernel", "matplotlib", "nbclient"):
        pytest.importorskip(package, reason="needs the notebook extra")
    # A second run compiles less.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "compiled")}
    quiet = {"JAX_PLATFORMS": "cpu", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    executed = tmp_path / path.name
    # In a process of its own: what Jupyter leaves open is no other test's warning.
    subprocess.run([sys.executable, "-c", EXECUTE, path, executed], env=os.environ | compiled | quiet, check=True)
    notebook = nbformat.read(executed, as_version=4)
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    check(notebook)
