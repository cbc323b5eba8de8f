"""Tables in Markdown; every table of a page, a report or a document is written here."""

from collections.abc import Iterable, Sequence

from duo_jax.extras import require

SIDES = {"l": "left", "r": "right"}


def rows_to_table(rows: Iterable[Sequence[object]], headers: Sequence[str], align: str = "lr") -> str:
    """A Markdown table; cells keep their text exactly.

    Args:
        rows: cells, as many in each row as there are headers.
        headers: one for each column.
        align: `l` or `r` for each column; the last letter counts for all columns that are left.
    """
    require("a table", ("tabulate",))
    from tabulate import tabulate

    sides = [SIDES[letter] for letter in align.ljust(len(headers), align[-1])]
    cells = [[str(cell) for cell in row] for row in rows]
    return tabulate(cells, headers, tablefmt="pipe", colalign=sides, disable_numparse=True)
