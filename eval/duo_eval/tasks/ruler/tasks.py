"""The thirteen tasks of RULER by name, and how their answers are scored: `TASKS` is the table."""

from duo_eval.tasks.ruler.common import CommonWords
from duo_eval.tasks.ruler.frequent import FrequentWords
from duo_eval.tasks.ruler.kind import Example, Kind
from duo_eval.tasks.ruler.niah import Niah
from duo_eval.tasks.ruler.qa import QA
from duo_eval.tasks.ruler.tracking import Tracking

TASKS: dict[str, Kind] = {
    "niah_single_1": Niah("repeat"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", num_values=4),
    "niah_multiquery": Niah("essay", num_keys=4, num_queries=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_squad": QA(),
    "qa_hotpot": QA(),
}


def score(kind: Kind, example: Example, answer: str) -> float:
    """The paper's metric, by lm-eval's function: the fraction of outputs in an answer, or whether it contains any.

    lm-eval's function for the latter also returns a fraction, so the former is called with one output at a time.
    """
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    processed = postprocess_pred([answer])
    groups = [list(example.outputs)] if kind.match == "all" else [[output] for output in example.outputs]
    return float(max(string_match_all(processed, [group]) for group in groups))
