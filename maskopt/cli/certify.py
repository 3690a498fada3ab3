"""`maskopt certify`: how far from the optimum a mask can be at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from maskopt.cli.layer import load_layer
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
    from torch import Tensor

    from maskopt.bounds import BoundKind
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import Callback

__all__ = ["BOUNDS", "certify"]

Figures = dict[str, Any]

_SHOWN = 40  # row blocks up to which each has a line


def _gap(problem: LayerReconstruction, masks: MaskSet, callback: Callback | None, memory: int) -> Tensor:
    """Return the best Frank-Wolfe gap's bound on the convex relaxation."""
    from maskopt.solvers import FrankWolfe, solve

    method = FrankWolfe("conjugate", polish=False)
    bound = solve(problem, masks, method, callback=callback, memory=memory).lower_bound
    assert bound is not None  # layers are convex
    return bound


def _row_bound(kind: BoundKind) -> Callable[[LayerReconstruction, MaskSet, Callback | None, int], Tensor]:
    def bound(problem: LayerReconstruction, masks: MaskSet, callback: Callback | None, memory: int) -> Tensor:
        from maskopt.bounds import mask_bound

        return mask_bound(problem, masks, kind, memory=memory)

    return bound


BOUNDS: dict[str, Callable[[LayerReconstruction, MaskSet, Callback | None, int], Tensor]] = {
    "gap": _gap,
    "shift": _row_bound("shift"),
    "sdp": _row_bound("sdp"),
    "cuts": _row_bound("cuts"),
}
"""What proves lower bounds, float64, one per row block, by the names people type."""


def certify(
    instance: Annotated[Path, typer.Argument(metavar="INSTANCE", help="Safetensors file with `weight`, `gram`.")],
    mask: Annotated[Path, typer.Option("--mask", help="Mask file, as written by `maskopt solve --out`.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    bound: Annotated[str, typer.Option("--bound", help=f"What proves it: {', '.join(BOUNDS)}.")] = "gap",
    rows: RowsOption = ":",
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Prove how far a mask is from the best of its set at most, row by row and in total."""
    check_outputs(json)
    if bound not in BOUNDS:
        raise MaskoptError(f"There is no bound {bound!r}; choose one of {', '.join(BOUNDS)}.")
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
    with Bar(quiet) as bar:
        lower = BOUNDS[bound](problem, part, bar.step(bound), working)
    errors = problem.objective(chosen[index]).view(-1, row_block).sum(1)
    certificates = [
        _certificate(index.start + number * row_block, row_block, *pair)
        for number, pair in enumerate(zip(errors.tolist(), lower.tolist(), strict=True))
    ]
    total = _certificate(index.start, problem.shape[0], math.fsum(errors.tolist()), math.fsum(lower.tolist()))
    figures = {
        "layer": total,
        "rows": certificates,
        "settings": {
            "instance": str(instance),
            "mask": str(mask),
            "rows": f"{index.start}:{index.stop}",
            "columns": problem.shape[1],
            "pattern": pattern,
            "masks": repr(masks),
            "bound": bound,
            "device": device,
            "memory": working,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        console = tables(json)
        if len(certificates) <= _SHOWN:
            console.print(_table(certificates))
        console.print(facts(_lines(total, certificates)))


def _certificate(row: int, rows: int, error: float, bound: float) -> Figures:
    # An error that is zero cannot be bettered, whatever the bound lost to rounding.
    fraction = min(1.0, bound / error) if error > 0.0 else 1.0
    return {"row": row, "rows": rows, "error": error, "bound": bound, "gap": error - bound, "proven_share": fraction}


def _table(certificates: Sequence[Figures]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text("What is proven of each row"), title_justify="left")
    for name in ("row", "error", "bound", "gap", "proven share"):
        table.add_column(name, justify="right")
    for one in certificates:
        table.add_row(
            str(one["row"]) if one["rows"] == 1 else f"{one['row']}:{one['row'] + one['rows']}",
            *(f"{one[name]:.6g}" for name in ("error", "bound", "gap")),
            f"{one['proven_share']:.4f}",
        )
    return table


def _lines(total: Figures, certificates: Sequence[Figures]) -> dict[str, str]:
    fractions = [one["proven_share"] for one in certificates]
    return {
        "error": f"{total['error']:.6g}",
        "bound": f"{total['bound']:.6g}: no mask of the set has a smaller error",
        "proven share": f"{total['proven_share']:.4f} of the error cannot be avoided",
        "rows": f"least {min(fractions):.4f}, median {median(fractions):.4f}",
    }
