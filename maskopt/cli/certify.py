"""`maskopt certify`: how far from the optimum a mask can be at most."""

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
from maskopt.cli.limit import stop_after
from maskopt.cli.mask_file import load_mask
from maskopt.cli.options import (
    DeviceOption,
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
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.bounds import BoundKind, MaskBounds
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction

__all__ = ["BOUNDS", "certify"]

Figures = dict[str, Any]

_SHOWN = 40  # row blocks up to which each has a line


BOUNDS = ("gap", "shift", "sdp", "cuts")
"""What proves lower bounds, by the names people type."""


def _prove(
    kind: str, problem: LayerReconstruction, masks: MaskSet, memory: int, time_limit: float | None, bar: Bar
) -> MaskBounds:
    """Return the bounds, float64, one per row block, and which of them are as good as they become."""
    import torch

    from maskopt.bounds import MaskBounds, mask_bounds
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
    instance: Annotated[Path, typer.Argument(metavar="INSTANCE", help="Safetensors file with `weight`, `gram`.")],
    mask: Annotated[Path, typer.Option("--mask", help="Mask file, as written by `maskopt solve --out`.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    bound: Annotated[str, typer.Option("--bound", help=f"What proves it: {', '.join(BOUNDS)}.")] = "gap",
    rows: RowsOption = ":",
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Seconds after which what is proven until then counts."),
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Prove how far a mask is from the best of its set at most, row by row and in total."""
    check_outputs(json)
    if bound not in BOUNDS:
        raise MaskoptError(f"There is no bound {bound!r}; choose one of {', '.join(BOUNDS)}.")
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
    # An error that is zero cannot be bettered, whatever the bound lost to rounding.
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
    table = Table(box=box.SIMPLE_HEAD, title=Text("What is proven of each row"), title_justify="left")
    stopped = not all(one["finished"] for one in certificates)
    for name in ("row", "error", "bound", "gap", "proven fraction", *(("ended by",) if stopped else ())):
        table.add_column(name, justify="right")
    for one in certificates:
        table.add_row(
            str(one["row"]) if one["rows"] == 1 else f"{one['row']}:{one['row'] + one['rows']}",
            *(f"{one[name]:.6g}" for name in ("error", "bound", "gap")),
            f"{one['proven_fraction']:.4f}",
            *(("itself" if one["finished"] else "time limit",) if stopped else ()),
        )
    return table


def _lines(total: Figures, certificates: Sequence[Figures], seconds: float) -> dict[str, str]:
    fractions = [one["proven_fraction"] for one in certificates]
    lines = {
        "error": f"{total['error']:.6g}",
        "bound": f"{total['bound']:.6g}: no mask of the set has a smaller error",
        "proven fraction": f"{total['proven_fraction']:.4f} of the error cannot be avoided",
        "rows": f"smallest {min(fractions):.4f}, median {median(fractions):.4f}",
        "time": f"{seconds:.1f} s",
    }
    stopped = sum(not one["finished"] for one in certificates)
    if stopped:
        lines["time limit"] = (
            f"reached: {stopped} of {len(certificates)} bounds hold, but would become better with more time"
        )
    return lines
