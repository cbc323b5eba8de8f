"""The figure of the README: what each type of head sees, and KV memory against context. Writes `overview.png`.

Run `python docs/figures/overview.py`. The memory is what `KVCache.init` would allocate.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from duo_eval.show.style import STYLES
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

import duo_jax

TOKENS, SINKS, RECENT = 16, 2, 4
RETRIEVAL, STREAMING, UNSEEN = STYLES["full"].colour, STYLES["duo"].colour, "#e9e9e9"
MODEL, PATTERN = "llama-3-8b", "llama-3-8b-instruct-gradient-1048k"


def draw_mask(axes: Axes, visible: np.ndarray, color: str, title: str) -> None:
    """Queries (rows) by keys (columns): coloured where a query sees a key."""
    axes.imshow(visible, cmap=ListedColormap([UNSEEN, color]), vmin=0, vmax=1)
    axes.set_xticks(np.arange(-0.5, TOKENS), [])
    axes.set_yticks(np.arange(-0.5, TOKENS), [])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, color=color, fontweight="bold")
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")


def draw_memory(axes: Axes) -> None:
    """Bytes of keys and values against context, with full attention and with half of the heads streaming."""
    config = duo_jax.PRESETS[MODEL]
    half = duo_jax.HeadPattern.load(PATTERN, sparsity=0.5)
    lengths = np.linspace(1024, 1_048_576, 32).astype(int)
    lines = (
        (None, RETRIEVAL, "full attention", (0.04, 112)),
        (half, STREAMING, "half of the\nheads stream", (0.52, 0)),
    )
    for pattern, color, label, place in lines:
        gigabytes = [duo_jax.KVCache.bytes_for(config, pattern, 1, int(length)) / 1e9 for length in lengths]
        axes.plot(lengths / 1e6, gigabytes, color=color, linewidth=3)
        axes.text(1.07, gigabytes[-1], f"{gigabytes[-1]:.0f} GB", color=color, va="center")
        axes.text(*place, label, color=color, fontweight="bold", va="bottom")
    axes.set_title("KV cache, Llama-3-8B")
    axes.set(xlabel="million tokens of context", ylabel="GB", xlim=(0, 1.05), ylim=(0, 150), xticks=[0, 0.5, 1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def main() -> None:
    """Draw the three panels on white, which is readable on a light and on a dark page."""
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 16, "axes.titlepad": 10})
    figure, (retrieval, streaming, memory) = plt.subplots(
        1, 3, figsize=(9.6, 3.3), width_ratios=(1, 1, 1.35), layout="constrained", facecolor="white"
    )
    queries, keys = np.arange(TOKENS)[:, None], np.arange(TOKENS)[None, :]
    causal = keys <= queries
    draw_mask(retrieval, causal, RETRIEVAL, "Retrieval head")
    draw_mask(streaming, causal & ((keys < SINKS) | (keys > queries - RECENT)), STREAMING, "Streaming head")
    draw_memory(memory)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
