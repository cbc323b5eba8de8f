"""Training curves: losses, gates, learning rate over the steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def curves_figure(metrics: Mapping[str, Float[np.ndarray, "S"]], title: str) -> Figure:
    """Training curves over `metrics["step"]`: losses, gates, learning rate, other numeric metrics; NaN draws no point.

    With more than 100 steps, a thick line shows the running mean of a loss over 2 % of the steps.
    """
    panels = _panels([name for name in metrics if name not in ("step", "seconds", "tokens")])
    figure = Figure(figsize=(7.5, 0.7 + 1.9 * len(panels)), layout="constrained")
    steps = metrics["step"]
    every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(every, panels.items(), strict=True):
        # While every gate is 1, the distance to the teacher is only rounding; it would fill a logarithmic axis.
        if label == "loss":
            metrics = {**metrics, **{name: _above_rounding(metrics[name]) for name in names}}
        lowest = min((np.nanmin(metrics[name]) for name in names if np.isfinite(metrics[name]).any()), default=0.0)
        logarithmic = label == "loss" and lowest >= 0 and any((metrics[name] > 0).any() for name in names)
        for index, name in enumerate(names):
            drawn = np.isfinite(metrics[name]) & ((metrics[name] > 0) | (not logarithmic))
            style: dict[str, Any] = {
                "color": f"C{index}",
                "label": "above 0.5" if name == "above_half" else name.replace("_", " "),
            }
            _curve(axes, steps[drawn], metrics[name][drawn], style, average=label == "loss")
        if logarithmic:
            axes.set_yscale("log")
        elif label == "gates":
            axes.set_ylim(-0.03, 1.03)
        elif label == "learning rate":
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=9)
    every[-1].set_xlabel("step")
    every[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    every[0].set_title(title, fontsize=10, parse_math=False)
    figure.align_ylabels(every)
    return figure


def _above_rounding(values: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """NaN for values that are negligible compared with the largest."""
    largest = np.nanmax(np.abs(values), initial=0.0)
    return np.where(np.abs(values) < 1e-6 * largest, np.nan, values)


def _panels(names: list[str]) -> dict[str, list[str]]:
    """The curves of each panel; panels without curves are left out."""
    kinds = {
        "loss": ("loss", "distillation", "next_token", "regularization"),
        "gates": ("mean_gate", "above_half", "sparsity", "target_sparsity"),
        "learning rate": tuple(name for name in names if "learning_rate" in name),
    }
    known = {name for kind in kinds.values() for name in kind}
    panels = {label: [name for name in kind if name in names] for label, kind in kinds.items()}
    panels["other"] = [name for name in names if name not in known]
    return {label: curves for label, curves in panels.items() if curves}


def _curve(
    axes: Axes, steps: Float[np.ndarray, "S"], values: Float[np.ndarray, "S"], style: dict[str, Any], *, average: bool
) -> None:
    width = len(values) // 50
    if average and width >= 2:
        axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.3)
        steps, values = (np.convolve(line, np.full(width, 1 / width), "valid") for line in (steps, values))
    axes.plot(steps, values, linewidth=1.5, marker="o" if len(values) < 30 else None, markersize=3, **style)
