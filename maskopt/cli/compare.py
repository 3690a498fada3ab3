"""`maskopt compare`: several solvers on several layers and sets, in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from maskopt.cli.layer import load_layer
from maskopt.cli.options import (
    INSTANCE_HELP,
    PATTERN_HELP,
    SPARSITY_HELP,
    WEIGHTS_HELP,
    DeviceOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    check_device,
    parse_masks,
    parse_memory,
)
from maskopt.cli.output import Bar, check_outputs, environment, json_output, tables
from maskopt.cli.solvers import parse_comparison
from maskopt.cli.words import set_words, shortened
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import Solver

__all__ = ["compare"]

Figures = dict[str, Any]


@dataclass(frozen=True)
class _Set:
    """A pattern with its sparsity, if it needs one, and their set of masks."""

    pattern: str
    sparsity: float | None
    masks: MaskSet

    def __str__(self) -> str:
        return set_words(self.pattern, self.sparsity)


def compare(
    instance: Annotated[list[Path], typer.Argument(metavar="INSTANCE...", help=INSTANCE_HELP)],
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", "-p", help=f"{PATTERN_HELP} May be repeated.", show_default="per-row"),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option("--sparsity", "-s", help=f"{SPARSITY_HELP} May be repeated."),
    ] = None,
    solvers: Annotated[
        str,
        typer.Option("--solvers", help="Comma-separated solvers; settings as in 'sparsefw:iterations=500;alpha=0.5'."),
    ] = "wanda,sparsefw,one-swap,continuation",
    weights: Annotated[
        str,
        typer.Option("--weights", help=f"Comma-separated list; keep and lsq are run with every solver. {WEIGHTS_HELP}"),
    ] = "keep",
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Runs of each solver; the median time is reported.")
    ] = 1,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Compare solvers on layers: errors relative to those of the first solver, and seconds."""
    check_outputs(json)
    from maskopt.problems import synthetic
    from maskopt.solvers import solve
    from maskopt.weights import Joint

    methods, working = parse_comparison(solvers, weights), parse_memory(memory)
    sets = _sets(pattern or ["per-row"], sparsity or [])
    paths = list(dict.fromkeys(instance))
    check_device(device)
    _check(paths, sets, device)
    # The first calls of torch are slow; their time must not count for the first solver.
    solve(synthetic().problem(device), parse_masks("per-row", 0.5))
    rows: list[Figures] = []
    with Bar(quiet, steps=len(paths) * len(sets) * len(methods) * repeat) as bar:
        for path in paths:
            _, problem = load_layer(path, device)
            for one in sets:
                results = {
                    spec: _measure(problem, one.masks, method, repeat, working, bar, f"{path.stem}, {one}, {spec}")
                    for spec, method in methods.items()
                }
                rows.append(_row(path, problem, one, results))
    summary = _summary(rows, list(methods))
    figures = {
        "rows": rows,
        "summary": summary,
        "settings": {
            "weights": weights,
            "solvers": {spec: repr(method) for spec, method in methods.items()},
            "repeat": repeat,
            "device": device,
            "memory": working,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        console = tables(json)
        console.print(_table(rows, list(methods), console.width))
        updating = [spec for spec, method in methods.items() if isinstance(method, Joint)]
        if updating:
            console.print(_updates_table(rows, updating, console.width))
        if len(methods) > 1:
            console.print(_summary_table(summary, len(rows)))


def _sets(patterns: Sequence[str], sparsities: Sequence[float]) -> list[_Set]:
    """Return all combinations of patterns and sparsities; n:m patterns have no sparsity."""
    sets = []
    for pattern in dict.fromkeys(patterns):
        own: Sequence[float | None] = [None] if ":" in pattern else list(dict.fromkeys(sparsities)) or [None]
        sets += [_Set(pattern, sparsity, parse_masks(pattern, sparsity)) for sparsity in own]
    return sets


def _check(paths: Sequence[Path], sets: Sequence[_Set], device: str) -> None:
    """Check all layers and sets before any work."""
    for path in paths:
        _, problem = load_layer(path, device)
        for one in sets:
            try:
                one.masks.check(problem.shape)
            except MaskoptError as error:
                raise MaskoptError(f"The masks {one} do not fit {path}: {error}") from error


def _measure(
    problem: LayerReconstruction,
    masks: MaskSet,
    method: Solver,
    repeat: int,
    memory: int,
    bar: Bar,
    what: str,
) -> Figures:
    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import solve

    seconds = []
    for _ in range(repeat):
        # A new problem each time, so that no run profits from another's cache.
        fresh = LayerReconstruction(problem.weight, problem.gram, problem.tokens, check=False)
        result = solve(fresh, masks, method, callback=bar.step(what), memory=memory)
        seconds.append(result.seconds)
    return {**result.to_dict(), "seconds": median(seconds), "all_seconds": seconds}


def _row(path: Path, problem: LayerReconstruction, one: _Set, results: dict[str, Figures]) -> Figures:
    first = next(iter(results.values()))
    for figures in results.values():
        figures["error_ratio"] = _ratio(figures["relative_error"], first["relative_error"])
        figures["seconds_ratio"] = _ratio(figures["seconds"], first["seconds"])
    return {
        "instance": str(path),
        "rows": problem.shape[0],
        "columns": problem.shape[1],
        "pattern": one.pattern,
        "sparsity": one.sparsity,
        "label": str(one),
        "results": results,
    }


def _ratio(value: float, reference: float) -> float:
    if value == reference:  # also where both are zero
        return 1.0
    return value / reference if reference else math.inf


def _summary(rows: Sequence[Figures], specs: Sequence[str]) -> Figures:
    """Return median and largest ratios of every solver to every other one."""

    def ratios(spec: str, reference: str, figure: str) -> list[float]:
        return [_ratio(row["results"][spec][figure], row["results"][reference][figure]) for row in rows]

    return {
        spec: {
            reference: {
                "median_error_ratio": median(ratios(spec, reference, "relative_error")),
                "largest_error_ratio": max(ratios(spec, reference, "relative_error")),
                "median_seconds_ratio": median(ratios(spec, reference, "seconds")),
            }
            for reference in specs
        }
        for spec in specs
    }


def _layer_names(rows: Sequence[Figures], width: int) -> list[str]:
    """Return the layers' names in tables: file names without folders where these differ."""
    distinct = len({Path(row["instance"]).stem for row in rows}) == len({row["instance"] for row in rows})
    names = [Path(row["instance"]).stem if distinct else row["instance"] for row in rows]
    return shortened(names, max(12, width))


def _table(rows: Sequence[Figures], specs: Sequence[str], width: int) -> Table:
    """Return the table of all figures: the first solver's errors, then ratios to them."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(f"Error relative to {specs[0]}, and seconds"), title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("masks")
    table.add_column(Text(f"{specs[0]}: error"), justify="right")
    for spec in specs:
        table.add_column(Text(spec), justify="right")
    for name, row in zip(_layer_names(rows, width - 30 - 18 * len(specs)), rows, strict=True):
        results = row["results"]
        best = min(figures["relative_error"] for figures in results.values())
        table.add_row(
            Text(name),
            row["label"],
            f"{results[specs[0]]['relative_error']:.4f}",
            *(
                Text(
                    f"{results[spec]['error_ratio']:.3f} {results[spec]['seconds']:8.2f} s",
                    style="bold" if results[spec]["relative_error"] == best else "",
                )
                for spec in specs
            ),
        )
    return table


def _updates_table(rows: Sequence[Figures], specs: Sequence[str], width: int) -> Table:
    """Return the table of errors before and after the weights were updated."""
    table = Table(box=box.SIMPLE_HEAD, title=Text("Error before and after the update of the weights"))
    table.title_justify = "left"
    table.add_column("layer", no_wrap=True)
    table.add_column("masks")
    for spec in specs:
        table.add_column(Text(spec), justify="right")
    for name, row in zip(_layer_names(rows, width - 30 - 18 * len(specs)), rows, strict=True):
        errors = [row["results"][spec] for spec in specs]
        entries = (f"{figures['kept_error']:.4f} > {figures['relative_error']:.4f}" for figures in errors)
        table.add_row(Text(name), row["label"], *entries)
    return table


def _summary_table(summary: Figures, cases: int) -> Table:
    """Return the table of solvers against solvers."""
    title = f"Over {cases} cases, relative to the solver of the column: median error (largest), median seconds"
    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left")
    table.add_column("solver")
    for reference in summary:
        table.add_column(Text(reference), justify="right")
    for spec, against in summary.items():
        table.add_row(
            Text(spec),
            *(
                "-"
                if reference == spec
                else f"{figures['median_error_ratio']:.3f} ({figures['largest_error_ratio']:.3f}) "
                f"{figures['median_seconds_ratio']:7.2f}x"
                for reference, figures in against.items()
            ),
        )
    return table
