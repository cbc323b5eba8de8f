"""Which backends are candidates where, by what a device is and what is asked; and what the default is."""

import os
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from pallas_kernels import BACKENDS, Unsupported, mosaic, ops, ptxas
from pallas_kernels.backends import candidates, find_backend
from pallas_kernels.certify import verdicts
from pallas_kernels.types import OPERATIONS, Request

REQUEST = Request("decode", "NVIDIA Abacus", frozenset(["bfloat16"]), head_dim=128, group=4, capacities=(1024, 320))
# Compute capabilities, and the candidates of prefill, decode, append and training for the heads of most models.
ORDER = {
    None: ("xla", "xla", "xla", "xla"),
    (7, 5): ("xla", "xla", "xla", "xla"),
    (8, 0): ("triton jax_triton mosaic cudnn xla", "triton jax_triton xla", "triton xla", "triton jax_triton xla"),
    (8, 9): ("triton jax_triton mosaic cudnn xla", "triton jax_triton xla", "triton xla", "triton jax_triton xla"),
    (9, 0): (
        "mosaic triton jax_triton cudnn xla",
        "triton jax_triton mosaic xla",
        "triton xla",
        "triton jax_triton xla",
    ),
    (10, 0): ("triton jax_triton cudnn xla", "triton jax_triton xla", "triton xla", "triton jax_triton xla"),
    (12, 0): ("triton jax_triton cudnn xla", "triton jax_triton xla", "triton xla", "triton jax_triton xla"),
}
# What falls through to which candidates on Hopper, of prefill and decode.
FALLS = [
    ({"head_dim": 80}, "triton jax_triton cudnn xla", "triton jax_triton xla"),
    ({"head_dim": 512}, "xla", "xla"),
    ({"dtypes": frozenset(["float32"])}, "triton jax_triton xla", "triton jax_triton xla"),
    ({"bits": frozenset([4])}, "mosaic triton jax_triton xla", "triton jax_triton xla"),
    ({"bits": frozenset([4]), "head_dim": 96}, "triton jax_triton xla", "xla"),
    ({"capacities": (1023, 320)}, "triton jax_triton cudnn xla", "triton jax_triton xla"),
    ({"is_sharded": True}, "triton jax_triton xla", "triton jax_triton xla"),
    ({"page": 128}, "mosaic triton jax_triton xla", "triton jax_triton mosaic xla"),
]


@pytest.fixture(autouse=True)
def compilers(monkeypatch):
    """jax_triton is installed, jax is new enough for Mosaic on Ampere, whose assembler has no known faults."""
    name = "pallas_kernels.jax_triton.launch"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(mosaic, "ptxas_version", lambda backend: (12, 9, 86))
    monkeypatch.setattr(mosaic.ampere, "is_available", lambda: True)


def names(**changes):
    return " ".join(candidates(replace(REQUEST, **changes)))


@pytest.mark.parametrize("capability", ORDER)
def test_candidates_follow_from_operation_and_capability(capability):
    found = tuple(names(operation=operation, capability=capability) for operation in OPERATIONS)
    assert found == ORDER[capability]


@pytest.mark.parametrize(("changes", "prefill", "decode"), FALLS)
def test_what_a_backend_cannot_do_falls_to_the_next_one(changes, prefill, decode):
    assert names(operation="prefill", capability=(9, 0), **changes) == prefill
    assert names(operation="decode", capability=(9, 0), **changes) == decode


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), True), ((8, 6), False), ((8, 9), False), ((12, 0), False)])
def test_float32_of_large_head_dims_needs_the_shared_memory_of_an_a100(capability, fits):
    large = {"dtypes": frozenset(["float32"]), "head_dim": 256, "capability": capability}
    expected = "triton jax_triton xla" if fits else "xla"
    assert names(operation="prefill", **large) == names(operation="training", **large) == expected
    assert names(operation="decode", **large) == "triton jax_triton xla"
    assert names(operation="prefill", **large | {"head_dim": 128}) == "triton jax_triton xla"


@pytest.mark.parametrize(
    ("version", "is_bad"),
    [((12, 6, 85), False), ((12, 8, 61), True), ((12, 9, 41), True), ((12, 9, 86), False), ((13, 0, 88), False)],
)
def test_mosaic_refuses_assemblers_that_miscompile(version, is_bad, monkeypatch):
    monkeypatch.setattr(mosaic, "ptxas_version", lambda backend: version)
    found = names(operation="prefill", capability=(9, 0))
    assert found == ("triton jax_triton cudnn xla" if is_bad else "mosaic triton jax_triton cudnn xla")
    if is_bad:
        with pytest.raises(Unsupported, match=rf"needs another ptxas than {'.'.join(map(str, version))}, .*use backen"):
            ops.choose(replace(REQUEST, operation="prefill", capability=(9, 0)), "mosaic")


def test_mosaic_on_ampere_has_prefill_where_jax_can_compile_it(monkeypatch):
    """Rings and slots have a tile at least; decode, and GPUs that are neither Hopper's nor before, are refused."""
    ask = replace(REQUEST, operation="prefill", capability=(8, 6))
    refuses = mosaic.BACKEND.supports
    assert refuses(ask) is None and refuses(replace(ask, bits=frozenset([4]))) is None
    assert "cache length and a window size" in refuses(replace(ask, capacities=(1024, 24)))
    assert "head dims of 64 or 128, got 80" in refuses(replace(ask, head_dim=80))
    assert refuses(replace(ask, operation="decode")) == "has no kernel for decode"
    assert refuses(replace(ask, capability=(12, 0))) == "is for GPUs from Ampere to Hopper, this is NVIDIA Abacus"
    monkeypatch.setattr(mosaic.ampere, "is_available", lambda: False)
    assert refuses(ask).startswith("needs jax 0.11.2 or newer")


def test_the_assembler_is_found_where_jax_finds_it(tmp_path, monkeypatch):
    def install(folder, printed):
        path = tmp_path / folder / "ptxas"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho '{printed}'\n")
        path.chmod(0o755)

    install("broken", "no version")
    install("old", "release 11.4, V11.4.120")
    install("path", "Cuda compilation tools, release 12.8, V12.8.93")
    install("root/bin", "Cuda compilation tools, release 13.1, V13.1.80")
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("none", "broken", "old", "path")))
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "root"))
    ptxas.ptxas_version.cache_clear()
    # Only XLA's own kernels are assembled with the toolkit that jax was pointed to.
    assert ptxas.ptxas_version("mosaic") == (12, 8, 93) and ptxas.ptxas_version("triton") == (13, 1, 80)
    ptxas.ptxas_version.cache_clear()


def test_every_refusal_gives_a_reason():
    with pytest.raises(Unsupported, match=r"the mosaic backend takes bfloat16 .* got float32: use .*'xla'"):
        ops.choose(replace(REQUEST, device="cpu", dtypes=frozenset(["float32"]), head_dim=64), "mosaic")
    for name in BACKENDS:
        for operation in OPERATIONS:
            for capability in ORDER:
                reason = find_backend(name).supports(replace(REQUEST, operation=operation, capability=capability))
                assert reason is None or reason.startswith(("takes", "has no", "needs", "is for", "runs only"))


def test_a_gpu_without_verdicts_falls_back_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path))
    requests = [replace(REQUEST, operation=name, capability=(9, 0)) for name in OPERATIONS]
    verdicts.forget()
    for request in requests:
        with pytest.warns(UserWarning, match="on 'xla', .* on NVIDIA Abacus .*duo doctor --certify MODEL"):
            assert ops.choose(request).name == "xla"
    assert [ops.choose(request).name for request in requests] == ["xla"] * 4  # A second warning would be an error.
    verdicts.forget()
