"""The suite for GPUs runs from end to end on a CPU at toy sizes, resumes, and notices wrong numbers."""

import json
import os
import subprocess
import sys
from pkgutil import resolve_name

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.gpu_suite import __main__ as command
from duo_eval.gpu_suite import check, decode, numerics, sections
from duo_eval.gpu_suite.__main__ import SECTIONS, Suite
from duo_eval.runner.process import ProcessError, Worker, first_line

from pallas_kernels import layer, ops
from pallas_kernels.types import OPERATIONS


@pytest.mark.process
def test_the_command_measures_every_section_and_resumes(tmp_path):
    suite = [sys.executable, "-m", "duo_eval.gpu_suite", "--smoke", "--out", str(tmp_path)]
    # Much is compiled here, and run once.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    stopped = subprocess.run([*suite, "--minutes", "0"], capture_output=True, text=True, env=environment)
    assert stopped.returncode == 75 and "call again" in stopped.stdout
    done = subprocess.run([*suite, "--minutes", "60"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SECTIONS}
    results = [result for record in records.values() for result in record["results"]]
    assert not [result for result in results if "failed" in result]
    for name in ("first", "prefill", "decode", "addresses"):
        ran = [result for result in records[name]["results"] if "cannot" not in result]
        assert ran and all(result["is_right"] and result["differing_runs"] == 0 for result in ran)
    (tuned,) = records["tune"]["results"][0]["tiles"].values()
    assert tuned["decode"]
    judged = [result for result in records["numerics"]["results"] if "cannot" not in result]
    assert all(result["is_right"] for result in judged)
    assert {result["case"]["backend"] for result in judged} == {"triton"}
    assert {result["case"]["operation"] for result in judged} == {*OPERATIONS}
    ceilings = records["ceilings"]
    assert ceilings["about"]["device"] == "cpu" and ceilings["runs"][0]["machine"]["versions"]["jax"]
    again = subprocess.run(suite, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout == ""


def test_a_wrong_kernel_is_noticed(monkeypatch):
    case = next(case for case in numerics.cases(smoke=True) if case["operation"] == "decode") | {"backend": "xla"}
    assert numerics.measure(case)["is_right"]
    right = ops.decode_part
    for wrong in (lambda out: out * 1.02, lambda out: out.at[0, 0, 0].set(float("nan"))):

        def decode(*args, wrong=wrong, **kwargs):
            part = right(*args, **kwargs)
            return part._replace(out=wrong(part.out)) if kwargs["backend"] == "xla" else part

        monkeypatch.setattr(ops, "decode_part", decode)
        assert not numerics.measure(case)["is_right"]


@pytest.mark.parametrize("cache", [None, pytest.param("int4", marks=pytest.mark.full_matrix)])
def test_a_measured_call_is_compared_and_repeated(cache):
    size = {"heads": (4, 2, 16), "dtype": "bfloat16", "streaming": 0.5, "capacity": 40, "batch": 2, "cache": cache}
    lengths = jnp.array([37, 6], jnp.int32)
    made = check.hide(layer.make(tokens=1, **size), lengths)
    calls = iter(range(100))

    def judge(change):
        def attend(made):
            return change(made.decode(lengths=lengths, backend="xla"))

        return check.check(attend, made, start=lengths)

    def once(out):
        noise = jax.pure_callback(lambda: np.float32(next(calls) == 9) / 64, jax.ShapeDtypeStruct((), jnp.float32))
        return out + noise.astype(out.dtype)

    assert judge(lambda out: out)["is_right"]
    for wrong in (lambda out: out * 1.05, lambda out: out.at[1, 0, 3, 5].set(jnp.nan)):
        assert not judge(wrong)["is_right"]
    found = judge(once)
    assert found["differing_runs"] == 1 and found["error"] < 1e-2 and not found["is_right"]
    assert "1 of 20 runs differ" in check.verdict(found)


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(check, "available", lambda: 10_000_000)
    case = next(decode.cases(smoke=False)) | {"backend": "xla"}
    assert sections.measure("decode", case) == {"cannot": "Unsupported: needs 0.404 GB of memory, 0.01 GB are free"}


class Here(Worker):
    """Calls functions in this process."""

    def call(self, function, arguments=None):
        try:
            return resolve_name(function)(**(arguments or {}))
        except Exception as error:
            raise ProcessError(first_line(error)) from None


def test_a_call_that_hangs_or_breaks_its_process_costs_only_itself(capfd):
    with Worker(2.0) as worker:
        with pytest.raises(ProcessError, match="no answer within 2 s"):
            worker.call("signal:pause")
        with pytest.raises(ProcessError, match="exited with code 3") as ended:
            worker.call("os:_exit", {"status": 3})
        assert ended.value.exit_code == 3
        with pytest.raises(ProcessError, match="JSONDecodeError: Expecting value"):
            worker.call("json:loads", {"s": "soon"})
        assert "Traceback" in capfd.readouterr().err
        first = worker.call("os:getpid")
        assert first == worker.call("os:getpid") != os.getpid()


def test_what_cannot_be_is_refused_or_written_down(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown sections speed; there are ceilings"):
        Suite(tmp_path, sections=("speed",)).run()
    with pytest.raises(ValueError, match="no GPU here"):
        Suite(tmp_path, sections=("ceilings",)).run()
    suite = Suite(tmp_path, sections=("ceilings",), smoke=True)
    monkeypatch.setattr(command, "Worker", Here)
    monkeypatch.setattr(SECTIONS["ceilings"], "measure", lambda case: 1 / 0)
    with pytest.raises(ArithmeticError, match=r"2 results in .* are wrong or failed"):
        suite.run()
    results = json.loads((tmp_path / "ceilings.json").read_text())["results"]
    assert [result["failed"] for result in results] == ["ZeroDivisionError: division by zero"] * 2
    record = json.loads((tmp_path / "ceilings.json").read_text())
    record["about"]["device"] = "NVIDIA Abacus"
    (tmp_path / "ceilings.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="other settings: device was 'NVIDIA Abacus'"):
        suite.run()
