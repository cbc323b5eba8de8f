"""`duo identify` from the command line: its files, resuming, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from duo_train.data.needles import Needles
from duo_train.identify import ADDED, PRESETS, RUN_FILE, Identify, ranks
from duo_train.recipes import RECIPES, Distill

from duo_jax import HeadPattern
from duo_jax.cli.options import ModelOptions
from duo_jax.files import locked
from duo_jax.pattern.files import GATES_FILE
from tests.text_models import assert_refused

QUICK = (
    *("--preset", "debug", "--data.min-length", "60", "--data.max-length", "60", "--data.num-lengths", "1"),
    *("--data.needle", "<{ordinal} {words}>", "--data.question", "{ordinal}?", "--data.answer", "{ordinal} {words}."),
    *("--distill.pad-multiple", "64", "--distill.steps", "3", "--mesh", "data=1"),
)


@pytest.fixture
def identify(duo, text_model, tmp_path):
    def run(*args, out=tmp_path / "run"):
        return duo("identify", "--model", text_model, "--out", out, *QUICK, *args)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_writes_a_pattern_that_loads_with_all_its_settings(identify, tmp_path, text_model, duo):
    done = identify()
    assert done.code == 0 and "of 8 above 0.5" in done.out
    folder = tmp_path / "run"
    pattern = HeadPattern.load(folder)
    assert pattern.is_retrieval.shape == (2, 4) and (pattern.sink_size, pattern.recent_size) == (64, 256)
    training = pattern.metadata["training"]
    assert training["recipe"] == "distill" and training["settings"]["steps"] == 3
    assert training["data"]["num_passkeys"] == 2 and training["attention"]["sink_size"] == 4
    begun = json.loads((folder / RUN_FILE).read_text())
    assert begun.pop("contents").keys() == {"weights", "text", "start"}
    xla = {"backend": "xla", "tiles": {}}
    assert begun.pop("backends") == [{"device": "cpu", "choices": {"training": xla, "training, window 4+16": xla}}]
    assert begun == {k: v for k, v in training.items() if k != "duo_jax"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    # Other commands can use the gates, and resuming a finished run changes nothing.
    assert duo("inspect", "--model", text_model, "--pattern", folder, "--sparsity", "0.5").code == 0
    before = contents(folder)
    assert identify("--resume").code == 0
    assert contents(folder) == before


@pytest.mark.parametrize(
    "recipe", [pytest.param("prulong", marks=pytest.mark.full_matrix), "attention-profile", "kvzip"]
)
def test_every_recipe_ends_in_the_same_files(identify, tmp_path, recipe):
    quick = ("--prulong.steps", "2", "--attention-profile.length", "40", "--kvzip.length", "40")
    quick += ("--prulong.target-sparsity", "0.75")
    done = identify("--recipe", recipe, *quick)
    assert done.code == 0, done
    pattern = HeadPattern.load(tmp_path / "run", sparsity=0.5)
    assert pattern.metadata["training"]["recipe"] == recipe
    assert np.isfinite(pattern.gates).all() and pattern.num_streaming == 4
    by_default = HeadPattern.load(tmp_path / "run")
    assert by_default.num_streaming == (6 if recipe == "prulong" else (by_default.gates < 0.5).sum())


def test_one_recipe_starts_from_another_s_result(identify, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    gates = np.linspace(0.2, 0.8, 8).reshape(2, 4)
    HeadPattern.from_gates(gates, sink_size=1, recent_size=1).save(first)
    done = identify("--start", first, "--distill.steps", "1", "--distill.learning-rate", "1e-6")
    assert done.code == 0
    np.testing.assert_allclose(HeadPattern.load(tmp_path / "run").gates, gates, atol=1e-5)


def test_scores_that_only_rank_begin_as_ranks(identify):
    assert ranks(np.array([[0.3, 0.1], [0.1, 0.9]])).tolist() == [[2 / 3, 1 / 6], [1 / 6, 1]]
    assert_refused(identify("--start-ranks"), "--start-ranks needs", "--start PATTERN")


def test_another_run_s_folder_is_left_alone(identify, tmp_path):
    assert identify().code == 0
    before = contents(tmp_path / "run")
    assert_refused(identify(), "has a run already", "--resume")
    assert_refused(identify("--resume", "--distill.seed", "4"), "has other settings", "settings.seed was 0, now 4")
    assert contents(tmp_path / "run") == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert_refused(identify(out=other), "not empty")
    assert_refused(identify("--resume", out=other), "not empty")
    assert contents(other) == {"thesis.tex": b"years of work"}


def test_a_run_that_was_begun_and_never_saved_begins_again(identify, tmp_path):
    assert identify().code == 0
    gates = HeadPattern.load(tmp_path / "run").gates
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / RUN_FILE).write_bytes((tmp_path / "run" / RUN_FILE).read_bytes())
    assert identify("--resume", out=fresh).code == 0
    np.testing.assert_array_equal(HeadPattern.load(fresh).gates, gates)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--data.num-passkeys", "21"), ("--data.num-passkeys", "ordinals")),
        (("--data.passkey-words", "40"), ("more than the 60 tokens", "min_length")),
        (("--data.max-length", "1000000", "--data.num-lengths", "2"), ("the longest sample needs 1000000",)),
        (("--data.haystack", "no/such/file"), ("no/such/file",)),
        (("--data.num-lengths", "1000000000"), ("--data.num-lengths must be at most",)),
        (("--data.passkey-words", "1000000000"), ("more than the 60 tokens",)),
        (("--data.seed", "-1"), ("--data.seed must be at least 0, got -1",)),
        (("--data.answer", "{ordinal.__class__}{ordinal}{words}"), ("--data.answer may have no other braces",)),
        (("--recipe", "attention-profile", "--attention-profile.length", "1000000000"), ("length must be at most",)),
        (("--prulong.target-sparsity", "1.5"), ("--prulong.target-sparsity", "[0, 1]")),
        (("--attention.recent-size", "0"), ("--attention.recent-size must be at least 1",)),
        (("--recent-size", "0"), ("--recent-size must be at least 1",)),
        (("--distill.steps", "0"), ("--distill.steps must be at least 1",)),
        (("--start", "no-such-pattern"), ("no published pattern",)),
        (("--start", "smollm2-135m-instruct"), ("made for another model",)),
        (("--recipe", "kvzip", "--start", "x"), ("--recipe kvzip trains nothing", "--start", "leave that out")),
        (("--recipe", "prulong", "--attention.mixing", "teacher"), ("no teacher",)),
        (("--recipe", "kvzip", "--mesh", "data=2", "--no-fsdp"), ("can only share its weights",)),
        (("--mesh", "tensor=2"), ("no tensor parallelism, got tensor=2",)),
        (("--mesh", "data=16"), ("16 devices, but there are 8",)),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(identify, tmp_path, args, words):
    assert_refused(identify(*args), *words)
    assert not (tmp_path / "run").exists()


def test_a_start_with_nan_is_refused(identify, tmp_path):
    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "config.json").write_text('{"sink_size": 4, "recent_size": 16}')
    (folder / "full_attention_heads.tsv").write_text("\n".join(["1\tnan\t0\t1"] * 3))
    assert_refused(identify("--start", folder), "gates must be finite", "(0, 1)")


@pytest.mark.process
def test_a_full_disk_is_reported_in_one_line_and_the_run_can_be_resumed(identify, text_model, tmp_path):
    out = tmp_path / "run"
    prulong = ("--recipe", "prulong", "--prulong.steps", "3", "--prulong.pad-multiple", "64")
    command = ["identify", "--model", text_model, "--out", out, *QUICK, *prulong]
    start = "import sys; from duo_jax.cli import main; sys.argv[0] = 'duo'; main()"
    # No file may grow beyond 4 KiB, and the description of a checkpoint does: a program sees a full disk.
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", sys.executable, "-c", start, *map(str, command)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(limited, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr and "could not save the checkpoint of step 2" in done.stderr, done.stderr
    assert not (out / "full_attention_heads.tsv").exists()
    assert identify("--resume", *prulong).code == 0
    assert HeadPattern.load(out).gates.shape == (2, 4)


def test_a_resume_with_another_text_under_the_same_name_is_refused(identify, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Nothing of note happened that day. " * 200)
    options = ("--data.haystack", text, "--recipe", "attention-profile", "--attention-profile.length", "40")
    assert identify(*options).code == 0
    (tmp_path / "run" / GATES_FILE).unlink()  # As if it had been stopped.
    before = contents(tmp_path / "run")
    text.write_text("Something of note happened that day. " * 200)
    assert_refused(identify(*options, "--resume"), "has other settings: contents.text was")
    assert contents(tmp_path / "run") == before


@pytest.mark.full_matrix
def test_more_steps_extend_a_finished_run_and_fewer_are_refused(identify, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert identify().code == 0
    before, gates = contents(folder), HeadPattern.load(folder).gates
    assert_refused(identify("--resume", "--distill.steps", "2"), "is finished, with 3 steps")
    assert_refused(identify("--resume", "--distill.steps", "5", "--distill.seed", "1"), "settings.seed was 0, now 1")
    assert contents(folder) == before
    # A run that is killed before its end leaves the earlier pattern, and is resumed.
    with monkeypatch.context() as patch:
        patch.setattr("duo_train.loop.MetricsWriter.write", _interrupt)
        stopped = identify("--resume", "--distill.steps", "5")
    assert stopped.code == 130 and "extending the run from step 3 to 5" in stopped.err
    assert np.array_equal(HeadPattern.load(folder).gates, gates)
    assert_refused(identify("--resume", "--distill.steps", "4"), "settings.steps was 5, now 4")
    assert identify("--resume", "--distill.steps", "5").code == 0
    extended = HeadPattern.load(folder)
    assert not np.array_equal(extended.gates, gates) and extended.metadata["training"]["extends"] == [3]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert "finished run already" in identify("--resume", "--distill.steps", "5").out
    # A run of an earlier version lacks a setting that came later.
    settings = json.loads((folder / RUN_FILE).read_text())
    del settings["start_ranks"]
    (folder / RUN_FILE).write_text(json.dumps(settings))
    assert "finished run already" in identify("--resume", "--distill.steps", "5").out
    shutil.rmtree(folder / "checkpoints")
    assert_refused(identify("--resume", "--distill.steps", "6"), "no checkpoint of its last step, 5", "--start")


def test_a_setting_that_is_new_says_what_earlier_runs_did():
    # What run.json has had from the first version on. A name that is new goes into an ADDED instead.
    first = {
        "run": "attention data dtype embed_dtype model recent_size recipe settings sink_size start weight_dtype",
        "data": "answer chat distinct_words haystack haystack_chars label_tokens max_depth max_length min_depth "
        "min_length needle num_lengths num_passkeys num_samples passkey_words question seed vocabulary",
        "attention": "backend mixing recent_size rematerialize sink_size",
        "distill": "accumulate batch_size cooldown learning_rate pad_multiple reg reg_weight seed steps warmup",
        "prulong": "accumulate batch_size cooldown initial_log_alpha initial_noise learning_rate multiplier_rate "
        "pad_multiple ramp seed steps target_sparsity warmup weight_decay",
        "attention-profile": "length num_samples",
        "kvzip": "length num_samples",
    }
    for recipe in RECIPES:
        now = Identify(ModelOptions("model"), Path("out"), recipe=recipe).resolved()
        assert set(now) == {*first["run"].split(), *ADDED}
        assert set(now["data"]) == set(first["data"].split())
        assert set(now["attention"]) == set(first["attention"].split())
        assert set(now["settings"]) == set(first[recipe].split())
    assert Needles(spacing="geometric").saved()["spacing"] == "geometric"


def _interrupt(self, record):
    raise KeyboardInterrupt


def test_presets_are_what_they_say():
    paper = PRESETS["paper"](ModelOptions("model"), Path("out"))
    distill = paper.chosen
    assert isinstance(distill, Distill)
    assert paper.data == Needles() and (distill.steps, distill.learning_rate) == (2000, 0.02)
    assert (paper.attention.sink_size, paper.attention.recent_size, paper.attention.mixing) == (128, 256, "self")
    assert (distill.reg_weight, distill.warmup * 2000) == (0.05, 400)
    for name, preset in PRESETS.items():
        assert preset.preset == name and preset.variant(["--preset", name]) is preset
        assert preset.variant([f"--preset={name}", "--out", "x"]) is preset


def test_the_last_preset_named_counts_however_it_is_written():
    for args in (["--preset=paper", "--preset", "debug"], ["--preset", "paper", "--preset=debug"]):
        assert Identify.variant(args) is PRESETS["debug"]
    assert Identify.variant(["--model", "m"]) is PRESETS["paper"]


def test_a_second_process_in_the_folder_is_refused(identify, tmp_path):
    with locked(tmp_path / "run"):
        assert_refused(identify("--resume"), "another process writes to")
    assert not (tmp_path / "run").exists()
    assert identify("--resume").code == 0
