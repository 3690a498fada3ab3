"""`maskopt certify`: a proven bound on the distance of a mask from the optimum."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from maskopt.cli.layer import load_layer
from maskopt.cli.mask_file import load_mask
from maskopt.cli.options import (
    DeviceOption,
    InstanceArgument,
    JsonOption,
    MemoryOption,
    PatternOption,
    QuietOption,
    SparsityOption,
    check_device,
    parse_masks,
    parse_memory,
)
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.part import RowsOption, parse_rows
from maskopt.cli.words import rows_words
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.bounds import BoundKind, MaskBounds
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction

__all__ = ["certify"]

Figures = dict[str, Any]

_SHOWN = 40  # largest number of row blocks that are listed one by one


_BOUNDS = ("gap", "shift", "sdp", "cuts")
"""Kinds of lower bounds: the Frank-Wolfe gap, and those of `maskopt.bounds.mask_bounds`."""


_BOUND_HELP = (
    "Lower bound, from fast to tight: gap (duality gap of Frank-Wolfe), shift (relaxation with a diagonal shift), sdp "
    "(semidefinite relaxation), cuts (sdp with the constraints Z >= 0)."
)


def _prove(
    kind: str, problem: LayerReconstruction, masks: MaskSet, memory: int, time_limit: float | None, bar: Bar
) -> MaskBounds:
    """Return the bounds, float64, one per row block, and which of them no time limit has cut short."""
    import torch

    from maskopt.bounds import MaskBounds, mask_bounds, stop_after
    from maskopt.solvers import FrankWolfe, Status, solve

    if kind != "gap":
        of_rows = cast("BoundKind", kind)
        began = time.perf_counter()
        bar.tell(kind, 0.0)

        def tell(fraction: float) -> None:
            passed = 0.0 if time_limit is None else (time.perf_counter() - began) / time_limit
            bar.tell(kind, min(1.0, max(fraction, passed)))

        stop = stop_after(time_limit)
        return mask_bounds(problem, masks, of_rows, memory=memory, stop=stop, progress=tell if bar.visible else None)
    method = FrankWolfe("conjugate", polish=False)
    result = solve(problem, masks, method, callback=bar.step(kind), time_limit=time_limit, memory=memory)
    bound = result.lower_bound
    assert bound is not None  # layers are convex
    return MaskBounds(bound, torch.full(bound.shape, result.status is not Status.TIME_LIMIT, device=bound.device))


def certify(
    instance: InstanceArgument,
    mask: Annotated[Path, typer.Option("--mask", help="Mask file, as written by `maskopt solve --out`.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    bound: Annotated[str, typer.Option("--bound", help=_BOUND_HELP)] = "gap",
    rows: RowsOption = ":",
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Seconds for the proof; the bounds proven by then are reported."),
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Prove a lower bound on the error of every mask in a set, and report how close a given mask comes to it."""
    check_outputs(json)
    if bound not in _BOUNDS:
        raise MaskoptError(f"There is no bound {bound!r}; choose one of {', '.join(_BOUNDS)}.")
    from maskopt.checks import check_time_limit

    check_time_limit(time_limit)
    masks, working, chosen = parse_masks(pattern, sparsity), parse_memory(memory), load_mask(mask)
    _, layer = load_layer(instance, check_device(device))
    masks.check(layer.shape)
    if chosen.shape != layer.shape:
        raise MaskoptError(f"The mask {mask} has shape {tuple(chosen.shape)}, the weight {layer.shape}.")
    chosen = chosen.to(layer.device)
    if not masks.contains(chosen):
        raise MaskoptError(f"The mask {mask} does not belong to {masks}; give the pattern it was made for.")
    index, row_block = parse_rows(rows, layer.shape[0]), masks.row_block(layer.shape)
    if index.start % row_block or index.stop % row_block:
        raise MaskoptError(
            f"{masks} couples {row_block} rows at a time, so --rows must begin and end at a multiple of {row_block}; "
            f"got {rows}."
        )
    part = masks if index == slice(0, layer.shape[0]) else masks.rows(index, layer.shape)
    problem = layer.rows(index)
    began = time.perf_counter()
    with Bar(quiet) as bar:
        lower = _prove(bound, problem, part, working, time_limit, bar)
    seconds = time.perf_counter() - began
    errors = problem.objective(chosen[index]).view(-1, row_block).sum(1)
    certificates = [
        _certificate(index.start + number * row_block, row_block, *figures)
        for number, figures in enumerate(
            zip(errors.tolist(), lower.bound.tolist(), lower.finished.tolist(), strict=True)
        )
    ]
    sums = math.fsum(errors.tolist()), math.fsum(lower.bound.tolist())
    total = _certificate(index.start, problem.shape[0], *sums, bool(lower.finished.all()))
    figures = {
        "layer": total,
        "rows": certificates,
        "seconds": seconds,
        "settings": {
            "instance": str(instance),
            "mask": str(mask),
            "rows": f"{index.start}:{index.stop}",
            "columns": problem.shape[1],
            "pattern": pattern,
            "masks": repr(masks),
            "bound": bound,
            "time_limit": time_limit,
            "device": device,
            "memory": working,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        console = tables(json)
        if len(certificates) <= _SHOWN:
            console.print(_table(certificates))
        console.print(facts(_lines(total, certificates, seconds)))


def _certificate(row: int, rows: int, error: float, bound: float, finished: bool) -> Figures:
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
