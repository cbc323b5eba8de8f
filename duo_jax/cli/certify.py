"""Certification when a command starts: before jax takes the GPU, and before weights are loaded."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from duo_jax.certified import inference
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions
from pallas_kernels.certify import certify, check_settings
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.types import Request


def certify_for(command: Any) -> None:
    """Find the missing verdicts on the attention that a command's flags ask for. Nothing is checked without a GPU.

    A group of flags whose attention is not that of `ModelOptions` and `PatternOptions` has a method `requests`; it
    returns None where it is.

    Raises:
        ValueError, Unsupported: a `DUO_CERTIFY` or `DUO_BACKEND` that does not exist or cannot do this.
    """
    if not may_have_gpu() and not os.environ.get("DUO_BACKEND"):
        return
    check_settings()
    try:
        requests = requests_of(command)
    except (ValueError, OSError, NotImplementedError):
        return  # The command itself reports what is wrong with its flags.
    if requests is None:
        return
    check_settings(requests)
    if may_have_gpu():
        certify(requests)
        # All that will run was checked: neither loading a model nor a process that the command starts checks more.
        os.environ["DUO_CERTIFY"] = "0"


def requests_of(command: Any) -> list[Request] | None:
    """What will run, by the groups of flags of a command; None: a command without a model."""
    groups = list(_groups(command))
    own = [group for group in groups if callable(getattr(group, "requests", None))]
    if own and (requests := own[0].requests()) is not None:
        return list(requests)
    found = {type(group): group for group in groups}
    if (model := found.get(ModelOptions)) is None:
        return None
    mesh = found.get(DeviceOptions, DeviceOptions()).size
    config = open_config(model.model).with_dtypes(dtype=model.dtype)
    # Only the choice by a KV budget depends on the length.
    pattern = found.get(PatternOptions, PatternOptions()).load(config.trained_positions)
    return inference(config, pattern, kv_dtype=found.get(CacheOptions, CacheOptions()).kv_dtype, mesh=mesh)


def _groups(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _groups(getattr(value, field.name))
