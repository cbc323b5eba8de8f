"""The pictures of `duo plot`, drawn with matplotlib: arrays in, `Figure` out. Knows no model and no file format."""

from duo_train.plots.attention import MAP_CELLS, attention_figure, attention_shares
from duo_train.plots.curves import curves_figure
from duo_train.plots.gates import GateMap, gate_maps_figure, gates_figure
from duo_train.plots.sample import Passkey, sample_figure, shortened
from duo_train.plots.save import check, save

__all__ = [
    "MAP_CELLS",
    "GateMap",
    "Passkey",
    "attention_figure",
    "attention_shares",
    "check",
    "curves_figure",
    "gate_maps_figure",
    "gates_figure",
    "sample_figure",
    "save",
    "shortened",
]
