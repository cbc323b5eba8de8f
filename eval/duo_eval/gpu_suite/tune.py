"""The fastest tiles of each kernel for bfloat16 and head dim 128, among those that `duo eval tune` tries."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duo_eval.aot.tune import Tune
from duo_eval.gpu_suite.section import Case
from duo_jax.reading import read_json
from pallas_kernels import Unsupported


def cases(*, smoke: bool) -> Iterator[Case]:
    """Prefill and decode of each backend that has tiles."""
    kernels = ("decode",) if smoke else ("mosaic_flash", "mosaic_decode", "decode", "flash", "short")
    size = {"head_dim": 16, "tokens": 1, "context": 300} if smoke else {"head_dim": 128}
    for kernel in kernels:
        yield {"kernel": kernel, "tokens": 16_384, "context": 262_144} | size


def measure(case: Case) -> dict[str, Any]:
    """The tiles, which are not kept for this user: what is measured later does not depend on them."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        sizes = {"head_dims": (case["head_dim"],), "tokens": case["tokens"], "context": case["context"]}
        try:
            Tune(kernels=(case["kernel"],), out=table, **sizes).run()
        except ValueError as error:
            if "run here" not in str(error):
                raise
            raise Unsupported(str(error)) from None
        return {"tiles": read_json(table)}


def line(case: Case, result: dict[str, Any]) -> str:
    """The tiles."""
    (by_kernel,) = result["tiles"].values()
    found = by_kernel[case["kernel"]].items()
    texts = (f"{size}: {', '.join(f'{name} {value}' for name, value in tiles.items())}" for size, tiles in found)
    return f"{case['kernel']}, {'; '.join(texts)}"
