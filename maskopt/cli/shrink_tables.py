"""Tables and lines of `maskopt shrink`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.recover import recovery_lines
from maskopt.cli.words import duration, named_table

if TYPE_CHECKING:
    from maskopt.models import Perplexity
    from maskopt.shrinking import ExpertsReport, ShrinkReport, UnitProof

__all__ = ["summary", "unit_table"]


def unit_table(result: ShrinkReport, width: int, *, every: bool) -> Table:
    """Return the table of units.

    Parameters
    ----------
    result : ShrinkReport
    width : int
        Of the terminal.
    every : bool
        Whether every layer has a row, or all layers of a name but for the block's number have one.
    """
    groups: dict[str, list[Any]] = {}
    for each in result.widths:
        stem = each.name if every else ".".join("*" if part.isdecimal() else part for part in each.name.split("."))
        groups.setdefault(stem, []).append(each)
    columns = {
        "units": [found[0].kind for found in groups.values()],
        "before": [_range([each.before for each in found]) for found in groups.values()],
        "after": [_range([each.after for each in found]) for found in groups.values()],
        "parameters": [f"-{sum(each.parameters for each in found)}" for found in groups.values()],
        "error": [f"{fmean(each.error for each in found):.5f}" for found in groups.values()],
    }
    if any(each.proof is not None for each in result.widths):
        columns["proven"] = [_proven([each.proof for each in found if each.proof]) for found in groups.values()]
    return named_table("", "layer", list(groups), columns, width)


def summary(result: ShrinkReport, dense: Mapping[str, Perplexity], after: Mapping[str, Perplexity]) -> dict[str, str]:
    """Return what became of the model, for a table of facts.

    Parameters
    ----------
    result : ShrinkReport
    dense, after : mapping of str to Perplexity
        By the name of the text.
    """
    before, now = result.parameters
    lines = {"parameters": f"{before} before, {now} after ({100 * (1 - now / before):.1f} % less)"}
    if result.depth is not None:
        lines["blocks dropped"] = ", ".join(result.depth.dropped)
        lines["divergence"] = f"{result.depth.divergence[-1]:.4f} a token without them, before anything is fitted"
    if result.experts is not None:
        lines["experts"] = _experts(result.experts)
    if result.cache_bytes is not None:
        old, new = result.cache_bytes
        lines["KV cache"] = f"{old:g} bytes a token before, {new:g} after"
    for batch, found in result.speeds.items():
        old_speed, new_speed = found["before"], found["after"]
        lines[f"tokens a second, {batch}"] = (
            f"prefill {old_speed.prefill:.0f} before, {new_speed.prefill:.0f} after "
            f"({new_speed.prefill / old_speed.prefill:.2f}x); decode {old_speed.decode:.1f} before, "
            f"{new_speed.decode:.1f} after ({new_speed.decode / old_speed.decode:.2f}x); {new_speed.threads} threads"
        )
    for name in dense:
        lines[f"perplexity, {name}"] = f"{dense[name].perplexity:.3f} before, {after[name].perplexity:.3f} after"
    proofs = [each.proof for each in result.widths if each.proof is not None]
    if proofs:
        shares, cut = [100 * each.share for each in proofs], sum(not each.finished for each in proofs)
        lines["proven"] = (
            f"any choice of as many units, with any weights, has {math.floor(min(shares))} % of the error or more, "
            f"{math.floor(median(shares))} % in the median: of each layer's problem as it was solved, with the ridge"
        )
        if result.pruning.settings["refit"] != "units":
            lines["later fits"] = (
                "change inputs and weights of all layers; the bounds do not speak of the model they lead to"
            )
        if cut:
            lines["time limit"] = f"ended {cut} of {len(proofs)} proofs; more time could raise these bounds"
    if result.biases is not None:
        changed, without = len(result.biases["changed"]), len(result.biases["without"])
        lines["biases"] = f"{changed} changed to keep the mean output" + (
            f"; {without} layers have none that could make up for what is removed" if without else ""
        )
    lines |= recovery_lines(result.pruning.recovery)
    if result.plan is not None:
        tried = result.plan.details.get("divergence") or {}
        lines["widths"] = f"{result.plan.details.get('chosen')}; divergence " + ", ".join(
            f"{loss:.4f} {name}" for name, loss in tried.items()
        )
    reasons: dict[str, int] = {}
    for each in result.refused:
        reasons[f"{each.kind}: {each.reason}"] = reasons.get(f"{each.kind}: {each.reason}", 0) + 1
    for reason, count in reasons.items():
        lines[f"left alone, {count} layers"] = reason
    lines |= {"loads with": result.loads_with, "time": duration(result.seconds)}
    return lines


def _experts(report: ExpertsReport) -> str:
    """Return how many experts of each block were dropped, and what their outputs lost."""
    before = _range([each.before for each in report.blocks])
    left = _range([each.before - len(each.dropped) for each in report.blocks])
    errors = [each.error for each in report.blocks]
    return f"{before} before, {left} after, in {len(report.blocks)} blocks; error of their outputs {fmean(errors):.4f}"


def _proven(proofs: Sequence[UnitProof]) -> str:
    """Return the least and the largest share, rounded down."""
    return f"{_range([math.floor(100 * each.share) for each in proofs])} %" if proofs else ""


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
