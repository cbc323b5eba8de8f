"""Results of `duo eval recall`: tables and curves."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from duo_eval.runner.provenance import origin
from duo_eval.show.curves import Chart, Line, Panel, percent_line, title_of
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, fields
from duo_eval.show.style import styles_of_settings
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.recall_cells import FULL_ATTENTION, RANDOM, STREAMING, Cell, Key, full, recall_cells
from duo_eval.stats.scores import NOTHING

Cells = Mapping[Key, Cell]


def recall_table(path: Path) -> str:
    """Token accuracy of held-out passkeys, also as a percentage of full attention's: methods by sparsities.

    Where sizes were compared, sinks by windows.
    """
    head, cells = recall_cells(path)
    if not cells:
        return NOTHING
    parts = []
    for length, base, streaming in _lengths(cells):
        sizes = {key[3:] for key in streaming}
        summary = f"Full attention {100 * base.accuracy.mean:.1f}"
        if len(sizes) > 1:
            for method, sparsity in sorted({key[1:3] for key in streaming}):
                parts.append(f"{length} tokens, {method}, {sparsity:.0%} stream:")
                parts.append(_by_size(_only(streaming, method, sparsity), base))
        elif sizes:
            parts.append(_by_sparsity(length, streaming, base))
            every = next((cell for key, cell in streaming.items() if key.method == STREAMING), None)
            summary += f", every head streaming {100 * every.accuracy.mean:.1f}" if every else ""
            summary += "; sink {}, recent {}".format(*sizes.pop())
        parts.append(f"{summary}.")
    passkeys = sorted({cell.passkeys for cell in cells.values()})
    count = f"{passkeys[0]}" if len(passkeys) == 1 else f"{passkeys[0]} to {passkeys[-1]}"
    parts.append(f"{count} passkeys a cell. {origin(head['runs'], 'duo eval recall')}")
    return "\n\n".join(parts)


def recall_details(path: Path) -> str:
    """Every cell with its intervals, and the paired differences to full attention."""
    _, cells = recall_cells(path)
    rows = []
    for key, cell in _ordered(cells):
        accuracy, difference = (one.scaled(100).format(".1f") for one in (cell.accuracy, cell.accuracy_difference))
        nll, nll_difference = (one.format(".3f") for one in (cell.nll, cell.nll_difference))
        sizes = f"{key.sink_size}, {key.recent_size}"
        if key.method == FULL_ATTENTION:
            difference = nll_difference = sizes = ""
        about = [key.length, key.method, f"{key.sparsity:.0%}", sizes, cell.passkeys]
        rows.append([*about, accuracy, difference, nll, nll_difference])
    headers = ["tokens", "method", "stream", "sink, recent", "passkeys", "accuracy, %", "minus full attention"]
    return rows_to_table(rows, [*headers, "NLL, nats a token", "minus full"], "rlr")


def prose_table(path: Path) -> str:
    """Next-token loss on the text itself."""
    _, cells = recall_cells(path, prose=True)
    if not cells:
        return ""
    rows = []
    for key, cell in _ordered(cells):
        difference = "" if key.method == FULL_ATTENTION else cell.nll_difference.format(".3f")
        rows.append([key.method, f"{key.sparsity:.0%}", cell.nll.format(".3f"), difference])
    return rows_to_table(rows, ["method", "stream", "loss, nats a token", "difference to full attention"])


def recall_curves(path: Path) -> Iterator[Chart]:
    """Accuracy against KV budget; where sizes were compared, against the window (paper's ablations, section 3.5)."""
    head, cells = recall_cells(path)
    budgets, sizes = [], []
    for length, base, streaming in _lengths(cells):
        level = percent_line(FULL_ATTENTION, [100.0], [base.accuracy])
        title = f"{length:,} tokens, n = {base.passkeys} passkeys"
        if len({key[3:] for key in streaming}) > 1:
            for method, sparsity in sorted({key[1:3] for key in streaming}):
                chosen = _only(streaming, method, sparsity)
                lines = _lines(chosen, lambda key: f"{key.sink_size} sinks", lambda key: float(key.recent_size))
                lines.sort(key=lambda line: int(line.name.split()[0]))
                styles = styles_of_settings(len(lines))
                lines = [replace(line, style=style) for line, style in zip(lines, styles, strict=True)]
                name = f"{length}-{method}-{round(100 * sparsity)}"
                sizes.append(Panel(name, f"{title}\n{method}, {sparsity:.0%} stream", lines, level))
        elif streaming:
            lines = _lines(streaming, lambda key: key.method, lambda key: 100 * key.kv_fraction)
            budgets.append(Panel(str(length), title, lines, level))
    accuracy = "token accuracy, %"
    if budgets:
        x = "KV held, % of full attention's bytes"
        yield Chart("budget", title_of(head), budgets, x, accuracy, is_percent=True)
    if sizes:
        yield Chart("sizes", title_of(head), sizes, "recent tokens", accuracy, x_is_tokens=True, is_percent=True)


def _lengths(cells: Cells) -> Iterator[tuple[int, Cell, Cells]]:
    """For each length: the cell of full attention, and the others."""
    for length in sorted({key.length for key in cells}):
        others = {key: cell for key, cell in cells.items() if key.length == length and key.method != FULL_ATTENTION}
        yield length, cells[full(length)], others


def _only(cells: Cells, method: str, sparsity: float) -> Cells:
    return {key: cell for key, cell in cells.items() if key[1:3] == (method, sparsity)}


def _by_sparsity(length: int, cells: Cells, base: Cell) -> str:
    """Methods by sparsities, in the order in which they were measured, random patterns last."""
    accuracy = {(key.method, key.sparsity): cell.accuracy for key, cell in cells.items()}
    sparsities = sorted({key.sparsity for key in cells if key.method != STREAMING})
    methods = [*dict.fromkeys(key.method for key in cells if key.method != STREAMING)]
    rows = [
        [method, *(_versus(accuracy.get((method, sparsity)), base.accuracy) for sparsity in sparsities)]
        for method in sorted(methods, key=lambda method: method == RANDOM)
    ]
    return rows_to_table(rows, [f"{length} tokens", *(f"{sparsity:.0%} stream" for sparsity in sparsities)])


def _by_size(cells: Cells, base: Cell) -> str:
    """Sinks by windows."""
    accuracy = {key[3:]: cell.accuracy for key, cell in cells.items()}
    sinks, windows = (sorted({size[axis] for size in accuracy}) for axis in (0, 1))
    rows = [[sink, *(_versus(accuracy.get((sink, window)), base.accuracy) for window in windows)] for sink in sinks]
    return rows_to_table(rows, ["sinks", *(f"{window} recent" for window in windows)], "r")


def _versus(accuracy: Estimate | None, base: Estimate) -> str:
    """In percent, and as a fraction of full attention's; empty where nothing was measured."""
    if accuracy is None:
        return ""
    fraction = f" ({accuracy.mean / base.mean:.0%})" if base.mean else ""
    return f"{100 * accuracy.mean:.1f}{fraction}"


def _ordered(cells: Cells) -> list[tuple[Key, Cell]]:
    """By length and sparsity, then by name."""
    return sorted(cells.items(), key=lambda item: (item[0].length, item[0].sparsity, item[0].method, item[0][3:]))


def _lines(cells: Cells, name: Callable[[Key], str], x: Callable[[Key], float]) -> list[Line]:
    """A line for each name."""
    groups: dict[str, list[Key]] = {}
    for key in cells:
        groups.setdefault(name(key), []).append(key)
    return [
        percent_line(label, [x(key) for key in keys], [cells[key].accuracy for key in keys])
        for label, keys in groups.items()
    ]


RESULT = ResultType(
    "Recall of passkeys",
    lambda first: (
        "gates" in first
        and {"sink_size", "data"} <= set(fields(first.get("about")))
        and first["about"].get("task", "recall") == "recall"
    ),
    {"Token accuracy": recall_table, "Every cell": recall_details, "Loss on the text itself": prose_table},
    (recall_curves,),
    group="Accuracy",
)
