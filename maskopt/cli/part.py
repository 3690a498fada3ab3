"""Parts of a layer: ranges of rows and columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.problems import LayerReconstruction

__all__ = ["RowsOption", "parse_rows", "part_of"]

RowsOption = Annotated[
    str,
    typer.Option(
        "--rows",
        metavar="A:B",
        help="Range of rows from A up to, but not including, B: 0:8 are the first eight, : is all.",
    ),
]


def parse_rows(text: str, rows: int) -> slice:
    """Return the range of rows in a text such as "2:6", ":6", "2:", ":" or "2".

    Parameters
    ----------
    text : str
    rows : int
        Of the layer.

    Raises
    ------
    MaskoptError
        If it is no such range, or exceeds the layer's rows.
    """
    match = re.fullmatch(r"([0-9]{0,18})(:?)([0-9]{0,18})", text.strip())
    if match is None or not (match[1] or match[2]):
        raise MaskoptError(f"Rows have the form A:B, such as 0:8; got {text!r}.")
    first = int(match[1] or 0)
    last = int(match[3] or rows) if match[2] else first + 1
    if not first < last <= rows:
        raise MaskoptError(f"The rows {text} are not within the layer's, which are 0:{rows}.")
    return slice(first, last)


def part_of(problem: LayerReconstruction, rows: slice, columns: int | None = None) -> LayerReconstruction:
    """Return some rows and the first columns of a checked problem, as a problem with copies of its data.

    Parameters
    ----------
    problem : LayerReconstruction
    rows : slice
    columns : int, optional
        All by default.

    Raises
    ------
    MaskoptError
        If there are fewer columns.
    """
    from maskopt.problems import LayerReconstruction

    d = problem.shape[1]
    columns = d if columns is None else columns
    if not 1 <= columns <= d:
        raise MaskoptError(f"The layer has {d} columns; --columns {columns} is out of range.")
    # Copies, because a slice would send the whole layer to other processes.
    weight, gram = problem.weight[rows, :columns].clone(), problem.gram[:columns, :columns].clone()
    return LayerReconstruction(weight, gram, problem.tokens, check=False)
