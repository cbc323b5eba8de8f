"""Certification: verdicts on backends that are right, wrong, slow or broken, and the file that keeps them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import is_dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from duo_eval.runner.run import Comparison
from duo_eval.speed.efficiency import Efficiency
from duo_eval.speed.training import Training
from duo_train.devices import ShardedModel
from duo_train.gated import GatedModel
from filelock import FileLock

import duo_jax
from duo_jax import KVCache, Model, certified, make_mesh
from duo_jax.cache import store
from duo_jax.cache.spec import CacheSpec
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.certify import certify_for, requests_of
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.doctor import Doctor
from duo_jax.cli.generate import Generate
from duo_jax.cli.listing import Patterns
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions
from duo_jax.cli.quantize import Quantize
from duo_jax.cli.serve import Serve
from duo_jax.generation import infer
from duo_jax.mesh import processes
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.place import place_model
from duo_jax.plan import Plan, any_pattern
from duo_jax.serve.sizing import plan_sizes
from duo_jax.serve.start import start_engine, stored_for_engine
from pallas_kernels import cudnn, ops, segments, xla_train
from pallas_kernels.append import scatter
from pallas_kernels.certify import __main__ as child
from pallas_kernels.certify import cases, machine, parent, verdicts
from pallas_kernels.certify.examine import examine
from pallas_kernels.certify.messages import OURS, from_json, to_json
from pallas_kernels.certify.verdicts import Found, Verdict, best, key_of
from pallas_kernels.errors import is_no_memory
from pallas_kernels.segments import segment
from pallas_kernels.tiles import forget_tuned, tiles_for, tiles_of, tuned_file
from pallas_kernels.triton import flash
from pallas_kernels.triton.decode import attend_to_slots
from pallas_kernels.types import Backend, Partial, Request
from pallas_kernels.window import Window
from tests.shapes import TINY
from tests.text_models import assert_refused

DECODE = Request.of("decode", q="float32", full="float32", head_dim=16, group=1, window=Window(0, 0))
PREFILL = Request.of("prefill", q="bfloat16", full="int8", ring="bfloat16", head_dim=16, group=2, window=Window(4, 12))
SHORT = replace(PREFILL, is_short=True)

# Backends as a user would write one, in modules of their own. Each decodes with `xla` first.
BACKENDS = {
    "right": "out",
    "wrong": "out._replace(out=out.out * 1.5)",
    "offset": "out._replace(log_sum=out.log_sum + 1e-3)",
    "unmasked": "xla.decode(q, pools, heads, lengths=lengths + 1, **options)",
    "flaky": "out._replace(out=out.out * jax.pure_callback(sometimes, jax.ShapeDtypeStruct((), 'float32')))",
    "slow": "out._replace(out=out.out * jax.pure_callback(later, jax.ShapeDtypeStruct((), 'float32')))",
    "hanging": "out._replace(out=out.out * jax.pure_callback(never, jax.ShapeDtypeStruct((), 'float32')))",
    "crashing": "out._replace(out=out.out * jax.pure_callback(crash, jax.ShapeDtypeStruct((), 'float32')))",
    "exiting": "os._exit(7)",
    "failing": "out._replace(out=out.out * jax.pure_callback(fail, jax.ShapeDtypeStruct((), 'float32')))",
    "uncompilable": "compile(out)",
    "exhausted": "exhaust()",
    "forking": "fork()",
    "closing": "close()",
    "loud": "speak(out)",
}
SOURCE = """
import os, signal, time
import jax, numpy as np
from pallas_kernels import xla
from pallas_kernels.tiles import forget_tuned, tiles_for, tuned_file
from pallas_kernels.types import Backend

calls = 0

def sometimes():
    global calls
    calls += 1
    return np.float32(1 + 1e-6 * (calls == 12))

def later():
    time.sleep(0.02)
    return np.float32(1)

def never():
    time.sleep(600)
    return np.float32(1)

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def fail():
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

def compile(out):
    raise NotImplementedError("no lowering for it")

def exhaust():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

def fork():
    if not os.fork():
        time.sleep(600)
    os._exit(9)

def close():
    os.closerange(1, 4096)
    time.sleep(600)

def speak(out):
    for _ in range(100):
        os.write(2, b"loud " * 200_000)
    os.write(1, b'{"certify": true, "end": true}' + bytes(range(256)))
    return out

def decode(q, pools, heads, *, lengths, **options):
    out = xla.decode(q, pools, heads, lengths=lengths, **options)
    return {}

BACKEND = Backend("NAME", lambda request: None, decode=decode)
"""
GPU = {"kind": "NVIDIA Pretended", "capability": "9.0", "cores": 132, "shared_memory": 232448}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own on a machine with a GPU, as far as this process can tell, and the pretended backends."""
    for name, result in BACKENDS.items():
        (tmp_path / "pretended").mkdir(exist_ok=True)
        source = SOURCE.replace("{}", result).replace("NAME", f"pretended.{name}")
        (tmp_path / "pretended" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path / "cache"))
    for name in ("DUO_CERTIFY", "DUO_BACKEND"):
        monkeypatch.setenv(name, "")  # So that what a command sets is taken back.
        monkeypatch.delenv(name)
    monkeypatch.setattr(parent, "may_have_gpu", lambda: True)
    machine.environment.cache_clear()
    verdicts.forget()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("pretended")]:
        del sys.modules[name]
    machine.environment.cache_clear()
    verdicts.forget()


def names(*short):
    return ["xla", *(f"pretended.{name}" for name in short)]


def on_gpu(request):
    return replace(request, device=GPU["kind"], capability=(9, 0))


def know(**found):
    """Verdicts on DECODE, found on the pretended GPU."""
    verdicts.add(Found({key_of(DECODE): found}, {key_of(DECODE)}, GPU))


def test_a_request_survives_the_way_to_the_other_process():
    sharded = replace(DECODE, is_sharded=True)
    training = Request.of("training", q="bfloat16", head_dim=64, group=3)
    for request in (DECODE, PREFILL, SHORT, sharded, training):
        assert from_json(json.loads(json.dumps(to_json(request)))) == request
    assert len({key_of(request) for request in (DECODE, PREFILL, SHORT, sharded, training)}) == 5
    assert key_of(PREFILL) == "prefill bfloat16, head dim 16, group 2, window 4+12, full int8, ring bfloat16"


def test_each_backend_ends_as_it_should(home):
    """In this process, as far as it survives."""
    lines = []
    order = {"requests": [to_json(DECODE)], "device": None, "skip": []}
    backends = names("right", "wrong", "offset", "unmasked", "flaky", "uncompilable", "exhausted")
    child.serve(order | {"backends": backends}, lambda **line: lines.append(line))
    found = {line["settled"][1].removeprefix("pretended."): line["verdict"] for line in lines if "settled" in line}
    assert [name for name, verdict in found.items() if verdict["is_right"]] == ["xla", "right"]
    assert found["wrong"]["reason"].startswith("wrong numbers: error 5.0e-01 of out")
    # Its outputs are right, but not with a learned sink.
    assert found["offset"]["reason"].startswith("wrong numbers: error 1.0e-03 of log_sum")
    # It reads one token too many, which is NaN.
    assert found["unmasked"]["error"] == float("inf")
    assert found["flaky"]["reason"].startswith("differs from run to run: run ")
    assert found["uncompilable"]["reason"] == "does not compile: no lowering for it"
    assert [line["unknown"][1] for line in lines if "unknown" in line] == ["pretended.exhausted"]
    assert lines[-1] == {"end": True}


def test_a_process_that_lost_the_device_asks_for_another(home):
    lines = []
    order = {"requests": [to_json(DECODE)], "device": None, "skip": [[key_of(DECODE), "xla"]]}
    order |= {"backends": names("failing", "right")}
    child.serve(order, lambda **line: lines.append(line))
    assert lines[-1] == {"again": True} and lines[-2]["verdict"]["reason"].startswith("fails: ")


class Reports:
    """Stands for the process: it says these lines, then hangs (None) or ends (b"")."""

    def __init__(self, *scripts):
        self.scripts, self.orders = list(scripts), []

    def __call__(self, order):
        self.orders.append(order)
        script = self.scripts.pop(0)
        self.lines = [line if line in (None, b"") else json.dumps({OURS: True} | line).encode() for line in script]
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, seconds):
        return self.lines.pop(0)

    def how_it_ended(self):
        return f"was ended by {self.ended_by.name}", self.ended_by

    ended_by = signal.SIGSEGV


KEY = key_of(DECODE)
BEGIN = [{"device": GPU}, {"jobs": [[KEY, "xla"], [KEY, "triton"], [KEY, "mosaic"]]}]


def at(name, phase="run"):
    return {"begin": [KEY, name], "phase": phase}


def right(name, seconds):
    return {"settled": [KEY, name], "verdict": {"is_right": True, "error": 1e-3, "seconds": seconds}}


def certify(monkeypatch, *scripts, **options):
    reports, shown = Reports(*scripts), []
    monkeypatch.setattr(parent, "_Child", reports)
    parent.certify([DECODE], show=shown.append, **options)
    return reports.orders, shown


def test_every_write_of_a_token_is_examined(monkeypatch):
    """The kernel, interpreted, is right; one that writes elsewhere as well, or something else, is not."""
    sizes = {"full": "int8", "ring": "float32", "head_dim": 16, "group": 1, "window": Window(4, 12)}
    case = cases.make(Request.of("append", q="float32", **sizes, is_sharded=True), cases.SMALL)
    assert examine(case, "triton", case.exact(), str).error < 0.01
    case = cases.make(Request.of("append", q="float32", **sizes, page=128), cases.SMALL)
    exact = case.exact()
    assert examine(case, "triton", exact, str).error < 0.01
    wrong = {
        "inactive": lambda pools, heads, k, v, active, **of: scatter(pools, heads, k, v, active=active | True, **of),
        "doubled": lambda pools, heads, k, v, **of: scatter(pools, heads, 2 * k, v, **of),
        "late": lambda pools, heads, k, v, start, **of: scatter(pools, heads, k, v, start=start + 1, **of),
        "stray": lambda pools, *args, **of: scatter(
            pools._replace(ring_v=pools.ring_v.at[-1, 0, 0, 0].add(1.0)), *args, **of
        ),
    }
    monkeypatch.setitem(sys.modules, "pretended", ModuleType("pretended"))
    for name, append in wrong.items():
        module = ModuleType(f"pretended.{name}")
        module.BACKEND = Backend(f"pretended.{name}", lambda request: None, append=append)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        assert "wrong numbers" in examine(case, module.__name__, exact, str).reason, name


def test_a_crash_and_a_hang_cost_one_backend_each(home, monkeypatch):
    crash = [*BEGIN, at("xla"), right("xla", 4e-3), at("triton"), b""]
    hang = [*BEGIN, at("mosaic"), None]
    orders, shown = certify(monkeypatch, crash, hang)
    assert [sorted(name for _, name in order["skip"]) for order in orders] == [[], ["triton", "xla"]]
    found = verdicts.stored().verdicts[KEY]
    assert found["xla"].is_right and found["triton"].reason == "the process was ended by SIGSEGV"
    assert found["mosaic"].reason.startswith("hangs: no result after 30 s")
    assert verdicts.stored().complete == {KEY}
    # Nothing is left: no process is started.
    orders, shown = certify(monkeypatch)
    assert not orders and not shown


def test_a_process_that_is_killed_says_nothing_about_a_backend(home, monkeypatch):
    """The system ends processes when memory runs out; users do when they are impatient."""
    monkeypatch.setattr(Reports, "ended_by", signal.SIGKILL)
    killed = [*BEGIN, right("xla", 1.0), at("triton"), b""]
    _, shown = certify(monkeypatch, killed, [*BEGIN, right("mosaic", 2.0), {"end": True}])
    assert "triton is not known (the process was ended by SIGKILL); when the GPU is free" in shown[-2]
    assert verdicts.stored().verdicts[KEY].keys() == {"xla", "mosaic"} and not verdicts.stored().complete
    # It is checked again. A crash before the kernel runs is none of its own.
    monkeypatch.setattr(Reports, "ended_by", signal.SIGSEGV)
    certify(monkeypatch, [*BEGIN, at("triton", "prepare"), b""])
    found = verdicts.stored().verdicts[KEY]["triton"]
    assert found == Verdict(None, "cannot be checked here: the process was ended by SIGSEGV")


def test_whoever_waits_too_long_for_another_process_goes_on(home, monkeypatch):
    verdicts.path().parent.mkdir(parents=True)
    monkeypatch.setattr(parent, "LIMIT", 0.2)
    with FileLock(verdicts.path().with_name(".certify.lock")):
        orders, shown = certify(monkeypatch)
    assert not orders and "waiting" in shown[0] and "continuing with the verdicts that exist" in shown[1]


def test_a_killed_certification_loses_nothing(home, monkeypatch):
    class Killed(BaseException):
        pass

    def show(line):
        if "triton" in line:
            raise Killed

    monkeypatch.setattr(parent, "_Child", Reports([*BEGIN, right("xla", 4e-3), right("triton", 1e-3)]))
    with pytest.raises(Killed):
        parent.certify([DECODE], show=show)
    verdicts.forget()
    orders, _ = certify(monkeypatch, [*BEGIN, right("mosaic", 2e-3), {"end": True}])
    assert sorted(name for _, name in orders[0]["skip"]) == ["triton", "xla"]
    assert len(verdicts.stored().verdicts[KEY]) == 3


def test_too_little_memory_or_time_settles_nothing(home, monkeypatch):
    unknown = [*BEGIN, right("xla", 1.0), {"unknown": [KEY, "triton"], "reason": "RESOURCE_EXHAUSTED"}]
    _, shown = certify(monkeypatch, [*unknown, {"unknown": [KEY, "mosaic"], "reason": "too"}, {"end": True}])
    assert "triton is not known (RESOURCE_EXHAUSTED); when the GPU is free: duo doctor --certify" in shown[-2]
    assert not verdicts.stored().complete
    # A compilation that takes all of the time is not tried at every start.
    monkeypatch.setattr(parent, "LIMIT", 0.0)
    certify(monkeypatch, [*BEGIN, at("triton", "compile"), None])
    assert verdicts.stored().verdicts[KEY]["triton"].is_right is None
    with pytest.warns(UserWarning, match="no GPU|triton: not known after 0 s, in full: duo doctor --certify"):
        monkeypatch.setattr(verdicts, "device", lambda: GPU)
        assert best(on_gpu(DECODE), ("triton", "xla")) == "xla"


def test_memory_that_is_taken_differs_from_a_kernel_that_needs_too_much():
    for error in (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
        RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError("cuDNN: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ):
        assert is_no_memory(error)
    for text in (
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 163840, available: 101376",
        "RESOURCE_EXHAUSTED: ptxas fatal: (C7600) Register allocation failed with register count of '255'",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "",
    ):
        assert not is_no_memory(RuntimeError(text))


def test_no_process_is_started_without_a_gpu(home, monkeypatch):
    monkeypatch.setattr(parent, "_Child", None)
    monkeypatch.setattr(parent, "may_have_gpu", machine.may_have_gpu)
    parent.certify([DECODE])  # The tests run with JAX_PLATFORMS=cpu, or there is none.
    monkeypatch.setattr(parent, "may_have_gpu", lambda: True)
    monkeypatch.setenv("DUO_CERTIFY", "0")
    parent.certify([DECODE])
    monkeypatch.setenv("DUO_CERTIFY", "yes")
    with pytest.raises(ValueError, match="DUO_CERTIFY must be 0, 1 or full, got 'yes'"):
        parent.certify([DECODE])
    monkeypatch.setenv("DUO_CERTIFY", "1")
    monkeypatch.setenv("DUO_BACKEND", "xla")
    parent.certify([DECODE])


def test_wrong_settings_are_refused_wherever_they_are_set(home, monkeypatch, duo, text_model):
    """Also on a CPU, and before weights are read."""
    monkeypatch.setattr("duo_jax.checkpoint.load.usual_dtype", None)
    generate = ("generate", "--model", text_model, "--prompt", "x")
    for name, value, why in (
        ("DUO_CERTIFY", "maybe", "DUO_CERTIFY must be 0, 1 or full, got 'maybe'"),
        ("DUO_BACKEND", "tritn", "unknown attention backend 'tritn'"),
        ("DUO_BACKEND", "cudnn", "the cudnn backend has no kernel for decode: unset DUO_BACKEND, or name another one"),
        ("DUO_BACKEND", "no.module", "'no.module' is no module that can be imported"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert_refused(duo(*generate), why)
            with pytest.raises((ValueError, NotImplementedError), match=why):
                certified.certify_model(TINY, [DECODE])
    with monkeypatch.context() as patch:
        patch.setenv("DUO_BACKEND", "tritn")  # Also of commands without a model.
        assert_refused(duo("doctor", "--pretend", "h100"), "unknown attention backend 'tritn'")
    monkeypatch.setenv("DUO_CERTIFY", "maybe")
    assert_refused(duo("patterns"), "DUO_CERTIFY must be")
    with pytest.raises(ValueError, match="DUO_CERTIFY must be"):
        duo_jax.load_model(text_model)


def test_in_full_everything_is_examined_again(home, monkeypatch):
    know(xla=Verdict(True, "", 1e-3, 1e-3), triton=Verdict(False, "hangs"), mosaic=Verdict(True, "", 1e-3, 1e-3))
    assert certify(monkeypatch) == ([], [])
    lines = [*BEGIN, right("xla", 1.0), right("triton", 0.5), right("mosaic", 2.0), {"end": True}]
    monkeypatch.setenv("DUO_CERTIFY", "full")
    orders, shown = certify(monkeypatch, lines)
    assert orders[0]["skip"] == [] and "1800 s at most" in shown[0]
    assert verdicts.stored().verdicts[KEY]["triton"].is_right
    # The doctor's order stands, whatever the environment says.
    for name, value in (("DUO_CERTIFY", "0"), ("DUO_BACKEND", "xla")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert certify(patch) == ([], []) and certify(patch, lines, full=True)[0]


def test_the_fastest_right_backend_is_chosen(home, monkeypatch, recwarn):
    monkeypatch.setattr(verdicts, "device", lambda: GPU)
    request, able = on_gpu(DECODE), ("triton", "jax_triton", "mosaic", "xla")
    fast = {"triton": Verdict(True, "", 1e-3, 2e-3), "jax_triton": Verdict(True, "", 1e-3, 1e-3)}
    know(**fast, xla=Verdict(True, "", 1e-3, 9e-3), mosaic=Verdict(False, "hangs"))
    assert best(request, able) == "jax_triton"
    assert best(request, ("mosaic", "triton", "xla")) == "triton"
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"'xla'.*mosaic: hangs.*To check them: duo doctor --certify MODEL"):
        assert best(request, ("mosaic", "xla")) == "xla"
    with pytest.warns(UserWarning, match=r"'xla'.*triton: not checked"):
        assert best(on_gpu(replace(DECODE, head_dim=64)), able) == "xla"
    # A kernel that is slower than xla is no reason to warn.
    recwarn.clear()
    know(triton=Verdict(True, "", 1e-3, 1.0))
    assert best(request, ("triton", "xla")) == "xla" and not recwarn.list
    know(xla=Verdict(False, "wrong numbers"), triton=Verdict(False, "wrong numbers"))
    with pytest.warns(UserWarning, match="'reference'"):
        assert best(request, ("triton", "xla")) == "reference"


def test_a_cpu_reads_no_verdicts(home, monkeypatch):
    monkeypatch.setattr(verdicts, "known", None)
    assert best(replace(DECODE, device="cpu"), ("xla",)) == "xla"


def test_another_device_has_verdicts_of_its_own(home, monkeypatch):
    """Where nothing but the device tells: a part of a GPU, or the GPU that a container gets this time."""
    know(triton=Verdict(True, "", 1e-3, 1e-3), xla=Verdict(True, "", 1e-3, 2e-3))
    part, other = GPU | {"cores": 66}, replace(DECODE, group=2)
    found = Reports([{"device": part}, {"jobs": [[key_of(other), "xla"]]}, at("xla"), {"end": True}])
    monkeypatch.setattr(parent, "_Child", found)
    parent.certify([other], show=str)
    assert found.orders[0]["device"] == GPU
    verdicts.forget()
    assert verdicts.stored().device == part and not verdicts.stored().verdicts
    # The process is told of another device, and examines what is known there.
    lines = []
    order = {
        "requests": [to_json(DECODE)],
        "device": GPU,
        "skip": [[KEY, "xla"]],
        "backends": ["xla", "pretended.right"],
    }
    child.serve(order, lambda **line: lines.append(line))
    assert [line["settled"][1] for line in lines if "settled" in line] == ["xla", "pretended.right"]


def test_without_a_gpu_of_jax_nothing_is_known_of_one(home, monkeypatch):
    """The system has one, but jax cannot use it: its driver is too old, or another process has it for itself."""
    lines = []
    child.serve(
        {"requests": [to_json(DECODE)], "device": GPU, "skip": [], "backends": None}, lambda **x: lines.append(x)
    )
    orders, shown = certify(monkeypatch, lines)
    assert len(orders) == 1 and "nothing is checked: jax finds no GPU of NVIDIA here, only cpu" in shown[-1]
    # So the GPU is checked as soon as it can be used.
    assert verdicts.stored() == Found() and certify(monkeypatch, lines)[0]


def test_verdicts_of_another_machine_do_not_count(home, monkeypatch):
    know(triton=Verdict(True, "", 1e-3, 1e-3))
    monkeypatch.setattr(verdicts, "device", lambda: GPU)
    assert best(on_gpu(DECODE), ("triton", "xla")) == "triton"
    for change in ({"source": "changed"}, {"driver": "newer"}, {"packages": {"jax": "9"}}, {"ptxas": "another"}):
        here = {**machine.environment(), **change}
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, "environment", lambda here=here: here)
            verdicts.forget()
            with pytest.warns(UserWarning, match="triton: not checked"):
                assert best(on_gpu(DECODE), ("triton", "xla")) == "xla"
    verdicts.forget()
    monkeypatch.setattr(verdicts, "device", lambda: GPU | {"cores": 66})  # a part of the GPU
    with pytest.warns(UserWarning, match="triton: not checked"):
        assert best(on_gpu(DECODE), ("triton", "xla")) == "xla"


def test_flags_of_xla_that_change_code_are_part_of_the_environment(home, monkeypatch):
    flags = "--xla_dump_to=/tmp/dump --xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir=/opt/cuda"
    monkeypatch.setenv("XLA_FLAGS", flags)
    machine.environment.cache_clear()
    try:
        assert machine.environment()["flags"] == flags.split()[1:]
        assert verdicts.report()["environment"]["flags"] == [flags.split()[1], "--xla_gpu_cuda_data_dir=PATH"]
    finally:
        machine.environment.cache_clear()


def test_several_processes_choose_by_the_verdicts_of_the_first(home, monkeypatch):
    """`tests/test_mesh_processes.py` has real processes; these are the rules."""
    right, slow, mesh = Verdict(True, "", 1e-3, 1e-3), Verdict(True, "", 1e-3, 2e-3), make_mesh(sequence=2)
    monkeypatch.setattr(verdicts, "device", lambda: GPU)
    know(triton=right, xla=slow)
    first = Found({KEY: {"triton": Verdict(False, "hangs"), "xla": slow}}, {KEY}, GPU).to_json()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # Each may know something else, so that nothing counts until they agree.
    with pytest.warns(UserWarning, match="the processes have not agreed on verdicts"):
        assert best(on_gpu(DECODE), ("triton", "xla")) == "xla"
    verdicts._warn.cache_clear()
    monkeypatch.setattr(
        processes, "gather_json", lambda own: [own | {"verdicts": first} if "verdicts" in own else own, own]
    )
    processes.share_verdicts()
    with pytest.warns(UserWarning, match="triton: hangs"):
        assert best(on_gpu(DECODE), ("triton", "xla")) == "xla"
    verdicts.forget()
    know(triton=Verdict(False, "hangs"), xla=slow)
    first = Found({KEY: {"triton": right, "xla": slow}}, {KEY}, GPU).to_json()
    # A model on a mesh of several processes makes them agree again: loading it may have found more.
    certified.certify_model(TINY, [], mesh=mesh)
    assert verdicts._agreed is None
    monkeypatch.setattr(certified, "is_shared", lambda mesh: True)
    certified.certify_model(TINY, [], mesh=mesh)
    assert best(on_gpu(DECODE), ("triton", "xla")) == "triton"


@pytest.mark.parametrize("damage", ["", "[1]", "[" * 10_000, "large", "pipe"])
def test_a_damaged_file_is_made_again(home, damage):
    """`tests/hostile/readers.py` has what else a file may contain."""
    verdicts.path().parent.mkdir(parents=True)
    for path in (verdicts.path(), tuned_file()):  # The tiles are part of the environment.
        if damage == "pipe":
            os.mkfifo(path)
        else:
            path.write_text(damage)
        if damage == "large":
            os.truncate(path, 1 << 40)
    assert not verdicts.stored().verdicts
    know(triton=Verdict(True, "", 1e-3, 1e-3))
    assert verdicts.stored().verdicts[KEY]["triton"].is_right


def test_processes_add_to_each_others_verdicts(home):
    know(triton=Verdict(True, "", 1e-3, 1e-3))
    verdicts.forget()
    other = Found({KEY: {"mosaic": Verdict(False, "hangs")}, "other": {"xla": Verdict(None, "late")}})
    verdicts.add(other)
    stored = verdicts.stored()
    assert set(stored.verdicts[KEY]) == {"triton", "mosaic"} and stored.device == GPU
    assert stored.verdicts["other"]["xla"] == Verdict(None, "late")


def test_altered_tiles_are_refused_before_anything_is_checked(home, monkeypatch):
    """They would be the reason that every kernel fails."""
    tuned_file().parent.mkdir(parents=True)
    tuned_file().write_text("{")
    forget_tuned()
    monkeypatch.setattr(parent, "_Child", None)
    with pytest.raises(ValueError, match=r"tiles.json is truncated or was altered .*: delete it, then tune again"):
        parent.certify([DECODE])
    forget_tuned()


def test_without_a_place_to_write_verdicts_hold_for_this_process(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("DUO_JAX_CACHE", str(home / "file" / "cache"))
    verdicts._cannot_store.cache_clear()
    with pytest.warns(
        UserWarning, match=r"cannot be stored \(.*verdicts.json: Not a directory\).*set DUO_JAX_CACHE"
    ) as warned:
        certify(monkeypatch, [*BEGIN, right("xla", 1.0), right("triton", 0.5), right("mosaic", 2.0), {"end": True}])
    assert len(warned) == 1
    monkeypatch.setattr(verdicts, "device", lambda: GPU)
    assert best(on_gpu(DECODE), ("triton", "xla")) == "triton"


def test_without_a_home_folder_nothing_is_written(home, monkeypatch):
    for name in ("DUO_JAX_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    verdicts._cannot_store.cache_clear()
    with pytest.warns(UserWarning, match="no home folder"):
        know(triton=Verdict(True, "", 1e-3, 1e-3))
    assert sorted(home.iterdir()) == before
    forget_tuned()
    assert tiles_for("decode", 16, 2).min_split == 256 and machine._tiles() == b""


def test_the_environment_names_a_backend(home, monkeypatch):
    here = replace(DECODE, device="cpu")
    monkeypatch.setenv("DUO_BACKEND", "pretended.right")
    assert ops.choose(here).name == "pretended.right" and ops.choose(here, "xla").name == "xla"
    with pytest.raises(NotImplementedError, match="has no kernel for prefill: unset DUO_BACKEND"):
        ops.choose(replace(here, operation="prefill"))
    monkeypatch.setenv("DUO_BACKEND", "no.module")
    with pytest.raises(ValueError, match=r"'no.module' is no module that can be imported"):
        ops.choose(here)
    with pytest.raises(ValueError, match=r"module json.decoder has no BACKEND"):
        ops.choose(here, "json.decoder")
    for name in ("..", ".module", "module.", "a/b.py", "my kernels.attention"):
        with pytest.raises(ValueError, match="is no module's name"):
            ops.choose(here, name)
    (home / "broken_kernels").mkdir()
    monkeypatch.syspath_prepend(home)
    for name, text in (("syntax", "def"), ("crash", "1 / 0"), ("needs", "import nothing_there"), ("ends", "exit()")):
        (home / "broken_kernels" / f"{name}.py").write_text(text)
        with pytest.raises(ValueError, match=f"'broken_kernels.{name}' is no module that can be imported"):
            ops.choose(here, f"broken_kernels.{name}")


def test_a_command_asks_for_the_attention_that_it_will_run(home, monkeypatch, text_model):
    asked = []
    for module in ("duo_jax.cli.certify", "duo_jax.certified", "pallas_kernels.certify.machine"):
        monkeypatch.setattr(f"{module}.may_have_gpu", lambda: True)
    for name in ("duo_jax.cli.certify.certify", "duo_jax.certified.certify_requests"):
        monkeypatch.setattr(name, lambda requests, **_: asked.append(list(map(key_of, requests))))
    monkeypatch.setattr(certified, "_asked", set())
    # Wrong flags are the command's to report.
    certify_for(Generate(ModelOptions("nothing")))
    assert not asked and "DUO_CERTIFY" not in os.environ
    certify_for(Generate(ModelOptions(str(text_model)), kv=CacheOptions("int8")))
    assert [[key.partition(" ")[0] for key in keys] for keys in asked] == [["prefill", "decode", "append"]]
    assert all(key.endswith("window 0+0, full int8") for key in asked[0])
    # Nothing more is checked when its model is loaded, here or in a process that it starts.
    assert os.environ["DUO_CERTIFY"] == "0"


# Commands with a --model that run no attention in their own process: they read files, plan, compile, or start commands.
WITHOUT_ATTENTION = {"Inspect", "PlanCommand", "MemoryTask", "Startup"}


def kinds_in(hint):
    """Every dataclass that a type hint names, and those of its fields."""
    if isinstance(hint, type):
        fields = get_type_hints(hint).values() if is_dataclass(hint) else ()
        return {hint, *(kind for each in fields for kind in kinds_in(each))} if is_dataclass(hint) else set()
    return {kind for each in get_args(hint) for kind in kinds_in(each)}


def test_every_command_with_a_model_says_what_it_will_run():
    """One without `requests` or `ModelOptions` would run `xla` on a GPU, or what loading it guesses."""
    commands = {entry.name: entry.load() for entry in entry_points(group="duo.commands")}
    commands |= {kind.__name__: kind for kind in get_args(get_type_hints(commands.pop("eval"))["task"])}
    checked = set()
    for command in commands.values():
        kinds = kinds_in(command)
        if any("model" in get_type_hints(kind) for kind in kinds) and command.__name__ not in WITHOUT_ATTENTION:
            checked.add(command.__name__)
            assert ModelOptions in kinds or any(hasattr(kind, "requests") for kind in kinds), command
    assert {"Bench", "Efficiency", "Generate", "Identify", "Recall", "Quantize"} <= checked


def test_commands_ask_for_the_attention_of_all_that_they_run(text_model, monkeypatch):
    name, pattern = str(text_model), str(text_model / "pattern")
    for command, expected in (
        (
            Efficiency(model=(name,), pattern=pattern, sparsity=(0.5,)),
            {"0+0, full bfloat16", "4+24, full bfloat16, r"},
        ),
        (Efficiency(model=("llama-3-8b",), layers=2, backend="xla"), set()),
        (Comparison(name, sink_size=8), {"0+0, full", "8+256, full", "8+256, ring"}),
        (Training(name), {"32+128"}),
    ):
        keys = {key_of(request).partition("window ")[2] for request in requests_of(command)} - {""}
        assert all(any(key.startswith(each) for key in keys) for each in expected) and len(keys) == len(expected), keys
    requests = requests_of(Serve(ModelOptions(name), kv=CacheOptions("int8")))
    assert {key_of(each).partition("window ")[2] for each in requests} == {"0+0, full int8, paged by 128"}
    # A saved cache has its own pattern and data types.
    monkeypatch.setattr(store, "read_about", lambda path: {"tokens": [[1]], "dtypes": ["int4", "float32"]})
    monkeypatch.setattr(store, "pattern_of", lambda about: any_pattern(open_config(text_model), 0.5))
    requests = requests_of(Generate(ModelOptions(name), cache=Path("saved")))
    assert {key_of(each).partition("window ")[2] for each in requests} == {"64+256, full int4, ring float32"}
    assert requests_of(Quantize(ModelOptions(name), Path("out"))) == [] and requests_of(Patterns()) is None


def test_the_library_asks_for_what_it_is_told_or_for_what_is_usual(home, monkeypatch, text_model, half):
    asked = []
    monkeypatch.setattr("duo_jax.certified.may_have_gpu", lambda: True)
    monkeypatch.setattr(certified, "certify_requests", lambda requests, **_: asked.append(list(map(key_of, requests))))
    monkeypatch.setattr(certified, "_asked", set())
    config = open_config(text_model)
    # Loaded by name, the pattern and the cache are not known.
    duo_jax.load_model(text_model)
    assert [key.partition("window ")[2] for key in asked.pop()] == [
        *["0+0, full float32"] * 3,
        *["64+256, full float32, ring float32"] * 3,
    ]
    certified.certify_model(config, trains=True)
    assert [key.partition("group ")[2] for key in asked.pop()] == ["2", "2, window 128+256"]
    duo_jax.certify(text_model, any_pattern(config, 0.5, sink_size=3, recent_size=8), kv_dtype="int4")
    assert [key.partition("window ")[2] for key in asked.pop()] == ["3+8, full int4, ring float32"] * 3
    duo_jax.certify(text_model, page_size=16)
    assert [key.partition("window ")[2] for key in asked.pop()] == ["0+0, full float32, paged by 16"] * 3
    with pytest.raises(ValueError, match="made for another model"):
        duo_jax.certify(text_model, half)
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        duo_jax.certify(text_model, page_size=0)
    duo_jax.load_model(text_model)
    assert not asked


def test_what_is_asked_for_is_what_is_traced(tiny, half, monkeypatch, annotations_off):
    """A verdict that is stored under another name would never be used."""
    traced = []
    monkeypatch.setattr(ops, "best", lambda request, names: traced.append(key_of(request)) or names[0])
    one, last = jnp.ones(1, jnp.int32), jnp.zeros((1, tiny.config.embed_dim))
    patterns = [None, half, any_pattern(tiny.config, 1.0)]
    for pattern in patterns:
        cache = KVCache.init(tiny.config, pattern, 1, 24, dtype="int8")
        jax.eval_shape(partial(infer.extend, backend=None), tiny, one[None], cache, one, last)
        jax.eval_shape(partial(infer.step, backend=None), tiny, one, cache, one > 0)
    requests = certified.inference(tiny.config, *patterns, kv_dtype="int8")
    assert {*map(key_of, requests)} == {*traced} and len(requests) == 9
    traced.clear()
    tokens, gates = jnp.ones((1, 8), jnp.int32), jnp.ones((2, 2), jnp.float32)
    jax.eval_shape(partial(GatedModel().student, tiny), tokens, gates)
    assert {*map(key_of, certified.training(tiny.config))} == {*traced}


def test_a_model_with_windows_and_capped_scores_asks_for_what_it_traces(monkeypatch, annotations_off):
    """No kernel caps scores, so that nothing but the write of tokens is checked."""
    traced = []
    monkeypatch.setattr(ops, "best", lambda request, names: traced.append(key_of(request)) or names[0])
    config = replace(TINY, layer_windows=(6, None), score_cap=30.0)
    model, one, last = Model.random(config, seed=1), jnp.ones(1, jnp.int32), jnp.zeros((1, TINY.embed_dim))
    pattern = any_pattern(config, 0.5, sink_size=3, recent_size=8)
    cache = CacheSpec(config, pattern, 1, 24, config.precision(), page_size=8).abstract()
    jax.eval_shape(partial(infer.extend, backend=None), model, one[None], cache, one, last)
    jax.eval_shape(partial(infer.step, backend=None), model, one, cache, one > 0)
    requests = certified.inference(config, pattern, page_size=8)
    assert {*map(key_of, requests)} == {*traced} and len(requests) == 6
    assert key_of(requests[0]).endswith("window 3+8, cap 30, full float32, ring float32, paged by 8")
    jobs = child._jobs([on_gpu(request) for request in requests], None)
    assert {request.operation for request, _ in jobs} == {"append"}
    assert from_json(json.loads(json.dumps(to_json(requests[0])))) == requests[0]
    # The others are slow there, which is said once.
    monkeypatch.undo()
    with pytest.warns(
        UserWarning, match=r"attention runs on 'xla', .*: no kernel takes prefill .*cap 30.* on NVIDIA Pret"
    ):
        assert ops.choose(on_gpu(requests[0])).name == "xla"
    assert ops.choose(on_gpu(requests[0])).name == "xla"


def test_an_engine_in_python_asks_for_its_pages(text_model, monkeypatch):
    asked = []
    monkeypatch.setattr(certified, "may_have_gpu", lambda: True)
    monkeypatch.setattr(certified, "certify_requests", lambda requests, full: asked.append([*requests]))
    lm = duo_jax.load(text_model)
    sizes, spec = plan_sizes(Plan(lm.model.config, chunk_size=16), 10**8, rows=2, page_size=8, max_context=64)
    start_engine(stored_for_engine(lm), sizes, spec).close(0)
    assert asked[-1] == certified.inference(lm.model.config, spec.pattern, page_size=8)


@pytest.mark.parametrize("page_size", [None, 128, 48])
def test_short_chunks_over_a_quantized_cache_are_asked_for_too(half, monkeypatch, annotations_off, page_size):
    """Where kernels read packed keys for them: with data types of 16 bits."""
    traced = []
    monkeypatch.setattr(ops, "best", lambda request, names: traced.append(key_of(request)) or names[0])
    model = Model.random(replace(TINY, dtype="bfloat16", head_dim=16), seed=1)
    one, last = jnp.ones(1, jnp.int32), jnp.zeros((1, TINY.embed_dim), jnp.bfloat16)
    precision = replace(model.config.precision(), kv_dtype="int4")
    cache = CacheSpec(model.config, half, 1, 400, precision, page_size=page_size).abstract()
    for tokens in (2, 300):
        chunk = jnp.ones((1, tokens), jnp.int32)
        jax.eval_shape(partial(infer.extend, backend=None), model, chunk, cache, tokens * one, last)
    jax.eval_shape(partial(infer.step, backend=None), model, one, cache, one > 0)
    requests = certified.inference(model.config, half, kv_dtype="int4", page_size=page_size)
    assert {*map(key_of, requests)} == {*traced}
    assert [request.is_short for request in requests] == [False, False, True, False]
    # Where nothing is quantized, a short chunk is nothing else.
    assert not any(request.is_short for request in certified.inference(model.config, half))
    assert not any(request.is_short for request in certified.inference(TINY, half, kv_dtype="int4"))


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"sequence": 2, "tensor": 2}], ids=str)
def test_what_is_asked_for_is_what_is_traced_on_a_mesh(tiny, half, monkeypatch, annotations_off, sizes):
    """More devices than KV heads share the queries of one, so that its group is smaller."""
    traced, mesh = [], make_mesh(**sizes)
    monkeypatch.setattr(ops, "best", lambda request, names: traced.append(key_of(request)) or names[0])
    model, one = place_model(tiny, mesh, half), jnp.ones(1, jnp.int32)
    cache, last = KVCache.init(tiny.config, half, 1, 40, mesh=mesh), jnp.zeros((1, tiny.config.embed_dim))
    jax.eval_shape(partial(infer.extend, backend=None), model, one[None], cache, one, last)
    jax.eval_shape(partial(infer.step, backend=None), model, one, cache, one > 0)
    requests = certified.inference(tiny.config, half, mesh=MeshSize(**sizes))
    assert {*map(key_of, requests)} == {*traced} and len(requests) == 3
    assert all(request.group == 4 // max(2, sizes["tensor"]) for request in requests[:2])
    with pytest.raises(ValueError, match="cannot be divided among tensor=3 devices"):
        certified.inference(tiny.config, half, mesh=MeshSize(tensor=3))


def test_what_training_asks_for_is_what_is_traced_on_a_mesh(tiny, monkeypatch, annotations_off):
    traced, mesh = [], make_mesh(sequence=4)
    monkeypatch.setattr(ops, "best", lambda request, names: traced.append(key_of(request)) or names[0])
    attention, tokens, gates = ShardedModel(mesh=mesh), jnp.ones((1, 8), jnp.int32), jnp.ones((2, 2), jnp.float32)
    jax.eval_shape(partial(attention.student, tiny), tokens, gates)
    requests = certified.training(tiny.config, mesh=MeshSize.of(mesh))
    assert {*map(key_of, requests)} == {*traced} and {request.group for request in requests} == {1}


def test_a_model_is_certified_once_when_it_is_loaded_on_a_mesh(home, monkeypatch, text_model):
    """`load` knows the cache; `load_model`, which it calls, does not."""
    asked = []
    monkeypatch.setattr("duo_jax.certified.may_have_gpu", lambda: True)
    monkeypatch.setattr(certified, "certify_requests", lambda requests, **_: asked.append(list(map(key_of, requests))))
    monkeypatch.setattr(certified, "_asked", set())
    config = open_config(text_model)
    pattern, mesh = any_pattern(config, 0.5, sink_size=3, recent_size=8), make_mesh(sequence=2)
    duo_jax.load_model(text_model, mesh=mesh, pattern=pattern)
    assert [key.partition("window ")[2] for key in asked.pop()] == ["3+8, full float32, ring float32, sharded"] * 3
    duo_jax.load(text_model, mesh=mesh, pattern=pattern, kv_dtype="int4")
    ((*keys,),) = asked
    assert [key.partition("window ")[2] for key in keys] == ["3+8, full int4, ring float32, sharded"] * 3


def test_the_doctor_certifies_a_model_in_full(home, monkeypatch, text_model):
    asked, report = [], home / "report.json"
    with pytest.raises(ValueError, match="--certify needs a GPU"):
        Doctor(certify=str(text_model)).run()
    with pytest.raises(ValueError, match="--report are of --certify MODEL"):
        Doctor(report=report).run()
    monkeypatch.setattr("duo_jax.cli.doctor.may_have_gpu", lambda: True)
    monkeypatch.setattr("duo_jax.certified.may_have_gpu", lambda: True)
    monkeypatch.setattr(certified, "certify_requests", lambda requests, *, full: asked.append((requests, full)))
    with pytest.raises(ValueError, match="nothing was checked"):  # Here, jax does not find it.
        Doctor(certify=str(text_model), report=report).run()
    assert json.loads(report.read_text())["device"] is None and asked.pop()
    compiler = "ptxas exited with code 255, output '/tmp/tmp.host-4-a7/x.ptx', line 5; 3/4 of 16 KiB; ~/x/y failed"
    know(triton=Verdict(False, "hangs"), mosaic=Verdict(False, compiler))
    Doctor(certify=str(text_model), kv_dtype="int4", report=report).run()
    ((requests, is_full),) = asked
    assert is_full and {request.operation for request in requests} == {"prefill", "decode", "append"}
    assert [request.page for request in requests] == 3 * [None] + 3 * [128], "a server's cache is paged"
    Doctor(certify=str(text_model), devices=DeviceOptions("sequence=2")).run()
    assert all(request.is_sharded for request in asked[-1][0])
    with pytest.raises(ValueError, match="--mesh and flags of a head pattern are of --certify MODEL"):
        Doctor(devices=DeviceOptions("sequence=2")).run()
    Doctor(certify=str(text_model), training=True, pattern=PatternOptions(sink_size=8)).run()
    assert [request.window for request in asked[-1][0]] == [None, Window(8, 256)]
    with pytest.raises(ValueError, match="--training has no pattern and no cache"):
        Doctor(certify=str(text_model), training=True, pattern=PatternOptions("smollm2-135m-instruct")).run()
    written = json.loads(report.read_text())
    assert written["device"] == GPU and written["verdicts"][KEY]["triton"]["reason"] == "hangs"
    without_paths = "ptxas exited with code 255, output 'PATH', line 5; 3/4 of 16 KiB; PATH failed"
    assert written["verdicts"][KEY]["mosaic"]["reason"] == without_paths


TRAINING = Request.of("training", q="bfloat16", head_dim=16, group=2)
EXACT = Request.of("prefill", q="float32", full="float32", ring="float32", head_dim=16, group=2, window=Window(4, 12))
REQUESTS = [PREFILL, SHORT, EXACT, TRAINING, replace(TRAINING, window=Window(4, 12))]
REQUESTS += [replace(EXACT, operation=name, is_sharded=True) for name in ("prefill", "decode")]
REQUESTS += [replace(EXACT, operation=name, page=page) for name, page in (("prefill", 48), ("decode", 128))]
REQUESTS += [replace(EXACT, operation="decode", full=None), replace(PREFILL, operation="decode", full="int4")]


@pytest.mark.full_matrix
@pytest.mark.parametrize("request_", REQUESTS, ids=key_of)
def test_the_safe_backends_are_right_in_every_kind_of_case(request_):
    """Also where memory without a token is NaN, and where devices share tokens."""
    case = cases.make(request_, cases.SMALL)
    exact = case.exact()
    for name in verdicts.SAFE:
        assert examine(case, name, exact, lambda phase: None).is_right, name


@pytest.mark.full_matrix
def test_training_without_the_gradient_of_the_log_sum_is_wrong(monkeypatch):
    """Learned sinks have that gradient too."""

    def training(q, k, v, window):
        out, log_sum = xla_train.training(q, k, v, window)
        return Partial(out, jax.lax.stop_gradient(log_sum))

    monkeypatch.setattr(cudnn, "BACKEND", Backend("cudnn", lambda request: None, training=training))
    case = cases.make(TRAINING, cases.SMALL)
    verdict = examine(case, "cudnn", case.exact(), lambda phase: None)
    assert re.match(r"wrong numbers: error [\d.e-]+ of [qk],", verdict.reason), verdict


@pytest.mark.full_matrix
def test_a_kernel_that_unpacks_quantized_slots_is_right_over_two_segments():
    case, sizes = cases.make(PREFILL, cases.SMALL), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "segment", lambda *args: sizes.append(segment(*args)) or sizes[-1])
        assert examine(case, "triton", case.exact(), lambda phase: None).is_right
    assert sizes and all(2 * size == case.inputs.pools[0].capacity for size in sizes)


@pytest.mark.full_matrix
@pytest.mark.parametrize("request_", [SHORT, replace(SHORT, page=128, full="int4")], ids=key_of)
def test_the_kernel_of_short_chunks_is_certified_by_itself(request_, monkeypatch):
    """One that counts a token too many reads NaN. That of long chunks, which does not run it, is right all the same."""
    assert set(tiles_of("triton", request_)) == set(tiles_of("mosaic", request_)) - {"mosaic_flash"} | {"flash"}
    case = cases.make(request_, cases.SMALL)
    exact = case.exact()
    assert examine(case, "triton", exact, lambda phase: None).is_right

    def unmasked(*args, filled):
        return attend_to_slots(*args, filled=filled + 1)

    monkeypatch.setattr(flash, "attend_to_slots", unmasked)
    assert examine(case, "triton", exact, lambda phase: None).reason.startswith("wrong numbers: error inf")
    long = cases.make(PREFILL, cases.SMALL)
    assert examine(long, "triton", long.exact(), lambda phase: None).is_right


@pytest.mark.full_matrix
def test_cudnn_is_right_in_hostile_cases_as_far_as_a_cpu_can_tell(monkeypatch):
    """The adapter with jax's own implementation of the function: NaN beyond lengths, starts of 0, parts of slots."""
    by_xla = partial(cudnn.prefill, implementation="xla")
    monkeypatch.setattr(cudnn, "BACKEND", Backend("cudnn", lambda request: None, by_xla))
    case = cases.make(EXACT, cases.SMALL)
    with jax.numpy_dtype_promotion("standard"):  # jax's implementation has products of two types.
        verdict = examine(case, "cudnn", case.exact(), lambda phase: None)
    assert verdict.is_right, verdict


@pytest.mark.slow
def test_processes_that_crash_hang_or_exit_are_replaced(home, monkeypatch):
    """With real processes: every pretended backend ends as it should, and the fastest right one is chosen."""
    monkeypatch.setattr(parent, "RUN_LIMIT", 10.0)
    shown = []
    # What is printed before the process could prevent it.
    (home / "sitecustomize.py").write_text('print("{}\\n[]\\n{\\"end\\": true}\\n\\0" + "x" * (1 << 21))')
    backends = names("crashing", "right", "hanging", "wrong", "exiting", "slow", "failing", "flaky")
    backends += names("forking", "loud", "closing")[1:]
    parent.certify([DECODE], backends=backends, show=shown.append)
    found = {name.removeprefix("pretended."): verdict for name, verdict in verdicts.stored().verdicts[KEY].items()}
    assert {name for name, verdict in found.items() if verdict.is_right} == {"xla", "right", "slow", "loud"}, shown
    assert found["slow"].seconds > found["right"].seconds
    assert "SIGSEGV" in found["crashing"].reason and "exited with code 7" in found["exiting"].reason
    assert found["hanging"].reason.startswith("hangs") and found["failing"].reason.startswith("fails")
    assert found["forking"].reason.startswith("the process exited with code 9")
    assert found["closing"].reason == "the process closed its output and did not end"
    assert verdicts.stored().complete == {KEY} and len(shown) == 1 + len(backends)


@pytest.mark.slow
def test_two_processes_at_once_and_one_that_is_killed(home):
    """The second one waits, and takes over where the first one was killed."""
    program = """if True:
        import sys
        from pallas_kernels.certify import parent, verdicts
        from tests.test_certify import DECODE, names
        parent.may_have_gpu, parent.RUN_LIMIT = lambda: True, float(sys.argv[1])
        parent.certify([DECODE], backends=names("right", "hanging", "wrong"))
        """
    command = [sys.executable, "-c", program]
    path = os.pathsep.join([str(home), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    options = {"env": os.environ | {"PYTHONPATH": path}, "stderr": subprocess.PIPE, "text": True}
    # It is killed while a backend hangs.
    first = subprocess.Popen([*command, "100"], **options)
    try:
        while "xla is right" not in (line := first.stderr.readline()):
            assert line, "it ended"
        second = subprocess.Popen([*command, "5"], **options)
        while "waiting" not in (line := second.stderr.readline()):
            assert line, "it ended"
        time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    _, shown = second.communicate(timeout=300)
    assert second.returncode == 0 and "xla is right" not in shown, shown
    found = verdicts.stored().verdicts[KEY]
    assert len(found) == 4 and found["pretended.hanging"].reason.startswith("hangs")
