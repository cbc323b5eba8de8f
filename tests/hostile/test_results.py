"""Files of results, metrics and checkpoints of another shape: refused by name and left as they are, or listed."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.runner.record import Record, read
from duo_eval.show.registry import about, type_of
from duo_train.checkpoints import Checkpoints
from duo_train.metrics import MetricsWriter, read_metrics

from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.differences import changes
from tests.text_models import assert_refused, make_model

RESULTS = Path(__file__).parents[2] / "eval" / "results"
ABOUT = {"task": "test"}
HEAD = {"about": ABOUT, "gates": {}, "runs": []}
JOB = {"method": "duo", "budget": 0.5, "sample": 0}
DEEP = "[" * 500 + "]" * 500


def lines(*values):
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


REFUSED = {
    "list": lines([]),
    "text": lines('"about"'),
    "null": lines("null"),
    "about is a list": lines({"about": [], "runs": []}, {"job": JOB}),
    "runs are an object": lines({"about": {}, "runs": {}}, {"job": JOB}),
    "a run is a number": lines({"about": {}, "runs": [1]}, {"job": JOB}),
    "a run's dtype is a list": lines({"about": {}, "runs": [{"dtype": []}]}, {"job": JOB}),
    "gates are a list": lines({"about": {}, "runs": [], "gates": []}),
    "a gate is a number": lines({"about": {}, "runs": [], "gates": {"a": 1}}),
    "job is a list": lines(HEAD, {"job": [1]}),
    "job is a text": lines(HEAD, {"job": "duo"}),
    "job is null": lines(HEAD, {"job": None}),
    "result is a list": lines(HEAD, [JOB]),
    "score is a text": lines(HEAD, {"job": JOB, "score": "1"}),
    "score is NaN": lines(HEAD, '{"job": {}, "score": NaN}'),
    "deep result": lines(HEAD, f'{{"job": {{}}, "a": {DEEP}}}'),
    "deep head": lines(f'{{"about": {DEEP}, "runs": []}}'),
    "a name twice": lines(HEAD, '{"job": {}, "job": {}}'),
    "400 digits": lines(HEAD, f'{{"job": {{}}, "score": {"1" * 400}}}'),
    "results are numbers": json.dumps(HEAD | {"results": [1]}),
    "results have a text as score": json.dumps(HEAD | {"results": [{"score": "1"}]}),
    "settings are a list": json.dumps({"machine": {}, "settings": [], "results": []}),
    "command is a list": json.dumps({"machine": {}, "command": [], "results": []}),
    "an object, then more": lines(HEAD | {"results": []}, {"job": JOB}),
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_results_of_another_shape_are_refused_and_left_alone(text, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.jsonl.*choose another --out") as refusal:
        Record.open(path, ABOUT)
    assert path.read_text() == text and len(str(refusal.value)) < len(str(path)) + 250


@pytest.mark.parametrize("job", [{}, {"method": "duo"}, JOB | {"budget": "0.5"}, JOB | {"sample": True}, {"point": 1}])
def test_a_job_of_another_shape_is_not_kept(job, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(lines(HEAD, {"job": job, "score": 1.0}))
    with pytest.raises(ValueError, match="has a job of another shape"):
        Record.open(path, ABOUT).missing([JOB])
    more = JOB | {"sink_size": 4}
    path.write_text(lines(HEAD, {"job": more, "score": 1.0}))
    assert Record.open(path, ABOUT).missing([JOB, more]) == [JOB]


def test_results_go_on_in_any_order_of_fields_and_after_a_kill(tmp_path):
    path = tmp_path / "r.j"
    path.write_text(lines(HEAD, {"score": 1, "job": JOB}, "") + '{"job": {"met')
    assert read(path)[1] == [{"score": 1, "job": JOB}]
    with Record.open(path, ABOUT).writing() as append:
        append(JOB | {"sample": 1}, {"score": 0.5})
    assert [result["score"] for result in read(path)[1]] == [1, 0.5]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_numbers_that_are_not_finite_are_written_as_null(name, tmp_path):
    with Record.open(tmp_path / name, ABOUT).writing() as append:
        append(JOB, {"score": 1.0, "loss": [float("nan"), 2.0], "more": {"a": float("inf")}})
    assert read(tmp_path / name)[1] == [{"job": JOB, "score": 1.0, "loss": [None, 2.0], "more": {"a": None}}]


def test_the_name_of_a_file_does_not_decide_its_type(tmp_path):
    for name in ("needle.jsonl", "bench.json"):
        kind = type_of(RESULTS / "cpu" / name)
        for other in ("r.j", "r", "r.txt"):
            shutil.copy(RESULTS / "cpu" / name, tmp_path / other)
            assert type_of(tmp_path / other) is kind is not None and about(tmp_path / other)["commit"]
    (tmp_path / "notes.txt").write_text("mine")
    assert type_of(tmp_path / "notes.txt") is None


def test_a_report_lists_what_is_no_result(duo, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    os.mkfifo(folder / "fifo.json")
    os.mkfifo(folder / "other")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "about.jsonl").write_text("[]\n")
    (folder / "shape.jsonl").write_text(
        lines({"about": {"task": "needle"}, "gates": {}, "runs": []}, {"job": {}, "score": 1})
    )
    done = duo("report", "--results", folder, "--out", tmp_path / "r.html")
    assert done.code == 2 and "Traceback" not in done.err and "4 files could not be shown" in done.err
    for name in ("fifo.json", "zero.jsonl", "about.jsonl", "shape.jsonl"):
        assert name in done.err and name in (tmp_path / "r.html").read_text()
    assert_refused(duo("eval", "plot", folder / "shape.jsonl"), "shape.jsonl has results of another shape")


@pytest.mark.parametrize(
    "line", ["[1]", "{}", '{"step": true}', f'{{"step": {"1" * 400}}}', f'{{"step": 1, "a": {DEEP}}}', '{"step": NaN}']
)
def test_metrics_of_another_shape_are_refused(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = lines({"step": 1, "loss": 1.0}, line)
    path.write_text(text)
    for use in (read_metrics, lambda path: MetricsWriter(path, 5)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
            use(path)
    assert path.read_text() == text


def test_metrics_go_on_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines({"step": 1}, {"step": 2}, {"step": 3}) + '{"step": 4, "lo')
    MetricsWriter(path, 2).write({"step": 3})
    np.testing.assert_array_equal(read_metrics(path)["step"], [1, 2, 3])


def test_other_weights_of_the_same_name_are_distinguished(tmp_path):
    path = make_model(tmp_path / "m")
    first = weights_fingerprint(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "dtype": "float16"}))
    (path / "adapter.safetensors").write_bytes(b"not read by the loader")
    os.utime(path / "model.safetensors", (0, 0))
    assert weights_fingerprint(path) == first
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert weights_fingerprint(path) != first
    (path / "config.json").write_text(json.dumps(config))
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    other = weights_fingerprint(path)
    assert other != first
    out = tmp_path / "r.jsonl"
    out.write_text(lines(HEAD))  # Of an older version, without a fingerprint.
    with Record.open(out, ABOUT, {"weights": first}).writing():
        pass
    with pytest.raises(ValueError, match="made with other weights under the same name; choose another --out"):
        Record.open(out, ABOUT, {"weights": other})


def empty(step):
    for path in (step / "default").rglob("d/*"):
        path.write_bytes(b"")


DAMAGES = {
    "data of no bytes": empty,
    "no folder": lambda step: shutil.rmtree(step / "default"),
    "no metadata": lambda step: (step / "default" / "_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_way_out(damage, tmp_path, capfd):
    # Arrays enough that some are still read when the first has failed.
    state = {"a": jnp.ones((2, 3)), "b": jnp.int32(1), **{f"x{i}": jnp.ones(3) for i in range(20)}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state, force=True)
    DAMAGES[damage](tmp_path / "checkpoints" / "4")
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"checkpoint of step 4 cannot be read: remove .*4 to resume from step 2") as e,
    ):
        checkpoints.restore(state)
    assert len(str(e.value).splitlines()) == 1 and "Traceback" not in capfd.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(state)["a"], state["a"])
        for like in (state | {"a": jnp.ones((2, 4))}, {"a": state["a"]}, state | {"a": jnp.ones((2, 3), jnp.int32)}):
            with pytest.raises(ValueError, match="checkpoint of step 2 cannot be read"):
                checkpoints.restore(like)


def test_settings_of_a_strange_file_are_cut_in_a_message():
    phrases = changes({}, {f"{number}{'x' * 999}": ["y" * 999] * 999 for number in range(99)})
    assert phrases[-1] == "94 more" and len("; ".join(phrases)) < 1000


def test_a_change_shows_the_name_of_a_file_and_first_what_both_have():
    phrases = changes({"z": 1}, {"z": 2, **{letter: 0 for letter in "abcdef"}, f"/long{'x' * 99}/task.yaml": 3})
    assert phrases[0] == "z was 1, now 2" and len(phrases) == 6
    assert "/task.yaml was 3" in changes({f"/long{'x' * 99}/task.yaml": 3}, {f"/long{'x' * 99}/task.yaml": 4})[0]
