"""Several processes that run one program: joining them, and checking that they have the same settings and backends.

JAX does the rest: every process runs the program on its own devices. If one process dies, the others end too.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from duo_jax.differences import differing
from pallas_kernels.certify import verdicts
from pallas_kernels.certify.machine import environment

# Seconds without a heartbeat until a process counts as dead, and seconds that the others have to shut down.
HEARTBEAT, LEAVING = 15, 30


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, before any device is used.

    Args:
        coordinator: `host:port` of the first process, which the others must reach; by default, like the other two,
            from the environment of Slurm, Open MPI, Kubernetes or a cloud's TPUs.
        processes: their number.
        process_id: number of this one, from 0.

    Raises:
        ValueError: some of the three without the others, or none of them outside a known cluster.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"give coordinator, processes and process_id, or none of them on a cluster: missing {missing}")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ValueError(f"process_id must be in [0, {processes}), got {process_id}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=LEAVING,
    )
    share_verdicts()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def is_shared(mesh: Mesh) -> bool:
    """Whether a mesh has devices of several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def check_alike(about: Mapping[str, Any]) -> None:
    """Check that all processes have the same plain values.

    Raises:
        ValueError: in every process, if one differs from the first, with both values of each difference.
    """
    first, *others = gather_json(about)
    for number, other in enumerate(others, 1):
        if different := _differences(first, other):
            raise ValueError(f"processes 0 and {number} were started with different settings: {different}")


def share_verdicts() -> None:
    """Let all processes choose attention backends by the first one's verdicts, as they must run one program.

    All processes call this at the same point. Where their devices, versions or tiles differ, a verdict of the first one
    says nothing about the others: all then run `xla`.

    Raises:
        ValueError: in every process, if one has another DUO_BACKEND than the first.
    """
    if jax.process_count() == 1:
        return
    check_alike({"DUO_BACKEND": os.environ.get("DUO_BACKEND") or None})
    # The numbers and names of its GPUs may differ: `device` has the kind.
    here = {name: value for name, value in environment().items() if name not in ("gpus", "visible")}
    own = {"machine": here | {"device": verdicts.device()}, "verdicts": verdicts.known().to_json()}
    first, *others = gather_json(own)
    for number, other in enumerate(others, 1):
        if different := _differences(first["machine"], other["machine"]):
            verdicts.agree_on(verdicts.Found())
            if first["machine"]["device"]["kind"] != "cpu":  # Which needs no verdicts.
                warnings.warn(
                    f"verdicts on attention backends hold for one kind of machine, but processes 0 and {number} "
                    f"differ: {different}; all of them run 'xla'",
                    stacklevel=2,
                )
            return
    verdicts.agree_on(verdicts.Found.from_json(first["verdicts"]))


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words; empty if there are none."""
    return "; ".join(
        f"{name} is {left!r} in the first, {right!r} in the other" for name, left, right in differing(first, other)
    )


def gather_json(value: Any) -> list[Any]:
    """Every process's plain value, in the order of the processes; all must call this at the same point."""
    own = np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
    longest = max(row[0] for row in gather([len(own)]))
    gathered = gather(np.pad(own, (0, longest - len(own))).tolist())
    return [json.loads(bytes(row).rstrip(b"\0")) for row in gathered]


def gather(numbers: Sequence[int]) -> list[list[int]]:
    """Every process's numbers, in the order of the processes; all must call this at the same point."""
    if jax.process_count() == 1:
        return [list(numbers)]
    rows = multihost_utils.process_allgather(np.asarray(numbers, np.int32))
    return [[int(number) for number in row] for row in rows]
