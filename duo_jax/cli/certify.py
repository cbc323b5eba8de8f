"""Certification when a command starts: before jax takes the GPU, and before weights are loaded."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from duo_jax.certified import certify_command, inference
from duo_jax.checkpoint.load import open_config
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.types import Request


def certify_for(command: Any) -> None:
    """Find the missing verdicts on the attention that a command's flags ask for. Nothing happens without a GPU.

    A group of flags whose attention is not that of `ModelOptions` and `PatternOptions` has a method `requests`.
    """
    if not may_have_gpu():
        return
    try:
        requests = list(requests_of(command))
    except (ValueError, OSError, NotImplementedError):
        return  # The command itself reports what is wrong with its flags.
    if requests:
        certify_command(requests)


def requests_of(command: Any) -> Iterator[Request]:
    """What will run, by the groups of flags of a command."""
    groups = list(_groups(command))
    own = [group for group in groups if callable(getattr(group, "requests", None))]
    if own:
        yield from own[0].requests()
        return
    found = {type(group): group for group in groups}
    if (model := found.get(ModelOptions)) is None:
        return
    pattern = found.get(PatternOptions, PatternOptions()).load(1)
    mesh = found.get(DeviceOptions, DeviceOptions()).size
    config = open_config(model.model).with_dtypes(dtype=model.dtype)
    yield from inference(config, pattern, kv_dtype=found.get(CacheOptions, CacheOptions()).kv_dtype, mesh=mesh)


def _groups(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _groups(getattr(value, field.name))
