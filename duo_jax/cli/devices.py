"""Flags of commands that can run on several devices or in several processes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jax.sharding import Mesh

from duo_jax.mesh.mesh import MeshSize, make_mesh
from duo_jax.mesh.processes import check_alike, is_first, join


@dataclass(frozen=True)
class ProcessOptions:
    """Processes that run the command together."""

    distributed: bool = False
    """Run as one of several processes, all started by a cluster or with the same flags except --process-id."""
    coordinator: str | None = None
    """host:port of the first process. The default of this flag and the next two comes from the environment of Slurm,
    Open MPI or Kubernetes."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""

    def join(self, settings: Mapping[str, Any]) -> None:
        """Connect to the other processes, before any device is used, and check that their settings are the same.

        Raises:
            ValueError: flags of several processes without --distributed, an incomplete set of them, or processes with
                different settings or versions.
        """
        given = self.coordinator, self.processes, self.process_id
        if self.distributed:
            join(*given)
            versions = {package: version(package) for package in ("duo-jax", "jax", "jaxlib", "flax", "optax")}
            check_alike({"versions": versions, "settings": json.loads(json.dumps(settings, default=str))})
        elif any(value is not None for value in given):
            raise ValueError("--coordinator, --processes and --process-id are for several processes: add --distributed")

    @contextmanager
    def only_first_prints(self) -> Iterator[None]:
        """Silence every process but the first; errors are still raised."""
        if not self.distributed or is_first():
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield


@dataclass(frozen=True)
class DeviceOptions:
    """Devices that share model and cache."""

    mesh: str | None = None
    """Devices along each axis, such as tensor=4,sequence=2: tensor divides heads, sequence the tokens of retrieval
    heads, data the rows of a batch. By default, one device is used."""

    @property
    def size(self) -> MeshSize:
        """The number of devices along each axis."""
        return MeshSize() if self.mesh is None else MeshSize.parse(self.mesh)

    def make(self) -> Mesh | None:
        """The mesh of devices; None for the default device.

        Raises:
            ValueError: text that is not a mesh, or more devices than exist.
        """
        return None if self.mesh is None else make_mesh(**vars(self.size))
