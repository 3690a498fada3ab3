"""Tables and lines of `maskopt prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.words import duration, named_table

if TYPE_CHECKING:
    from maskopt.models import PruneReport

__all__ = ["layer_table", "summary", "times"]

_WIDE = 110  # characters of a terminal on which the table has a column more


def layer_table(layers: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Return the table of layers; a status that all have in common has no column.

    Parameters
    ----------
    layers : sequence of dict
        Of the report's JSON; the matrices of one stack have a row in common, with means and sums.
    width : int
        Of the terminal.
    """
    layers = _merged(layers)
    updated = any(layer["kept_error"] != layer["relative_error"] for layer in layers)
    certified = any(layer["lower_bound"] is not None for layer in layers)
    held_out = [layer["held_out_error"] for layer in layers]
    measured = width >= _WIDE and any(error is not None for error in held_out)
    columns = {
        "shape": [f"{layer.get('times', '')}{layer['rows']} x {layer['columns']}" for layer in layers],
        "sparsity": [f"{layer['sparsity']:.3f}" for layer in layers],
        **({"before": [f"{layer['kept_error']:.5f}" for layer in layers]} if updated else {}),
        "error": [f"{layer['relative_error']:.5f}" for layer in layers],
        **({"held out": ["" if error is None else f"{error:.5f}" for error in held_out]} if measured else {}),
        **({"proven": [_proven(layer) for layer in layers]} if certified else {}),
        "seconds": [f"{layer['seconds']:.2f}" for layer in layers],
        "status": [_status(layer) for layer in layers],
    }
    if len(set(columns["status"])) == 1:
        del columns["status"]
    return named_table("", "layer", [layer["name"] for layer in layers], columns, width)


def _merged(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the layers with one entry for all matrices of a stack, which have one shape and names up to a number."""
    groups: dict[object, list[Mapping[str, Any]]] = {}
    for layer in layers:
        stem, _, last = layer["name"].rpartition(".")
        stacked = (stem, layer["rows"], layer["columns"])
        groups.setdefault(stacked if last.isdecimal() else layer["name"], []).append(layer)
    return [found[0] if len(found) == 1 else _mean(found) for found in groups.values()]


def _mean(layers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    held_out = [layer["held_out_error"] for layer in layers if layer["held_out_error"] is not None]
    bounds = [layer["lower_bound"] for layer in layers if layer["lower_bound"] is not None]
    statuses = {layer["status"] for layer in layers}
    return {
        **layers[0],
        "name": layers[0]["name"].rpartition(".")[0] + ".*",
        "times": f"{len(layers)} x ",
        **{key: fmean(layer[key] for layer in layers) for key in ("sparsity", "kept_error", "relative_error")},
        **{key: sum(layer[key] for layer in layers) for key in ("objective", "seconds", "unfinished_rows")},
        "held_out_error": fmean(held_out) if held_out else None,
        "lower_bound": sum(bounds) if len(bounds) == len(layers) else None,
        "status": statuses.pop() if len(statuses) == 1 else "several",
    }


def _status(layer: Mapping[str, Any]) -> str:
    return str(layer["status"]).lower().replace("_", " ")


def _proven(layer: Mapping[str, Any]) -> str:
    """Return the fraction of a layer's error that no mask can avoid, starred where a time limit ended a proof."""
    if layer["lower_bound"] is None:
        return ""
    fraction = layer["lower_bound"] / layer["objective"] if layer["objective"] > 0 else 1.0
    return f"{fraction:.3f}" + ("*" if layer["unfinished_rows"] else "")


def summary(figures: Mapping[str, Any], masks: str) -> dict[str, str]:
    """Return what is said of all layers together.

    Parameters
    ----------
    figures : dict
        The report's JSON, with perplexities.
    masks : str
        The set of masks in words.
    """
    layers = figures["layers"]
    fraction = f"{100 * figures['sparsity']:.2f} %"
    updated = any(layer["kept_error"] != layer["relative_error"] for layer in layers)
    lines = {
        "pruned": f"{fraction} of {figures['weights']} weights in {len(layers)} layers",
        "masks": masks,
        "relative error": f"median {figures['median_relative_error']:.5f}, mean {figures['mean_relative_error']:.5f}"
        + (" (`before`: before the update of the surviving weights)" if updated else ""),
    }
    if "held_out" in figures:
        lines["held-out error"] = _held_out_words(**figures["held_out"])
    pooled = sum(layer["pooled"] for layer in layers)
    if pooled:
        lines["experts"] = (
            f"{pooled} of {len(layers)} layers saw fewer tokens than they have inputs; tokens of other experts stand "
            f"for the missing ones"
        )
    statuses = {_status(layer) for layer in layers}
    if len(statuses) == 1:
        lines["status"] = statuses.pop()
    if any(layer["lower_bound"] is not None for layer in layers):
        lines["proven"] = "fraction of the error that no mask can avoid"
        unfinished = sum(layer["unfinished_rows"] for layer in layers)
        if unfinished:
            lines["proven"] += f"; * the time limit cut {unfinished} proofs of rows short; their bounds are valid"
    for name, values in figures["perplexity"].items():
        dense, pruned = values["dense"], values["pruned"]
        lines[f"perplexity, {name} text"] = (
            f"{dense['perplexity']:.3f} dense, {pruned['perplexity']:.3f} pruned ({dense['tokens']} tokens)"
        )
    return lines


def _held_out_words(
    mean_error: float, ratio: float, largest_ratio: float, layer: str, tokens: int, tokens_wanted: int
) -> str:
    words = (
        f"mean {mean_error:.5f}, {ratio:.2f} times that on the calibration data (most: {largest_ratio:.2f}, {layer})"
    )
    if tokens_wanted > tokens:
        words += f"; about {_leading(tokens_wanted)} tokens instead of {tokens} would lower that to 1.1"
    return words


def _leading(number: int) -> int:
    """Return a number rounded to two digits."""
    return round(number, 2 - len(str(number)))


def times(report: PruneReport, seconds: float) -> str:
    """Return how long pruning took, in all and in parts.

    Parameters
    ----------
    report : PruneReport
    seconds : float
        In all.
    """
    parts = {
        "calibrating": report.calibration_seconds,
        "solving": report.solve_seconds,
        "proving": report.certify_seconds,
        "recovering": report.recovery_seconds,
    }
    return f"{duration(seconds)} in all: " + ", ".join(
        f"{duration(part)} {name}" for name, part in parts.items() if part > 0.0
    )
