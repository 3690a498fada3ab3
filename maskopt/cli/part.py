"""Parts of a layer: ranges of rows and columns, and what identifies them in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.errors import MaskoptError
from maskopt.files import content_hash

if TYPE_CHECKING:
    from maskopt.oracles import MaskSet
    from maskopt.oracles.base import Shape
    from maskopt.problems import LayerReconstruction

__all__ = [
    "RowsOption",
    "check_row_blocks",
    "parse_rows",
    "part_of",
    "part_settings",
    "range_words",
    "whole_row_blocks",
]

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


def range_words(rows: slice) -> str:
    """Return a range of rows in the form of `parse_rows`: "2:6"."""
    return f"{rows.start}:{rows.stop}"


def check_row_blocks(masks: MaskSet, rows: slice, row_block: int) -> None:
    """Check that a range consists of whole row blocks, whose results depend on no other rows.

    Parameters
    ----------
    masks : MaskSet
    rows : slice
    row_block : int
        Rows of the layer that the set couples.

    Raises
    ------
    MaskoptError
        If it cuts a row block.
    """
    if rows.start % row_block or rows.stop % row_block:
        raise MaskoptError(
            f"{masks} couples {row_block} rows at a time, so --rows must begin and end at a multiple of {row_block}; "
            f"got {range_words(rows)}."
        )


def whole_row_blocks(settings: Mapping[str, Any]) -> bool:
    """Whether the rows of these `part_settings` are whole row blocks."""
    rows, row_block = parse_rows(settings["rows"], settings["layer_rows"]), settings["row_block"]
    return not (rows.start % row_block or rows.stop % row_block)


def part_settings(
    instance: Path, rows: slice, shape: Shape, pattern: str, sparsity: float | None, masks: MaskSet
) -> dict[str, Any]:
    """Return the settings that say which part of which layer a command worked on, and with which set of masks.

    Parameters
    ----------
    instance : Path
        The layer's file, of whose content the settings hold a hash.
    rows : slice
        Of the part.
    shape : (int, int)
        All rows of the layer, and the columns in use.
    pattern : str
    sparsity : float or None
    masks : MaskSet
    """
    return {
        "instance": str(instance),
        "instance_sha256": content_hash(instance),
        "rows": range_words(rows),
        "layer_rows": shape[0],
        "row_block": masks.row_block(shape),
        "columns": shape[1],
        "pattern": pattern,
        "sparsity": sparsity,
        "masks": repr(masks),
    }


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
