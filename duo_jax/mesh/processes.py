"""Several processes as one: joining them, and refusing those that were started with something else.

JAX does the rest: every process runs the same program on its own devices. A process that dies ends the others.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from duo_jax.differences import differing

# Seconds without a sign of life after which a process counts as dead, and seconds that the others have to leave.
HEARTBEAT, LEAVING = 15, 30


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Make this process one of several, before any device is used.

    Args:
        coordinator: `host:port` of the first process, which the others can reach; by default, like the other two, from
            the environment of Slurm, Open MPI, Kubernetes or a cloud's TPUs.
        processes: how many there are.
        process_id: which of them this one is, from 0.

    Raises:
        ValueError: some of the three given without the others, or none and no known cluster.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"give coordinator, processes and process_id, or none of them on a cluster: no {missing}")
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


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def check_alike(about: Mapping[str, Any]) -> None:
    """Compare plain values across processes; one process alone agrees with itself.

    Raises:
        ValueError: in every process, where one has others than the first: what differs, of both.
    """
    mine = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    longest = max(row[0] for row in gather([len(mine)]))
    rows = gather(np.pad(mine, (0, longest - len(mine))).tolist())
    said = [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
    for number, theirs in enumerate(said):
        if theirs != said[0]:
            found = "; ".join(
                f"{name} is {first!r} in the first, {other!r} in the other"
                for name, first, other in differing(said[0], theirs)
            )
            raise ValueError(f"processes 0 and {number} were started with different settings: {found}")


def gather(numbers: Sequence[int]) -> list[list[int]]:
    """Every process's numbers, in the order of the processes; all must ask at the same point."""
    if jax.process_count() == 1:
        return [list(numbers)]
    found = multihost_utils.process_allgather(np.asarray(numbers, np.int32))
    return [[int(number) for number in row] for row in found]
