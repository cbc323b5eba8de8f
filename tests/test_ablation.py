"""`duo eval ablation`: gates trained in several ways by one command, scored side by side."""

import json
import shlex

import pytest
from duo_eval.stats.recall_cells import recall_cells
from duo_train.identify import RUN_FILE
from duo_train.recipes import AttentionProfile

from duo_jax import HeadPattern
from duo_jax.files import locked
from duo_jax.pattern.files import GATES_FILE
from tests.test_identify import QUICK as TRAINING
from tests.test_score import QUICK as SCORING

PAIR = ("mine=", "theirs=--attention.mixing teacher")
HEADS = "heads=--recipe attention-profile --attention-profile.length 40"


@pytest.fixture
def ablation(duo, text_model, tmp_path):
    scoring = (*SCORING, "--samples", "1", "--random", "0", "--prose", "0")

    def run(*variants, flags=(), identify=shlex.join(TRAINING)):
        out = ("--out", tmp_path / "several", f"--identify={identify}")
        return duo("eval", "ablation", "--model", text_model, "--variants", *variants, *out, *scoring, *flags)

    return run


@pytest.mark.full_matrix
def test_one_command_trains_scores_and_draws_and_resumes(ablation, tmp_path, monkeypatch):
    folder = tmp_path / "several"
    # The second training is interrupted. What the first found stays.
    with monkeypatch.context() as patch:
        patch.setattr(AttentionProfile, "find", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = ablation("mine=", HEADS)
    assert stopped.code == 130 and "heads: stopped; run the same command again to resume" in stopped.err
    begun = {name: json.loads((folder / name / RUN_FILE).read_text()) for name in ("mine", "heads")}
    assert [run["recipe"] for run in begun.values()] == ["distill", "attention-profile"]
    gates = (folder / "mine" / GATES_FILE).read_bytes()
    assert not (folder / "heads" / GATES_FILE).exists() and not (folder / "recall.jsonl").exists()
    # Nobody else may train in its folder in the meantime.
    with locked(folder / "heads"):
        assert "another process writes" in ablation("mine=", HEADS).err
    done = ablation("mine=", HEADS)
    assert done.code == 0, done
    assert gates == (folder / "mine" / GATES_FILE).read_bytes()
    assert HeadPattern.load(folder / "heads").metadata["training"]["recipe"] == "attention-profile"
    _, cells = recall_cells(folder / "recall.jsonl")
    assert {"mine", "heads"} < {key.method for key in cells}
    drawn = [folder / line.rsplit("/", 1)[1] for line in done.out.splitlines() if line.endswith((".png", ".svg"))]
    assert drawn and all(path.stat().st_size for path in drawn)
    before = (folder / "recall.jsonl").read_text()
    assert "already complete" in ablation("mine=", HEADS).out and (folder / "recall.jsonl").read_text() == before
    # Other settings of a variant that is there already, or of the scoring.
    assert "has other settings" in ablation("mine=", "heads=--recipe kvzip").err
    assert "other settings" in ablation("mine=", HEADS, flags=("--recent-size", "17")).err


@pytest.mark.parametrize(
    "variants, settings, message",
    [
        (("mine=",), {}, "two or more NAME=FLAGS"),
        (("mine=", "mine=--start x"), {}, "each name once"),
        (("mine=", "theirs"), {}, "NAME=FLAGS"),
        (("mine=", "a/b="), {}, "that of its folder"),
        (("mine=", "..="), {}, "that of its folder"),
        (("mine=", "recall.jsonl="), {}, "that of its folder"),
        (("mine=", "random-start="), {}, "not that of a baseline"),
        (("mine=", 'theirs=--start "'), {}, "No closing quotation"),
        (("mine=", "theirs=--attention.mixing both"), {}, "Invalid choice"),
        (("mine=", "theirs=--out elsewhere"), {}, "theirs: --out cannot vary"),
        (("mine=", "theirs=--sink-size -1"), {}, "--sink-size"),
        (PAIR, {"identify": "--model=x"}, "mine: --model=x cannot vary"),
        (PAIR, {"flags": ("--lengths", "10")}, "hide less"),
        (PAIR, {"flags": ("--samples", "-1")}, "--samples must be at least 0, got -1"),
        (PAIR, {"flags": ("--samples", "0")}, "nothing to score"),
        (PAIR, {"flags": ("--sparsity", "7")}, "sparsity"),
        (PAIR, {"flags": ("--recent-sizes", "0")}, "--recent-size"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(ablation, tmp_path, variants, settings, message):
    refused = ablation(*variants, **settings)
    assert refused.code == 2 and message in refused.err, refused
    assert not (tmp_path / "several").exists()
