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
import numpy as np
import tyro

from duo_jax.certified import TRAINING_WINDOW, certify_model, inference, training
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import PatternOptions
from duo_jax.cli.pretend import lines_of, pretend
from duo_jax.cli.serve import Serve
from duo_jax.files import check_output, write_text
from duo_jax.finite import json_text
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import FloatDtype, KvDtype
from duo_jax.reading import read_json
from duo_jax.tune import kernels_here, tune
from pallas_kernels import BACKENDS, Unsupported, Window
from pallas_kernels.backends import find_backend
from pallas_kernels.certify import cases, report
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.choices import here
from pallas_kernels.errors import first_line
from pallas_kernels.gpus import chip, device_kind
from pallas_kernels.tiles import tuned_file
from pallas_kernels.types import OPERATIONS, Request

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


def _ignore(line: str) -> None:
    pass


@dataclass(frozen=True)
class Doctor:
    """Check versions, devices and memory, and try every attention backend here."""

    json: bool = False
    """Print one JSON object instead of text."""
    pretend: str | None = None
    """Print what would run on a GPU that is not here, such as h100 or rtx-4090, and why other backends would not. Of a
    GPU without a name here, give the compute capability, as in 8.9."""
    tune: bool = False
    """Time four to six tile sizes of each kernel on this GPU, head dims 64 and 128, and keep the fastest for you."""
    certify: str | None = None
    """A model, by name, folder or file: check each attention backend for it on this GPU, whatever was found before, for
    up to half an hour. Its weights are not read. Flags of a head pattern say what will stream; by default nothing."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    training: bool = False
    """With --certify: check what duo identify runs instead, with --sink-size and --recent-size (128 and 256)."""
    dtype: FloatDtype | None = None
    """With --certify: data type of the model, the checkpoint's own by default."""
    kv_dtype: KvDtype | None = None
    """With --certify: data type of the cache."""
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    report: Path | None = None
    """With --certify: write the verdicts and the machine that they are of to this file, to send."""

    def run(self) -> None:
        """Examine this machine and print the findings."""
        if (self.certify is not None) + (self.pretend is not None) + self.tune > 1:
            raise ValueError("--certify, --tune and --pretend are three tasks: give one of them")
        if self.certify is not None:
            self._certify(self.certify)
            return
        if self.training or any(value is not None for value in (self.dtype, self.kv_dtype, self.report)):
            raise ValueError("--training, --dtype, --kv-dtype and --report are of --certify MODEL: add it")
        if self.pattern != PatternOptions() or self.devices != DeviceOptions():
            raise ValueError("--mesh and flags of a head pattern are of --certify MODEL: add it")
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
        requests = self._training(config) if self.training else self._inference(config)
        if self.report is not None:
            check_output(self.report)
        if not may_have_gpu():
            raise ValueError("--certify needs a GPU: jax finds none here, or JAX_PLATFORMS excludes it")
        certify_model(config, requests, full=True)
        found = report()
        if self.report is not None:
            write_text(self.report, json_text(found) + "\n")
        if self.json:
            print(json_text(found))
        if found["device"] is None:
            raise ValueError("nothing was checked, for the reason above")

    def _inference(self, config: ModelConfig) -> list[Request]:
        # A server's cache, which has pages, is not shared by tokens.
        pattern, pages = self.pattern.load(1), (None, Serve.page_size) if self.devices.size.sequence == 1 else (None,)
        options: dict[str, Any] = {"kv_dtype": self.kv_dtype, "mesh": self.devices.size}
        return [request for page in pages for request in inference(config, pattern, **options, page_size=page)]

    def _training(self, config: ModelConfig) -> list[Request]:
        sizes = {name: value for name, value in vars(self.pattern).items() if value is not None}
        if sizes.keys() - {"sink_size", "recent_size"} or self.kv_dtype is not None:
            raise ValueError("--training has no pattern and no cache: give at most --sink-size and --recent-size")
        window = Window(sizes.get("sink_size", TRAINING_WINDOW.sink), sizes.get("recent_size", TRAINING_WINDOW.recent))
        return training(config, window, self.devices.size)


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
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for operation in OPERATIONS:
        show(operation)
        for backend, result in _trials(_request(operation, dtype)):
            results[backend][operation] = result
            show(f"  {backend:<12}{_verdict(result)}")
    return results


def _request(operation: str, dtype: str) -> Request:
    """What is tried of an operation. The fastest kernels for GPUs take no float32."""
    pools = {} if operation == "training" else {"full": dtype, "ring": dtype}
    return here(Request.of(operation, q=dtype, head_dim=64, group=2, window=Window(16, 32), **pools))


def _trials(request: Request) -> Iterator[tuple[str, dict]]:
    """One operation of each backend, compared with the reference on the inputs of certification."""
    try:
        case = cases.make(request, cases.SMALL)
        exact = case.exact()
    except Exception as error:  # Without a reference no backend can be checked; other operations still are.
        failure = {"is_right": False, "failed": f"the reference: {first_line(error)}"}
        yield from ((backend, failure) for backend in BACKENDS)
        return
    yield "reference", {"is_right": all(bool(np.isfinite(x).all()) for x in exact), "error": 0.0}
    for backend in BACKENDS:
        if backend != "reference":
            yield backend, _try(case, backend, exact)


def _verdict(result: dict) -> str:
    if "why_not" in result:
        return f"cannot run here: {result['why_not']}"
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    return f"{'right' if result['is_right'] else 'WRONG'}, error {result['error']:.1e}"


def _try(case: cases.Case, backend: str, exact: list[np.ndarray]) -> dict:
    if (reason := find_backend(backend).supports(case.request)) is not None:
        return {"is_right": None, "why_not": f"it {reason}"}
    try:
        # On a CPU, xla is tried as it is used; other backends are interpreted there.
        options = None if backend == "xla" else cases.run_once()
        errors = case.errors(jax.jit(case.program(backend), compiler_options=options)(case.inputs), exact)
    except Unsupported as error:  # For the length of a cache, which `request` does not have.
        return {"is_right": None, "why_not": str(error)}
    except Exception as error:  # Compilers and drivers raise anything: the other backends are still tried.
        return {"is_right": False, "failed": first_line(error)}
    worst = max(errors.values())
    return {"is_right": worst < case.tolerance, "error": worst}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
