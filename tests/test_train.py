"""The training loop: any interruption ends in the same gates, and a step is what the method says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from duo_train import feed
from duo_train.checkpoints import CHECKPOINTS
from duo_train.data.needles import NeedleData, Needles
from duo_train.gated import GatedModel
from duo_train.metrics import METRICS_FILE
from duo_train.recipes import Distill, Run
from transformers import AutoTokenizer

from duo_jax import load_model, make_mesh
from tests.text_models import make_model

# About 150 tokens of the tests' tokenizer, which has one a character.
DATA = Needles(
    num_passkeys=2,
    passkey_words=2,
    min_length=60,
    max_length=60,
    num_lengths=1,
    needle="<{ordinal} {words}>",
    question="{ordinal}?",
    answer="{ordinal} {words}.",
)
# So large a weight moves the gates of one layer in a few steps.
RECIPE = Distill(steps=6, learning_rate=0.1, reg_weight=1.0, pad_multiple=64)
ATTENTION = GatedModel(sink_size=2, recent_size=8, rematerialize=False)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """One layer: these tests are about steps and checkpoints."""
    return make_model(tmp_path_factory.mktemp("train") / "model", layers=1)


@pytest.fixture(scope="module")
def start(text_model):
    """A run in a folder, settings changed at will."""
    model, tokenizer = load_model(text_model), AutoTokenizer.from_pretrained(text_model)

    def run(folder, recipe=RECIPE, data=DATA, **changed):
        folder.mkdir(exist_ok=True)
        fields = {"model": model, "checkpoint_every": 2, "attention": ATTENTION, "mesh": make_mesh()} | changed
        return recipe.find(Run(data=NeedleData(data, tokenizer), folder=folder, **fields))

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Folder and gates of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, start(folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def without_time(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def stop_at(step, act):
    def report(done, total, figures):
        if done == step:
            act()

    return report


def test_trains_and_writes_down_every_step(whole):
    folder, gates = whole
    records = metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert gates.shape == (1, 4) and (gates > -0.01).all() and (gates < 1.01).all() and gates.min() < 0.9
    first = records[0]
    # With every gate 1 the gated model is the full one, and the penalty is the whole loss.
    assert first["distillation"] < 1e-9 and first["loss"] == pytest.approx(RECIPE.reg_weight)
    assert records[1]["distillation"] > first["distillation"]
    assert records[-1]["mean_gate"] == pytest.approx(gates.mean(), abs=1e-6)
    assert records[-1]["above_half"] == pytest.approx((gates > 0.5).mean(), abs=1e-6)
    assert sorted(int(path.name) for path in (folder / CHECKPOINTS).iterdir()) == [4, 6]  # two are kept


def test_a_run_that_dies_between_checkpoints_and_resumes_ends_with_the_same_gates(start, whole, tmp_path):
    def die():
        raise MemoryError("out of it")

    with pytest.raises(MemoryError):
        start(tmp_path, report=stop_at(5, die))
    assert len(metrics(tmp_path)) == 5
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # cut off while it was written
    gates = start(tmp_path, resume=True)
    np.testing.assert_array_equal(gates, whole[1])
    assert without_time(metrics(tmp_path)) == without_time(metrics(whole[0]))
    np.testing.assert_array_equal(start(tmp_path, resume=True), whole[1])  # finished already


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_and_leaves(start, whole, tmp_path, number, error):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(error) as left:
        start(tmp_path, report=stop_at(2, lambda: os.kill(os.getpid(), number)))
    assert number == signal.SIGINT or left.value.code == 143
    assert (tmp_path / CHECKPOINTS / "3").is_dir()  # the step after, at which none was due
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    np.testing.assert_array_equal(start(tmp_path, resume=True), whole[1])


def test_a_signal_in_the_last_step_loses_nothing(start, whole, tmp_path):
    last = len(metrics(whole[0])) - 1
    gates = start(tmp_path, report=stop_at(last, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    np.testing.assert_array_equal(gates, whole[1])


@pytest.mark.process
def test_a_process_killed_at_any_moment_resumes_to_the_same_gates(whole, tmp_path, text_model):
    script = textwrap.dedent(f"""
        import sys, pathlib, duo_jax
        from transformers import AutoTokenizer
        from tests.test_train import ATTENTION, DATA, RECIPE
        from duo_train.data.needles import NeedleData
        from duo_train.recipes import Run
        model, tokenizer = duo_jax.load_model({str(text_model)!r}), AutoTokenizer.from_pretrained({str(text_model)!r})
        run = Run(model, NeedleData(DATA, tokenizer), ATTENTION, pathlib.Path({str(tmp_path)!r}), resume=True,
                  checkpoint_every=1, report=lambda done, total, figures: print(done, flush=True))
        print("gates", RECIPE.find(run).tolist())
    """)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    # Killed while it compiles, while it computes, while it saves: a while after each line that it prints.
    for lines, delay in ((0, 0.0), (1, 0.0), (2, 0.02)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for _ in range(lines):
                assert process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    gates = json.loads(done.stdout.splitlines()[-1].removeprefix("gates"))
    np.testing.assert_array_equal(np.array(gates), whole[1])


@pytest.mark.full_matrix
def test_gradient_accumulation_weighs_every_label_token_the_same(start, tmp_path):
    # Passkeys of different lengths: a mean of the samples' means would differ.
    data = replace(DATA, vocabulary=("a", "incompatible"))
    recipe = replace(RECIPE, steps=2, batch_size=4)
    together = start(tmp_path / "4x1", recipe, data)
    apart = start(tmp_path / "2x2", replace(recipe, batch_size=2, accumulate=2), data)
    np.testing.assert_allclose(apart, together, atol=1e-6)
    for one, other in zip(metrics(tmp_path / "4x1"), metrics(tmp_path / "2x2"), strict=True):
        assert one["distillation"] == pytest.approx(other["distillation"], rel=1e-4, abs=1e-9)
    assert metrics(tmp_path / "4x1")[1]["distillation"] > 1e-4  # so that the line above compares something


def test_devices_share_a_batch_or_its_only_sample_and_the_weights(start, whole, text_model, tmp_path):
    """All eight, where no mesh is given; or those of the weights. One device ends what eight began."""
    recipe = replace(RECIPE, steps=2, batch_size=2)
    one = start(tmp_path / "one", recipe)
    np.testing.assert_allclose(start(tmp_path / "batch", recipe, mesh=None), one, atol=1e-5)
    sliced = load_model(text_model, mesh=make_mesh(sequence=8), fsdp=True)

    def die():
        raise MemoryError("out of it")

    with pytest.raises(MemoryError):
        start(tmp_path / "sample", model=sliced, mesh=None, report=stop_at(5, die))
    np.testing.assert_allclose(start(tmp_path / "sample", resume=True), whole[1], atol=1e-5)
    for eight, alone in zip(metrics(tmp_path / "sample"), metrics(whole[0]), strict=True):
        assert eight["distillation"] == pytest.approx(alone["distillation"], rel=1e-3, abs=1e-9)


def test_the_teacher_runs_once_a_sample(start, tmp_path, monkeypatch):
    calls, targets = [], feed._targets

    def counted(*args):
        calls.append(1)
        return targets(*args)

    monkeypatch.setattr(feed, "_targets", counted)
    data = replace(DATA, num_samples=2)
    reused = start(tmp_path / "reused", data=data)
    assert len(calls) == 2
    monkeypatch.setattr(feed, "KEPT_BYTES", 0)
    np.testing.assert_array_equal(start(tmp_path / "again", data=data), reused)
    assert len(calls) == 2 + RECIPE.steps


@dataclass(frozen=True)
class Broken(Distill):
    """Not a number at the fourth step."""

    def penalty(self, params, step):
        loss, figures = super().penalty(params, step)
        return jnp.where(step == 3, jnp.nan, loss), figures


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(start, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 4: .*loss.* not finite.*the checkpoint of step 2 is kept"):
        start(tmp_path, Broken(**vars(RECIPE)))
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["2"]
    assert start(tmp_path, RECIPE, resume=True).shape == (1, 4)


def test_a_run_begins_with_the_gates_it_is_given(start, tmp_path):
    given = np.full((1, 4), 0.25)
    gates = start(tmp_path, replace(RECIPE, steps=1, learning_rate=1e-6), start=given)
    np.testing.assert_allclose(gates, given, atol=1e-5)


@pytest.mark.full_matrix
def test_teacher_mixing_trains_too_and_is_not_self_mixing(tmp_path_factory, tmp_path):
    # Two layers: in one, both see the same input.
    path = make_model(tmp_path_factory.mktemp("two") / "model", layers=2)
    model, tokenizer = load_model(path), AutoTokenizer.from_pretrained(path)
    distances = []
    for mixing in ("self", "teacher"):
        folder = tmp_path / mixing
        run = Run(
            model,
            NeedleData(DATA, tokenizer),
            replace(ATTENTION, mixing=mixing),
            folder,
            mesh=make_mesh(),
            checkpoint_every=9,
        )
        assert replace(RECIPE, steps=2).find(run).min() < 1
        records = metrics(folder)
        assert records[0]["distillation"] < 1e-9 < records[1]["distillation"]
        distances.append(records[1]["distillation"])
    assert distances[0] != pytest.approx(distances[1], rel=1e-3)


def test_the_schedule_is_the_method_s():
    steps = np.arange(2000)
    rate = np.asarray([Distill().schedule(jnp.int32(step)) for step in range(0, 2000, 37)])
    wanted = 0.02 * np.minimum.reduce(
        [np.ones(2000), np.maximum((steps + 1) / 400, 0.1), np.maximum((2000 - steps) / 400, 0.1)]
    )
    np.testing.assert_allclose(rate, wanted[::37], rtol=1e-6)


def test_the_update_is_adamw_without_decay_then_the_projection():
    recipe = Distill(steps=10, learning_rate=0.5)
    params = recipe.init(jnp.asarray([[0.9, 0.02]]))
    gradient = {"gates": jnp.asarray([[-1.0, 2.0]]), "overshoot": jnp.zeros((1, 2))}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = recipe.optimizer().update(gradient, recipe.optimizer().init(params), params)
    # Adam's first step is the rate times the sign; the first step of a warm-up over 2 is half the peak.
    np.testing.assert_allclose(updates["gates"], [[0.25, -0.25]], rtol=1e-4)
    projected = recipe.project(optax.apply_updates(params, updates))
    np.testing.assert_array_equal(projected["gates"], [[1.0, 0.0]])
    # What was cut off is remembered, and orders gates that are equal.
    np.testing.assert_allclose(projected["overshoot"], [[0.15, -0.23]], rtol=1e-4)
    np.testing.assert_allclose(recipe.gates(projected), [[1.00015, -0.00023]], rtol=1e-5)
    # Only a push in the direction of the end counts, and only there.
    moved = {"gates": jnp.asarray([[1.0, 0.0, 0.3]]), "overshoot": jnp.asarray([[-2.0, 2.0, 2.0]])}
    np.testing.assert_array_equal(recipe.gates(moved), moved["gates"])


def test_gates_that_end_at_zero_are_ordered_by_how_long_they_are_there(start, tmp_path):
    # The penalty alone decides, so gates reach 0 in the order in which they began.
    recipe = replace(RECIPE, steps=8, learning_rate=0.3, reg_weight=1e4)
    gates = start(tmp_path, recipe, start=np.array([[0.1, 0.6, 0.3, 0.9]]))
    assert (gates < 0).all() and (gates > -0.01).all(), gates
    assert np.argsort(gates[0]).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("changed", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"warmup": 1.5}])
def test_settings_that_make_no_sense_raise(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        replace(RECIPE, **changed)
