"""Is a backend right here, and how fast? One verdict for a request: compiled, compared, repeated, timed."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.certify.cases import Case
from pallas_kernels.certify.verdicts import Verdict
from pallas_kernels.errors import first_line, is_no_memory

# Runs that must be equal bit for bit. The kernels add nothing atomically, so a difference is a race.
RUNS = 20
# Memory around an output that nothing may write to.
CANARIES = 8
CANARY = np.float32(-1.375e19)
# How the reason of a verdict begins if the program could not be run to its end.
FAILED = "fails"


class NoMemory(Exception):
    """The device's memory is taken, by this process or another: nothing can be said about a backend."""


def examine(case: Case, backend: str, exact: list[np.ndarray], phase: Callable[[str], None]) -> Verdict:
    """A verdict on one backend; `phase` is called with "compile" and "run" when they begin.

    Raises:
        NoMemory: there is too little to find out.
    """
    phase("compile")
    try:
        program = jax.jit(case.program(backend)).lower(case.inputs).compile()
    except Exception as error:  # Compilers raise anything.
        _check_memory(error)
        return Verdict(False, f"does not compile: {first_line(error)}")
    phase("run")
    try:
        return _run(case, program, exact)
    except Exception as error:  # So do drivers.
        _check_memory(error)
        return Verdict(False, f"{FAILED}: {first_line(error)}")


def _run(case: Case, program: Any, exact: list[np.ndarray]) -> Verdict:
    before = _sums(case.inputs)
    canaries = _canaries(case.inputs)
    first = program(case.inputs)
    errors = case.errors(first, exact)
    error = max(errors.values())
    if not error < case.tolerance:  # Not `error >= tolerance`: NaN is wrong too.
        name = max(errors, key=lambda name: errors[name])
        return Verdict(False, f"wrong numbers: error {error:.1e} of {name}, {case.tolerance:g} is allowed", error)
    bits, seconds = [_bits(x) for x in first], float("inf")
    for run in range(RUNS):
        begin = time.perf_counter()
        outputs = jax.block_until_ready(program(case.inputs))
        seconds = min(seconds, time.perf_counter() - begin)
        if not all(np.array_equal(_bits(x), right) for x, right in zip(outputs, bits, strict=True)):
            return Verdict(False, f"differs from run to run: run {run + 2} of the same program", error)
    if not all(bool((x == CANARY).all()) for x in canaries) or _sums(case.inputs) != before:
        return Verdict(False, "writes outside of its output", error)
    return Verdict(True, "", error, seconds / (case.count * case.rounds))


def _check_memory(error: Exception) -> None:
    if is_no_memory(error):
        raise NoMemory(first_line(error)) from error


def _canaries(inputs: Any) -> list[jax.Array]:
    """Arrays of a known number, with gaps of the outputs' size between them.

    The gaps are of NaN, so that an element shows which a kernel does not write.
    """
    size = int(inputs.arrays[0].size)
    arrays = [jnp.full((size,), CANARY if i % 2 else jnp.nan, jnp.float32) for i in range(2 * CANARIES)]
    jax.block_until_ready(arrays)
    return arrays[1::2]


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    words = x if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return words.astype(jnp.uint32).sum(dtype=jnp.uint32)


def _sums(tree: Any) -> list[int]:
    """A checksum of each array."""
    return [int(_sum(x)) for x in jax.tree.leaves(tree)]


def _bits(x: jax.Array) -> np.ndarray:
    host = np.asarray(x)
    return host.view(f"uint{8 * host.itemsize}")
