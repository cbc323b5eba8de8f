"""Launches of kernels in Triton's own language from jax; needs jax-triton and triton."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax_triton
from jax.interpreters import partial_eval
from jaxtyping import Array

from pallas_kernels.gpus import chip
from pallas_kernels.merge import LN_2, LOG2_E, MASKED

# jax-triton 0.4 renamed out_shape.
OUT_TYPE = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"

# jax 0.12 calls rules of dead-code elimination with the live inputs too, which jax-triton 0.4.1's rule does not accept.
# Without that rule, jax uses its default.
if jax.__version_info__ >= (0, 12):
    for primitive, rule in list(partial_eval.dce_rules.items()):
        if primitive.name == "triton_kernel_call" and len(inspect.signature(rule).parameters) == 2:
            del partial_eval.dce_rules[primitive]


def launch(
    kernel: Any,
    arrays: tuple[Array, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    sizes: dict[str, int | float],
) -> list[Array]:
    """Run a kernel over a grid; `sizes` are the constants that it is compiled with."""
    major, minor = chip().capability or (0, 0)
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        **{OUT_TYPE: list(out)},
        grid=(*grid, 1, 1)[:3],
        name=kernel.fn.__name__,
        num_warps=warps,
        num_stages=stages,
        compute_capability=10 * major + minor,
        **sizes,
    )


def of_softmax(head_dim: int) -> dict[str, float]:
    """The constants of `tile.accumulate` and `tile.finish`."""
    return {"scale": head_dim**-0.5 * LOG2_E, "masked": MASKED, "ln_2": LN_2}
