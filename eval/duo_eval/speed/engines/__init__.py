"""Engines that are measured side by side on the same weights; each is a file here and a row of `ENGINES`."""

from duo_eval.speed.engines.base import Engine
from duo_eval.speed.engines.cudnn import Cudnn
from duo_eval.speed.engines.duo import Duo
from duo_eval.speed.engines.transformers import Transformers

__all__ = ["ENGINES", "PEERS", "Engine"]

ENGINES: dict[str, type[Engine]] = {"transformers": Transformers, "cudnn": Cudnn, "duo": Duo}
# The others, measured before this library at each point.
PEERS = tuple(name for name in ENGINES if name != "duo")
