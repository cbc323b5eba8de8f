"""Figures of a head pattern: its gates, and its training if the folder has the metrics."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from duo_train.metrics import METRICS_FILE
from duo_train.plot import read_metrics

from duo_eval.show.result_type import Drawn, ResultType
from duo_jax import HeadPattern


def pattern_figures(folder: Path) -> Iterator[Drawn]:
    """Gates of the pattern, and its training curves if there are metrics."""
    from duo_train.plots import curves_figure, gates_figure

    pattern = HeadPattern.load(folder)
    gates = pattern.shown_gates
    title = (
        f"{pattern.num_layers} layers × {pattern.num_kv_heads} KV heads\n"
        f"{(gates > 0.5).sum()} of {pattern.num_choosable} gates above 0.5, mean {np.nanmean(gates):.2f}"
    )
    alt = f"Gates of {folder.name}: {title}".replace("\n", ", ")
    yield Drawn("gates", gates_figure(gates, None, title), f"{alt}.")
    if (folder / METRICS_FILE).exists():
        metrics = read_metrics(folder / METRICS_FILE)
        ends = "; ".join(f"{name} {values[0]:.3g} to {values[-1]:.3g}" for name, values in metrics.items())
        title = f"{folder.name}, up to step {metrics['step'].max():,.0f}"
        yield Drawn("training", curves_figure(metrics, title), f"Training of {title}: {ends}.")


# A folder, not a file: recognized by its gates.
RESULT = ResultType("Gates", lambda first: False, figures=(pattern_figures,), group="Head patterns")
