"""`maskopt trace`: trajectories of solvers over iterations and seconds, as a figure and as numbers."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.figure import check_figure, draw_traces
from maskopt.cli.layer import load_layer
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
from maskopt.cli.output import Bar, check_outputs, environment, json_output, tables
from maskopt.cli.part import RowsOption, parse_rows
from maskopt.cli.solvers import parse_solvers
from maskopt.cli.words import named_table, set_words
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path

__all__ = ["last_values", "trace"]


def trace(
    instance: InstanceArgument,
    solvers: Annotated[
        str,
        typer.Option("--solvers", help="Comma-separated solvers; settings as in 'pairwise:step=short;iterations=500'."),
    ] = "sparsefw,blended-pairwise,dicg,continuation",
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    rows: RowsOption = ":",
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            min=1,
            help="Iterations between two records; by default iterations 0, 1, 2, 4, 8 ... are recorded.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the trajectories into a new .png, .svg or .pdf file.")
    ] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write the trajectories to a new .csv file.")] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds for each solver, without the time of recording.")
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Record trajectories of solvers: relaxed value, proven bound and rounded error over iterations and seconds."""
    check_outputs(json, out, table)
    from maskopt.solvers import check_compatible, solve

    if out is not None:
        check_figure(out)
    masks, methods, working = parse_masks(pattern, sparsity), parse_solvers(solvers), parse_memory(memory)
    _, layer = load_layer(instance, check_device(device))
    chosen = parse_rows(rows, layer.shape[0])
    problem = layer.rows(chosen)
    for method in methods.values():
        check_compatible(problem, masks, method)
    scale = float(problem.scale().sum())
    if scale == 0.0:
        raise MaskoptError(f"The layer {instance} has no output to lose, so there is nothing to record.")
    traces: dict[str, dict[str, list[float]]] = {}
    with Bar(quiet, steps=len(methods)) as bar:
        for spec, method in methods.items():
            result = solve(
                problem,
                masks,
                method,
                callback=bar.step(spec),
                time_limit=time_limit,
                memory=working,
                record="doubling" if every is None else every,
            )
            traces[spec] = {
                name: column if name in ("iteration", "seconds") else [figure / scale for figure in column]
                for name, column in result.history.items()
            }
    figures = {
        "traces": traces,
        "settings": {
            "instance": str(instance),
            "rows": f"{chosen.start}:{chosen.stop}",
            "columns": problem.shape[1],
            "masks": repr(masks),
            "solvers": {spec: repr(method) for spec, method in methods.items()},
            "every": "doubling" if every is None else every,
            "time_limit": time_limit,
            "device": device,
            "memory": working,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        if table is not None:
            with atomic_path(table) as aside:
                _write(aside, traces)
        if out is not None:
            with atomic_path(out) as aside:
                draw_traces(traces, aside, out.suffix[1:], f"{instance.stem}, {set_words(pattern, sparsity)}")
    console = tables(json)
    console.print(_summary(traces, console.width))


def _write(path: Path, traces: dict[str, dict[str, list[float]]]) -> None:
    from maskopt.solvers import COLUMNS

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("solver", *COLUMNS))
        for spec, history in traces.items():
            writer.writerows((spec, *row) for row in zip(*(history[name] for name in COLUMNS), strict=True))


def _summary(traces: dict[str, dict[str, Any]], width: int) -> Table:
    title = "Last values, relative to pruning all: relaxed value, its gap, proven bound, rounded and best mask"
    return named_table(title, "solver", list(traces), last_values(traces, 6 if width >= 100 else 5), width)


def last_values(traces: Mapping[str, Mapping[str, Sequence[float]]], digits: int = 6) -> dict[str, list[str]]:
    """Return what trajectories end with: cells of a table by heading, one for each solver.

    Parameters
    ----------
    traces : mapping
        Histories (columns as in `maskopt.solvers.COLUMNS`) by solver.
    digits : int
        Decimals.
    """
    columns: dict[str, list[str]] = {
        name: [] for name in ("steps", "seconds", "relaxed", "gap", "bound", "rounded", "mask")
    }
    for history in traces.values():
        # The last record is the returned mask; the last one with a relaxed point is before it.
        relaxed = [index for index, value in enumerate(history["value"]) if value == value]
        at = relaxed[-1] if relaxed else -1
        cells = (
            f"{history['iteration'][-1]:.0f}",
            f"{history['seconds'][-1]:.2f}",
            _number(history["value"][at], digits),
            _number(history["gap"][at], digits),
            _number(history["bound"][-1], digits),
            _number(history["rounded"][at], digits),
            _number(history["incumbent"][-1], digits),
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return columns


def _number(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"
