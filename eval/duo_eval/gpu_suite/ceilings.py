"""What this GPU can do at most: the ceilings of everything after."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite.section import Case, fastest


def cases(*, smoke: bool) -> Iterator[Case]:
    """A large copy, a large matrix product."""
    yield {"what": "copy", "elements": 1 << (20 if smoke else 30)}
    yield {"what": "matmul", "side": 256 if smoke else 8192}


def measure(case: Case) -> dict[str, Any]:
    """Bytes a second, read and written; or operations a second."""
    if case["what"] == "copy":
        x = jnp.zeros(case["elements"], jnp.bfloat16)
        seconds = fastest(jax.jit(lambda x: x + 1), x)
        return {"seconds": seconds, "bytes_per_second": 2 * x.nbytes / seconds}
    x = jax.random.normal(jax.random.key(0), (case["side"],) * 2, jnp.bfloat16)
    seconds = fastest(jax.jit(jnp.matmul), x, x)
    return {"seconds": seconds, "flops_per_second": 2 * case["side"] ** 3 / seconds}


def line(case: Case, found: dict[str, Any]) -> str:
    """In words."""
    if case["what"] == "copy":
        return f"copy: {found['bytes_per_second'] / 1e12:.2f} TB/s"
    return f"matmul {case['side']}^3: {found['flops_per_second'] / 1e12:.0f} TFLOP/s"
