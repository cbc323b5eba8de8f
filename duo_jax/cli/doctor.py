"""`duo doctor`: is this machine ready? Versions, devices, and each attention backend tried against the reference."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.certified import certify_model, inference
from duo_jax.checkpoint.load import open_config
from duo_jax.cli.pretend import lines_of, pretend
from duo_jax.files import check_output, write_text
from duo_jax.finite import json_text
from duo_jax.pattern import HeadPattern
from duo_jax.precision import FloatDtype, KvDtype
from duo_jax.reading import read_json
from duo_jax.tune import kernels_here, tune
from pallas_kernels import (
    BACKENDS,
    Heads,
    Pools,
    Unsupported,
    Window,
    decode_attention,
    gated_attention,
    prefill_attention,
)
from pallas_kernels.certify import report
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.gpus import chip, device_kind
from pallas_kernels.tiles import tuned_file

PACKAGES = (
    "duo-jax",
    "jax",
    "jaxlib",
    "flax",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "jax-triton",
)

# Data type of the trials, and the largest error, relative to the dense reference, that counts as right. The fastest
# kernels for GPUs take no float32.
TRIED = {"cpu": ("float32", 1e-4), "gpu": ("bfloat16", 1e-2)}


def _ignore(line: str) -> None:
    pass


@dataclass(frozen=True)
class Doctor:
    """Check versions, devices and memory, and try every attention backend here."""

    json: bool = False
    """Print one JSON object instead of text."""
    pretend: str | None = None
    """Print what would run on a GPU that is not here, such as h100 or rtx-4090, and why other backends would not."""
    tune: bool = False
    """Time four to six tile sizes of each kernel on this GPU, head dims 64 and 128, and keep the fastest for you."""
    certify: str | None = None
    """A model, by name, folder or file: check each attention backend for it on this GPU, whatever was found before, for
    up to half an hour. Its weights are not read."""
    pattern: str | None = None
    """With --certify: the head pattern that will be used; by default full attention."""
    dtype: FloatDtype | None = None
    """With --certify: data type of the model, the checkpoint's own by default."""
    kv_dtype: KvDtype | None = None
    """With --certify: data type of the cache."""
    report: Path | None = None
    """With --certify: write the verdicts and the machine that they are of to this file, to send."""

    def run(self) -> None:
        """Examine this machine and print the findings."""
        if self.certify is not None:
            self._certify(self.certify)
            return
        if any(value is not None for value in (self.pattern, self.dtype, self.kv_dtype, self.report)):
            raise ValueError("--pattern, --dtype, --kv-dtype and --report are of --certify MODEL: add it")
        if self.pretend is not None and self.tune:
            raise ValueError("--tune needs the GPU that --pretend does without: give one of them")
        if self.pretend is not None:
            found = pretend(self.pretend)
            print(json_text(found) if self.json else "\n".join(lines_of(found)))
            return
        if self.tune:
            if chip().capability is None:
                raise ValueError(f"--tune needs a GPU of NVIDIA, this is {device_kind()}")
            tune(kernels_here(), (64, 128), show=_ignore if self.json else partial(print, flush=True))
            if self.json:
                print(json_text(read_json(tuned_file())))
            return
        record = examine(_ignore if self.json else partial(print, flush=True))
        if self.json:
            print(json_text(record))
        tried = [found for backend in record["backends"].values() for found in backend.values()]
        if any(found["is_right"] is False for found in tried):
            raise ValueError("a backend fails or computes wrong numbers here: do not use it, and please report this")

    def _certify(self, model: str) -> None:
        config = open_config(model).with_dtypes(dtype=self.dtype)
        pattern = None if self.pattern is None else HeadPattern.load(self.pattern)
        if pattern is not None:
            pattern.check(config)
        if self.report is not None:
            check_output(self.report)
        if not may_have_gpu():
            raise ValueError("--certify needs a GPU: jax finds none here, or JAX_PLATFORMS excludes it")
        certify_model(config, inference(config, pattern, kv_dtype=self.kv_dtype), full=True)
        found = report()
        if self.report is not None:
            write_text(self.report, json_text(found) + "\n")
        if self.json:
            print(json_text(found))


def examine(show: Callable[[str], None] = _ignore) -> dict:
    """All findings, as plain values; `show` gets each line of text as soon as it is known."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [
            {"kind": device.device_kind, "platform": device.platform, "memory": device.memory_stats() or {}}
            for device in jax.devices()
        ],
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # On a GPU it depends on the model.
        "default_backend": "xla" if chip().capability is None else None,
    }
    for line in _machine(record):
        show(line)
    record["backends"] = _examine_backends(show)
    return record


def _machine(record: dict[str, Any]) -> Iterator[str]:
    yield f"python        {record['python']}"
    yield from (f"{name:<14}{found or 'not installed'}" for name, found in record["packages"].items())
    yield f"host memory   {record['host_memory_bytes'] / 1e9:.1f} GB"
    for device in record["devices"]:
        limit = device["memory"].get("bytes_limit")
        yield f"device        {device['kind']} ({device['platform']})" + (f", {limit / 1e9:.1f} GB" if limit else "")
    by_model = "the fastest backend that certification finds right for a model; without it, xla"
    yield f"default       {record['default_backend'] or by_model}"
    if record["devices"][0]["platform"] == "cpu":
        yield "              (triton is interpreted here: it is a kernel for GPUs)"


def _examine_backends(show: Callable[[str], None]) -> dict[str, dict[str, dict]]:
    results: dict[str, dict[str, dict]] = {backend: {} for backend in BACKENDS}
    for operation, make in OPERATIONS.items():
        show(operation)
        for backend, result in _trials(make):
            results[backend][operation] = result
            show(f"  {backend:<12}{_verdict(result)}")
    return results


def _trials(make: Callable[[jnp.dtype], list[Any]]) -> Iterator[tuple[str, dict]]:
    """One operation of each backend, compared with the reference on a small random case."""
    name, tolerance = TRIED["cpu" if jax.default_backend() == "cpu" else "gpu"]
    try:
        run, *arrays = make(jnp.dtype(name))
        # Without this, GPUs multiply float32 with fewer bits.
        with jax.default_matmul_precision("highest"):
            right = np.asarray(jax.jit(partial(run, backend="reference"))(*arrays), np.float32)
    except Exception as error:  # Without a reference no backend can be checked; other operations still are.
        failure = {"is_right": False, "failed": f"the reference: {_first_line(error)}"}
        yield from ((backend, failure) for backend in BACKENDS)
        return
    yield "reference", {"is_right": bool(np.isfinite(right).all()), "error": 0.0}
    for backend in BACKENDS:
        if backend != "reference":
            yield backend, _try(partial(run, backend=backend), arrays, right, tolerance)


def _verdict(result: dict) -> str:
    if "why_not" in result:
        return f"cannot run here: {result['why_not']}"
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    return f"{'right' if result['is_right'] else 'WRONG'}, error {result['error']:.1e}"


def _try(run: Callable[..., jax.Array], arrays: list[Any], right: np.ndarray, tolerance: float) -> dict:
    try:
        out = np.asarray(jax.jit(run)(*arrays), np.float32)
    except Unsupported as error:
        return {"is_right": None, "why_not": str(error)}
    except Exception as error:  # Compilers and drivers raise anything: the other backends are still tried.
        return {"is_right": False, "failed": _first_line(error)}
    worst = float(np.linalg.norm(right - out) / np.linalg.norm(right))
    return {"is_right": worst < tolerance, "error": worst}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


WINDOW = Window(16, 32)


def _draw(seed: int, dtype: jnp.dtype, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def _cache(dtype: jnp.dtype) -> tuple[Pools, Heads]:
    shapes = ((1, 1, 640, 64),) * 2 + ((1, 1, WINDOW.size, 64),) * 2
    pools = Pools(*(_draw(seed, dtype, *shape) for seed, shape in enumerate(shapes)))
    return pools, Heads(jnp.array([True, False]), jnp.zeros(2, jnp.int32))


def _qkv(dtype: jnp.dtype, tokens: int) -> list[jax.Array]:
    return [_draw(4 + i, dtype, 1, tokens, heads, 64) for i, heads in enumerate((4, 2, 2))]


# For each operation, a function of (arrays, backend) and its arrays.


def _prefill(dtype: jnp.dtype) -> list[Any]:
    rows: dict[str, Any] = {"start": jnp.array([200], jnp.int32), "lengths": jnp.array([150], jnp.int32)}
    return [partial(prefill_attention, **rows, window=WINDOW), *_qkv(dtype, 150), *_cache(dtype)]


def _decode(dtype: jnp.dtype) -> list[Any]:
    run = partial(decode_attention, lengths=jnp.array([600], jnp.int32), window=WINDOW)
    return [run, _draw(4, dtype, 1, 4, 64), *_cache(dtype)]


def _training(dtype: jnp.dtype) -> list[Any]:
    return [partial(gated_attention, window=WINDOW), *_qkv(dtype, 128), jnp.array([0.25, 0.75], jnp.float32)]


OPERATIONS = {"prefill": _prefill, "decode": _decode, "training": _training}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
