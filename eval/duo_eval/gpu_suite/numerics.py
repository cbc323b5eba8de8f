"""Every kernel compared with the dense reference in float32, on certification's inputs, which each run draws afresh."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite.section import Case
from pallas_kernels import Unsupported, Window
from pallas_kernels.backends import find_backend
from pallas_kernels.certify.cases import GPU, SMALL, TOLERANCE, make
from pallas_kernels.choices import here
from pallas_kernels.types import OPERATIONS, Request

# "long" is enough for the largest number of splits.
SIZES = {"small": SMALL, "usual": replace(GPU, rounds=1), "long": replace(GPU, decode=300_000, rounds=1)}
WINDOW = {"small": (4, 12), "usual": (64, 256), "long": (64, 256)}


def cases(*, smoke: bool) -> Iterator[Case]:
    """Operations, types, and head dims and groups of Llama-3, Llama-2, SmolLM2, one KV head, a head dim of 80."""
    shapes = [(40, 2)] if smoke else [(128, 4), (128, 1), (64, 3), (256, 8), (80, 5)]
    size = {"size": "small" if smoke else "usual"}
    for operation in OPERATIONS:
        for dtype in ("bfloat16",) if smoke else TOLERANCE:
            for head_dim, group in shapes:
                yield {"operation": operation, "dtype": dtype, "head_dim": head_dim, "group": group, **size}
    quantized = (
        [(name, (32, 2), "int4") for name in ("decode", "append")]
        if smoke
        else product(("prefill", "decode", "append"), shapes[::2], ("int8", "int4"))
    )
    for operation, (head_dim, group), cache in quantized:
        shape = {"operation": operation, "dtype": "bfloat16", "head_dim": head_dim, "group": group}
        yield {**shape, "cache": cache, **size}
    if smoke:
        return
    usual = {"dtype": "bfloat16", "head_dim": 128, "group": 4}
    for operation in ("prefill", "decode"):
        for only in ("full", "ring"):
            yield {"operation": operation, **usual, "only": only, **size}
    yield {"operation": "decode", **usual, "size": "long"}


def request_of(case: Case) -> Request:
    """What a case asks of a backend; training has streaming heads."""
    sizes = {"head_dim": case["head_dim"], "group": case["group"], "window": Window(*WINDOW[case["size"]])}
    pools = {"full": case.get("cache", case["dtype"]), "ring": case["dtype"]}
    kept = {name: dtype for name, dtype in pools.items() if case.get("only", name) == name}
    return here(
        Request.of(case["operation"], q=case["dtype"], **sizes, **({} if case["operation"] == "training" else kept))
    )


def measure(case: Case) -> dict[str, Any]:
    """Errors of the outputs and, in training, of the gradients."""
    seed, request = time.time_ns() % (1 << 31), request_of(case)
    # Named backends that cannot write a token write as `xla`, whose result is not theirs.
    if reason := find_backend(case["backend"]).supports(request):
        raise Unsupported(f"the {case['backend']} backend {reason}")
    made = make(request, SIZES[case["size"]], seed)
    exact = made.exact()
    program = jax.jit(made.program(case["backend"])).lower(made.inputs).compile()
    poison()
    errors = made.errors(program(made.inputs), exact)
    # `error < tolerance`, not `not error > tolerance`: NaN is wrong too.
    return {"seed": seed, "errors": errors, "is_right": all(error < made.tolerance for error in errors.values())}


def poison() -> None:
    """Fill free memory with NaN and release it: elements that a kernel does not write then show."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    used = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    blocks = max(1, int(0.8 * (limit - used)) >> 28)  # of 256 MiB
    jax.block_until_ready([jnp.full((1 << 26,), jnp.nan, jnp.float32) for _ in range(min(blocks, 400))])


def line(case: Case, result: dict[str, Any]) -> str:
    """Verdict and error."""
    verdict = "right" if result["is_right"] else "WRONG"
    about = f"{case['operation']}, {case['dtype']}, head dim {case['head_dim']}, group {case['group']}"
    about += f", {case['cache']} cache" if "cache" in case else ""
    about += f", only {case['only']}" if "only" in case else ""
    return f"{about}, {case['backend']}: {verdict}, error {max(result['errors'].values()):.1e}"
