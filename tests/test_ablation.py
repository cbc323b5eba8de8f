"""`duo eval ablation`: gates trained in several ways by one command, scored side by side."""

import json
import shlex

import pytest

from duo_jax import HeadPattern
from eval.curves import recall_cells
from tests.test_identify import QUICK as TRAINING
from tests.test_score import QUICK as SCORING
from train.identify import RUN_FILE

PAIR = ("mine=", "theirs=--attention.mixing teacher")


@pytest.fixture
def ablation(duo, text_model, tmp_path):
    training, scoring = shlex.join(TRAINING), f"{shlex.join(SCORING)} --sparsity 0.5 --random 0 --prose 0"

    def run(*variants, identify=training, recall=scoring):
        flags = ("--out", tmp_path / "mixing", f"--identify={identify}", f"--recall={recall}")
        return duo("eval", "ablation", "--model", text_model, "--variants", *variants, *flags)

    return run


def test_one_command_trains_scores_and_draws_and_goes_on(ablation, tmp_path):
    done = ablation(*PAIR)
    assert done.code == 0, done
    folder = tmp_path / "mixing"
    begun = {name: json.loads((folder / name / RUN_FILE).read_text()) for name in ("mine", "theirs")}
    assert [run["attention"]["mixing"] for run in begun.values()] == ["self", "teacher"]
    assert all(HeadPattern.load(folder / name).is_retrieval.shape == (2, 4) for name in begun)
    _, cells = recall_cells(folder / "recall.jsonl")
    assert {"mine", "theirs"} < {key.method for key in cells}
    drawn = [folder / line.rsplit("/", 1)[1] for line in done.out.splitlines() if line.endswith((".png", ".svg"))]
    assert drawn and all(path.stat().st_size for path in drawn)
    # Once more, with a variant more: what is there stays.
    before = (folder / "recall.jsonl").read_text().splitlines()[1:]
    gates = (folder / "mine" / "full_attention_heads.tsv").read_bytes()
    done = ablation(*PAIR, "heads=--recipe attention-profile --attention-profile.length 40")
    assert done.code == 0 and "holds the finished run" in done.out, done
    assert (folder / "recall.jsonl").read_text().splitlines()[1:][: len(before)] == before
    assert (folder / "mine" / "full_attention_heads.tsv").read_bytes() == gates
    assert "heads" in {key.method for key in recall_cells(folder / "recall.jsonl")[1]}


@pytest.mark.parametrize(
    "variants, settings, message",
    [
        (("mine=",), {}, "two or more NAME=FLAGS"),
        (("mine=", "mine=--start x"), {}, "each name once"),
        (("mine=", "theirs"), {}, "NAME=FLAGS"),
        (("mine=", "a/b="), {}, "folder"),
        (("mine=", 'theirs=--start "'), {}, "No closing quotation"),
        (("mine=", "theirs=--attention.mixing both"), {}, "mixing"),
        (("mine=", "theirs=--sink-size -1"), {}, "sink_size"),
        (PAIR, {"recall": "--lengths 10"}, "hide less"),
        (PAIR, {"recall": "--samples -1"}, "no negative count"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(ablation, tmp_path, variants, settings, message):
    refused = ablation(*variants, **settings)
    assert refused.code == 2 and message in refused.out + refused.err, refused
    assert not (tmp_path / "mixing").exists()
