"""Flags of commands that several devices, or several processes, can share."""

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
    """Processes that do the work together."""

    distributed: bool = False
    """This process is one of several, each started with the same flags but --process-id, or by a cluster's launcher."""
    coordinator: str | None = None
    """host:port of the first process; by default, like the next two, from the environment of Slurm, Open MPI or
    Kubernetes."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""

    def join(self, settings: Mapping[str, Any]) -> None:
        """Meet the others, before any device is used, and see that they were started with the same settings.

        Raises:
            ValueError: flags of several processes without --distributed, or some of them only; processes with other
                settings or versions.
        """
        given = self.coordinator, self.processes, self.process_id
        if self.distributed:
            join(*given)
            versions = {package: version(package) for package in ("duo-jax", "jax", "jaxlib", "flax", "optax")}
            check_alike({"versions": versions, "settings": json.loads(json.dumps(settings, default=str))})
        elif any(value is not None for value in given):
            raise ValueError("--coordinator, --processes and --process-id are for several processes: add --distributed")

    @contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Let the first process print, and no other; errors pass."""
        if not self.distributed or is_first():
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield


@dataclass(frozen=True)
class DeviceOptions:
    """Devices that share model and cache."""

    mesh: str | None = None
    """Devices along each axis, such as tensor=4,sequence=2: tensor shares heads, sequence the tokens of retrieval
    heads, data the rows of a batch. Without it, one device does all."""

    @property
    def size(self) -> MeshSize:
        """How many devices share what."""
        return MeshSize() if self.mesh is None else MeshSize.parse(self.mesh)

    def make(self) -> Mesh | None:
        """The devices; None: the default one.

        Raises:
            ValueError: text that is no mesh, or more devices than there are.
        """
        return None if self.mesh is None else make_mesh(**vars(self.size))
