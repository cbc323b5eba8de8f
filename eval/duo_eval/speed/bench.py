"""`duo bench`: the README's short table, which is `duo eval efficiency` at the sizes of a small real model on a CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from duo_eval.speed.efficiency import Efficiency


@dataclass(frozen=True)
class Bench(Efficiency):
    """Time prefill and decode of SmolLM2 with full attention, a head pattern, and Hugging Face transformers."""

    model: tuple[str, ...] = ("smollm2-135m-instruct",)
    pattern: str | None = "smollm2-135m-instruct"
    contexts: tuple[int, ...] = (2048, 4096, 8192)
    batch_sizes: tuple[int, ...] = (1, 4)
    out: Path = Path("bench.json")

    task: ClassVar[str] = "bench"
