"""What would run on GPUs that are not here: `duo doctor --pretend`, the chunks, and the planner's number of tokens."""

import json
import subprocess
import sys

import pytest

from duo_jax.cli.pretend import lines_of, pretend
from duo_jax.generation.chunks import chunk_width, most_at_a_time
from pallas_kernels import mosaic, xla
from pallas_kernels.gpus import GPUS, chip, find_gpu, tracing_for
from pallas_kernels.types import OPERATIONS
from tests.text_models import assert_refused


@pytest.fixture(autouse=True)
def assembler(monkeypatch):
    monkeypatch.setattr(mosaic, "ptxas_version", lambda backend: (12, 9, 86))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_candidates_and_a_reason_for_every_other_backend(name):
    found = pretend(name)
    for heads, operations in found["heads"].items():
        assert set(OPERATIONS) - set(operations) == ({"training"} if "server" in heads else set())
        for operation in set(OPERATIONS) & set(operations):
            chosen = operations[operation]
            assert chosen["candidates"][-1] == "xla" and chosen["candidates"][0] != "xla"
            assert not set(chosen["candidates"]) & set(chosen["refused"])
            assert {"triton", "xla", "mosaic", "jax_triton"} <= {*chosen["candidates"], *chosen["refused"]}
            assert ("triton" in chosen["tiles"]) == (operation != "append")
    text = "\n".join(lines_of(found))
    assert GPUS[name].name in text and "Certification on the GPU" in text and "8192" in text
    plain = found["heads"]["bfloat16, head dim 128"]
    assert (plain["prefill"]["candidates"][0] == "mosaic") == (GPUS[name].capability == (9, 0))


def test_the_command_pretends_in_text_and_json_and_names_the_gpus(duo):
    assert "not mosaic: it is for GPUs from Ampere to Hopper" in duo("doctor", "--pretend", "b200").out
    found = json.loads(duo("doctor", "--pretend", "H100", "--json").out)
    assert found["gpu"] == "NVIDIA H100 80GB HBM3" and found["cores"] == 132
    for name, key in (("H100 NVL", "h100-nvl"), ("4090", "rtx-4090"), ("nvidia  geforce RTX 5090", "rtx-5090")):
        assert find_gpu(name) is GPUS[key]
    for gpu in GPUS.values():  # As nvidia-smi prints them.
        assert find_gpu(gpu.name) is gpu
    way = "the compute capability will do, as in 8.9"
    assert_refused(duo("doctor", "--pretend", "abacus"), "unknown GPU 'abacus'", "gh200", "rtx-5090", way)
    assert_refused(duo("doctor", "--tune"), "--tune needs a GPU of NVIDIA, this is cpu")
    for others in (("--tune",), ("--certify", "smollm2-135m-instruct"), ("--tune", "--certify", "x")):
        assert_refused(duo("doctor", "--pretend", "h100", *others), "are three tasks: give one of them")


@pytest.mark.parametrize(
    ("names", "candidates", "shared"),
    [
        (("7.0", "sm_75"), ["xla"], 64),  # V100, T4
        (("8.0", "sm_86", "8.9"), ["triton", "cudnn", "xla"], 99),  # A800; A2; RTX 4080
        (("9.0", "sm_90a"), ["mosaic", "triton", "cudnn", "xla"], 227),
        (("10.0", "sm_103", "12.1"), ["triton", "cudnn", "xla"], 99),  # GB200, B300, GB10
    ],
)
def test_a_compute_capability_is_enough_for_a_gpu_without_a_name(names, candidates, shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "pallas_kernels.jax_triton.launch", None)
    for name in names:
        found = pretend(name)
        assert found["heads"]["bfloat16, head dim 128"]["prefill"]["candidates"] == candidates
        assert "unknown multiprocessors" in next(lines_of(found))
    assert found["shared_memory"] == shared << 10


def test_a_suspected_assembler_is_named_where_its_kernels_could_run(monkeypatch):
    monkeypatch.setattr("duo_jax.cli.pretend.ptxas_version", lambda backend: (13, 0, 88))
    for name, is_told in (("h100", True), ("rtx-3090", False)):
        assert any("13.0.88 (suspected" in line for line in lines_of(pretend(name))) == is_told


def test_constants_that_were_tuned_on_a_cpu_leave_gpus_alone():
    assert most_at_a_time() == most_at_a_time(32) == chunk_width(1 << 20) == 1024
    assert chunk_width(1 << 20, rows=32) == xla.k_block("decode") * 2 == xla.k_block("prefill") * 2 == 1024
    for name in ("a10", "h200"):
        with tracing_for(find_gpu(name)):
            assert most_at_a_time() == chunk_width(1 << 20) == 8192
            # Rows of a batch share them: memory for activations does not grow with the batch.
            assert [most_at_a_time(rows) for rows in (2, 3, 8, 100)] == [4096, 2048, 1024, 1024]
            assert chunk_width(1 << 20, rows=2) == 4096
            assert chunk_width(40) == 64
            assert xla.k_block("decode") == 16_384 and xla.k_block("prefill") == 4096
    assert most_at_a_time(on_gpu=True) == 8192


def test_a_chip_is_known_by_capability_multiprocessors_and_shared_memory():
    found = {}
    for name, gpu in GPUS.items():
        with tracing_for(gpu):
            assert chip() == gpu.chip
        found.setdefault(gpu.chip, []).append(name)
    assert ["h100-80g", "h100-nvl", "gh200", "gh200-144g", "h200"] in found.values()
    assert {gpu.chip.shared_memory >> 10 for gpu in GPUS.values()} == {99, 163, 227}
    assert chip().capability is None


def test_without_pallas_s_lowering_to_triton_other_backends_take_its_place():
    """Jax will remove it."""
    program = "import sys; sys.modules['jax.experimental.pallas.triton'] = None; from duo_jax.cli import main; main()"
    for name, first in (("h100", {"prefill": "mosaic", "decode": "mosaic"}), ("a100", {})):
        command = [sys.executable, "-c", program, "doctor", "--pretend", name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and not done.stderr, done
        plain = json.loads(done.stdout)["heads"]["bfloat16, head dim 128"]
        for operation in OPERATIONS:
            candidates, refused = plain[operation]["candidates"], plain[operation]["refused"]
            assert "cannot be imported with jax" in refused["triton"] and candidates[-1] == "xla"
            if "jax_triton" in refused:  # Else jax_triton and triton are installed.
                assert "needs jax-triton" in refused["jax_triton"] or "has no kernel" in refused["jax_triton"]
                assert operation not in first or candidates[0] == first[operation]
