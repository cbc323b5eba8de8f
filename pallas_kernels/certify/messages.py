"""Requests as JSON, for the file descriptors between the two processes."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.types import Request
from pallas_kernels.window import Window

# What every line has that the other process writes: libraries may write lines of their own before.
OURS = "certify"

# Fields that a verdict does not depend on, or that only the process with the device knows.
_LEFT_OUT = ("device", "capability", "capacities", "dtypes", "bits")


def to_json(request: Request) -> dict[str, Any]:
    """What describes a request to another process on this machine."""
    values = {name: value for name, value in vars(request).items() if name not in _LEFT_OUT}
    window = request.window
    return values | {"window": None if window is None else [window.sink, window.recent]}


def from_json(values: Mapping[str, Any]) -> Request:
    """What `to_json` described."""
    window = values["window"]
    return Request.of(**dict(values) | {"window": None if window is None else Window(*window)})
