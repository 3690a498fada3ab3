"""The report of `maskopt certify`: its JSON and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskopt.cli.output import facts
from maskopt.cli.words import rows_words

__all__ = ["CERTIFICATE", "certificate", "certify_report", "show_certificates"]

Figures = dict[str, Any]

_SHOWN = 40  # largest number of row blocks that are listed one by one

CERTIFICATE: Mapping[str, tuple[type, ...]] = {
    "row": (int,),
    "rows": (int,),
    "error": (float,),
    "bound": (float,),
    "gap": (float,),
    "proven_fraction": (float,),
    "finished": (bool,),
}
"""What the JSON says of a row block, with types."""


def certify_report(
    certificates: Sequence[Figures], seconds: float, settings: Mapping[str, Any], versions: Mapping[str, Any]
) -> Figures:
    """Return the content of the JSON.

    Parameters
    ----------
    certificates : sequence of dict
        As `certificate` makes them, in the order of the rows.
    seconds : float
        What the proofs took.
    settings, versions : mapping
    """
    error, bound = (math.fsum(one[name] for one in certificates) for name in ("error", "bound"))
    rows = sum(one["rows"] for one in certificates)
    return {
        "command": "certify",
        "layer": certificate(certificates[0]["row"], rows, error, bound, all(one["finished"] for one in certificates)),
        "rows": list(certificates),
        "seconds": seconds,
        "settings": dict(settings),
        "versions": dict(versions),
    }


def show_certificates(console: Console, report: Figures) -> None:
    """Print the table of a report, unless it is long, and its summary."""
    if len(report["rows"]) <= _SHOWN:
        console.print(_table(report["rows"]))
    console.print(facts(_lines(report["layer"], report["rows"], report["seconds"])))


def certificate(row: int, rows: int, error: float, bound: float, finished: bool) -> Figures:
    """Return what is proven of some consecutive rows.

    Parameters
    ----------
    row, rows : int
        The first, and how many.
    error, bound : float
        Of the mask, and of every mask of the set.
    finished : bool
        Whether no time limit has cut the proof short.
    """
    # An error of zero is optimal, even where rounding has lowered the bound.
    fraction = min(1.0, bound / error) if error > 0.0 else 1.0
    return {
        "row": row,
        "rows": rows,
        "error": error,
        "bound": bound,
        "gap": error - bound,
        "proven_fraction": fraction,
        "finished": finished,
    }


def _table(certificates: Sequence[Figures]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text("Proven bounds by row"), title_justify="left")
    stopped = not all(one["finished"] for one in certificates)
    for name in ("row", "error", "bound", "gap", "proven fraction", *(("ended by",) if stopped else ())):
        table.add_column(name, justify="right")
    for one in certificates:
        table.add_row(
            rows_words(one["row"], one["rows"]),
            *(f"{one[name]:.6g}" for name in ("error", "bound", "gap")),
            f"{one['proven_fraction']:.4f}",
            *(("convergence" if one["finished"] else "time limit",) if stopped else ()),
        )
    return table


def _lines(total: Figures, certificates: Sequence[Figures], seconds: float) -> dict[str, str]:
    fractions = [one["proven_fraction"] for one in certificates]
    lines = {
        "error": f"{total['error']:.6g}",
        "bound": f"{total['bound']:.6g}: no mask of the set has a smaller error",
        "proven fraction": f"{total['proven_fraction']:.4f} of the error is unavoidable for masks of the set",
        "rows": f"smallest {min(fractions):.4f}, median {median(fractions):.4f}",
        "time": f"{seconds:.1f} s",
    }
    stopped = sum(not one["finished"] for one in certificates)
    if stopped:
        lines["time limit"] = (
            f"reached: {stopped} of {len(certificates)} bounds are valid, but more time would raise them"
        )
    return lines
