"""`duo models` and `duo patterns`: what `--model` and `--pattern` can name."""

from collections.abc import Sequence
from dataclasses import dataclass

from duo_jax.checkpoint.packaged import PACKAGED
from duo_jax.families.presets import PRESETS
from duo_jax.families.table import FAMILIES
from duo_jax.pattern.files import published_patterns
from duo_jax.pattern.pattern import HeadPattern


@dataclass(frozen=True)
class Models:
    """List the models that have a name, and the architectures that are supported."""

    def run(self) -> None:
        """Print both."""
        print("Packaged models, downloaded from the Python package index on the first use:")
        packages = {name: file.requirement.split()[0] for name, file in PACKAGED.items()}
        _print(*((name, packages[name], _terms(file.terms)) for name, file in PACKAGED.items()))
        print("\nPresets: shapes without weights, for duo plan, duo inspect and duo bench:")
        rows = [
            (
                name,
                f"{config.num_parameters / 1e9:.2f}B"
                + (f", {config.active_parameters / 1e9:.2f}B active" if config.num_experts else ""),
                config.family,
                config.num_layers,
                f"{config.num_heads}/{config.num_kv_heads}",
                config.trained_positions,
            )
            for name, config in PRESETS.items()
        ]
        _print(("name", "weights", "architecture", "layers", "query/KV heads", "trained for tokens"), *rows)
        print(f"\nAny other {', '.join(FAMILIES)} model: a Hugging Face folder, a .gguf file, or a hub id.")


@dataclass(frozen=True)
class Patterns:
    """List the head patterns that have a name."""

    def run(self) -> None:
        """Print them."""
        rows = []
        for name in published_patterns():
            pattern = HeadPattern.load(name)
            shape = f"{pattern.num_layers} x {pattern.num_kv_heads}"
            rows.append((name, shape, pattern.sink_size, pattern.recent_size, f"{pattern.sparsity:.0%}"))
        _print(("name", "layers x KV heads", "sinks", "recent", "streaming at threshold 0.5"), *rows)
        print("\nA pattern belongs to one model. --sparsity chooses another share of streaming heads.")
        print("A folder that duo identify wrote is a pattern, too.")


def _terms(address: str | None) -> str:
    return "" if address is None else f"terms of use: {address} (--accept-terms)"


def _print(*rows: Sequence[object]) -> None:
    """Rows in columns as wide as their content: a name is never cut."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
