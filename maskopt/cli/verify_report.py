"""The report of `maskopt verify`: its JSON and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskopt.cli.output import facts
from maskopt.cli.part import whole_row_blocks
from maskopt.cli.words import rows_words

__all__ = ["VERDICT", "excess_of", "percent", "show_verdicts", "verify_report"]

Figures = dict[str, Any]

VERDICT: Mapping[str, tuple[type, ...]] = {
    "row": (int,),
    "rows": (int,),
    "heuristic": (float,),
    "best": (float,),
    "bound": (float, type(None)),
    "gap": (float, type(None)),
    "verdict": (str,),
    "excess": (float, type(None)),
    "status": (str,),
    "status_text": (str,),
    "iterations": (int,),
    "seconds": (float,),
    "scale": (float,),
}
"""What the JSON says of a row block, with types; an infinite excess is null there."""


def verify_report(
    verdicts: Sequence[Figures], title: str, settings: Mapping[str, Any], versions: Mapping[str, Any]
) -> Figures:
    """Return the content of the JSON.

    Parameters
    ----------
    verdicts : sequence of dict
        With the keys of `VERDICT`, in the order of the rows.
    title : str
        Of the table.
    settings, versions : mapping
    """
    return {
        "command": "verify",
        "title": title,
        "rows": list(verdicts),
        "summary": _summary(verdicts),
        "settings": dict(settings),
        "versions": dict(versions),
    }


def show_verdicts(console: Console, report: Figures) -> None:
    """Print the table of a report and its summary."""
    console.print(_table(report["rows"], report["title"]))
    console.print(facts(_lines(report)))


def excess_of(value: float, reference: float) -> float:
    """Return by which fraction of the reference a value exceeds it."""
    if value <= reference:
        return 0.0
    return value / reference - 1.0 if reference > 0.0 else math.inf


def percent(fraction: float) -> str:
    """Return a fraction in per cent; an infinite one is "all of it"."""
    return f"{100 * fraction:.3g} %" if math.isfinite(fraction) else "all of it"


def _summary(verdicts: Sequence[Figures]) -> Figures:
    excesses = [verdict["excess"] for verdict in verdicts]
    return {
        "verified": len(verdicts),
        "proven_optimal": sum(verdict["verdict"] == "proven optimal" for verdict in verdicts),
        "not_optimal": sum(excess > 0.0 for excess in excesses),
        "optima_known": sum(verdict["status"] == "OPTIMAL" for verdict in verdicts),
        "mean_excess": sum(excesses) / len(excesses),
        "largest_excess": max(excesses),
        "seconds": sum(verdict["seconds"] for verdict in verdicts),
    }


def _table(verdicts: Sequence[Figures], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left")
    for name in ("row", "heuristic", "best known", "proven bound", "gap", "verdict", "seconds"):
        table.add_column(name, justify="left" if name == "verdict" else "right")
    for verdict in verdicts:
        table.add_row(
            rows_words(verdict["row"], verdict["rows"]),
            f"{verdict['heuristic']:.6f}",
            f"{verdict['best']:.6f}",
            "" if verdict["bound"] is None else f"{verdict['bound']:.6f}",
            "" if verdict["gap"] is None else percent(verdict["gap"]),
            verdict["verdict"],
            f"{verdict['seconds']:.2f}",
        )
    return table


def _lines(report: Figures) -> dict[str, str]:
    summary, settings = report["summary"], report["settings"]
    worst = f", the worst by {percent(summary['largest_excess'])}" if summary["not_optimal"] else ""
    lines = {
        "proven optimal": f"{summary['proven_optimal']} of {summary['verified']}",
        "not optimal": f"{summary['not_optimal']}{worst}",
        "time": f"{summary['seconds']:.1f} s",
    }
    if not whole_row_blocks(settings):
        lines["rows"] = (
            f"{settings['rows']} as a layer of their own: the set couples all {settings['row_block']} rows of the "
            "layer, so the results are no part of the layer's and cannot be merged"
        )
    return lines
