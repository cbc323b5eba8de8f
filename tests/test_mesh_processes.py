"""Several processes on one machine find the gates of one process, and end together."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from duo_train.metrics import METRICS_FILE

from duo_jax.mesh.processes import check_alike, gather, join

# A batch of two samples of about 150 tokens; gates move in a few steps.
FLAGS = (
    *("--preset", "debug", "--distill.batch-size", "2", "--distill.learning-rate", "0.02", "--distill.reg-weight", "1"),
    *("--distill.pad-multiple", "64", "--data.min-length", "60", "--data.max-length", "60", "--data.num-lengths", "1"),
    *("--data.needle", "<{ordinal} {words}>", "--data.question", "{ordinal}?", "--data.answer", "{ordinal} {words}."),
    *("--attention.sink-size", "2", "--attention.recent-size", "8", "--attention.no-rematerialize"),
    *("--data.num-samples", "8"),  # A sample's targets are used again.
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin(model, out, count, *flags, of_last=(), devices=1):
    """`duo identify` in `count` processes, the last one with further flags."""
    words = ("identify", "--model", model, "--out", out, *FLAGS, *flags)
    return processes(count, *words, of_last=of_last, devices=devices)


def processes(count, *words, of_last=(), devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "from duo_jax.cli import main; main()", *words]
    together = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", count]
    commands = [[*command, *together, "--process-id", i] if count > 1 else command for i in range(count)]
    commands[-1] += of_last
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return [subprocess.Popen([str(word) for word in one], **pipe) for one in commands]


def end(started, timeout=200):
    try:
        return [(process.communicate(timeout=timeout), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def gates_of(folder):
    return np.loadtxt(folder / "full_attention_heads.tsv", delimiter="\t")


@pytest.fixture(scope="module")
def alone(text_model, tmp_path_factory):
    """Gates of 20 steps of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    (((_, said), code),) = end(begin(text_model, folder, 1, "--distill.steps", 20))
    assert code == 0, said
    return gates_of(folder)


@pytest.mark.process
@pytest.mark.parametrize(
    ("mesh", "devices"), [((), 1), (("--mesh", "data=2,sequence=2"), 2)], ids=["samples", "samples and tokens"]
)
def test_two_processes_find_the_gates_of_one(text_model, alone, tmp_path, mesh, devices):
    ended = end(begin(text_model, tmp_path / "out", 2, "--distill.steps", 20, *mesh, devices=devices))
    assert [code for _, code in ended] == [0, 0], ended
    np.testing.assert_allclose(gates_of(tmp_path / "out"), alone, rtol=0, atol=1e-5)
    assert ((alone > 0) & (alone < 0.9)).any()
    lines = (tmp_path / "out" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert ["gates from" in said for (said, _), _ in ended] == [True, False], "only the first prints"


@pytest.mark.process
def test_a_process_that_dies_ends_the_others_and_one_continues(text_model, alone, tmp_path):
    """Two processes share each sample's tokens; the one that resumes has them all."""
    out = tmp_path / "out"
    started = begin(text_model, out, 2, "--distill.steps", 20, "--mesh", "sequence=2")
    deadline = time.monotonic() + 200
    while not (out / METRICS_FILE).exists() or (out / METRICS_FILE).read_text().count("\n") < 5:
        if started[0].poll() is not None or time.monotonic() > deadline:
            pytest.fail(str(end(started, 1)))
        time.sleep(0.05)
    started[1].kill()
    ((_, said), code), _ = end(started, 60)
    assert code != 0 and said, "the other one has left within a minute, with an error"
    assert not (out / "full_attention_heads.tsv").exists()
    (((_, said), code),) = end(begin(text_model, out, 1, "--distill.steps", 20, "--resume"))
    assert code == 0, said
    np.testing.assert_allclose(gates_of(out), alone, rtol=0, atol=1e-5)


@pytest.mark.process
def test_processes_that_were_started_with_different_settings_are_refused(text_model, tmp_path):
    ended = end(begin(text_model, tmp_path / "out", 2, "--distill.steps", 20, of_last=("--distill.warmup", "0.3")))
    for (_, said), code in ended:
        assert code == 2, said
        assert "processes 0 and 1 were started with different settings: settings.settings.warmup is" in said
        assert "0.3 in the other" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_two_processes_share_a_model_and_its_cache(text_model, duo):
    words = ("generate", "--model", text_model, "--prompt", "The sky is", "--max-new-tokens", 4, "--json")
    wanted = json.loads(duo(*words).out)
    (((out, said), code), ((other, _), code_of_other)) = end(processes(2, *words, "--mesh", "sequence=2"))
    assert (code, code_of_other) == (0, 0), said
    found = json.loads(out.splitlines()[-1])
    assert found["tokens"] == wanted["tokens"] and "tokens" not in other
    np.testing.assert_allclose(found["logprobs"], wanted["logprobs"], rtol=0, atol=1e-5)


VERDICTS = """if True:
    import os, sys
    from duo_jax.mesh.processes import join, share_verdicts
    from pallas_kernels.certify import verdicts
    from pallas_kernels.certify.verdicts import Verdict, best
    from tests.test_certify import DECODE, GPU, know, on_gpu

    process, port = map(int, sys.argv[1:])
    os.environ["DUO_JAX_CACHE"] += str(process)
    verdicts.device = lambda: GPU
    know(triton=Verdict(process == 0, "", 1e-3, 1e-3), xla=Verdict(True, "", 1e-3, 2e-3))
    join(f"127.0.0.1:{port}", 2, process)
    print(best(on_gpu(DECODE), ("triton", "xla")))
    verdicts.device = lambda: GPU | {"cores": 132 - process}
    share_verdicts()
    print(best(on_gpu(DECODE), ("triton", "xla")))
    if process:
        os.environ["DUO_BACKEND"] = "xla"
    share_verdicts()
    """


@pytest.mark.process
def test_two_processes_choose_by_the_verdicts_of_the_first(tmp_path):
    port, root = free_port(), str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    options = {"JAX_PLATFORMS": "cpu", "DUO_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | options}
    command = [sys.executable, "-c", VERDICTS]
    ended = end([subprocess.Popen([*command, str(process), str(port)], **pipe) for process in range(2)])
    for (printed, said), code in ended:
        assert printed.split()[-2:] == ["triton", "xla"] and code != 0, said  # After what Gloo prints.
        assert "processes 0 and 1 differ: device.cores is 132 in the first, 131 in the other" in said
        assert "different settings: DUO_BACKEND is None in the first, 'xla' in the other" in said


def test_one_process_agrees_with_itself():
    check_alike({"a": 1})
    assert gather([3, 4]) == [[3, 4]]


def test_half_of_what_joining_needs_is_refused(duo, text_model, tmp_path):
    with pytest.raises(ValueError, match=r"coordinator, processes and process_id.*\['process_id'\]"):
        join("localhost:1", 2)
    with pytest.raises(ValueError, match=r"process_id must be in \[0, 2\), got 2"):
        join("localhost:1", 2, 2)
    result = duo("identify", "--model", text_model, "--out", tmp_path / "out", "--processes", 2)
    assert result.code == 2 and "add --distributed" in result.err
