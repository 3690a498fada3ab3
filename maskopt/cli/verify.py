"""`maskopt verify`: compare a heuristic with an exact solver, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from maskopt.cli.layer import load_layer
from maskopt.cli.options import InstanceArgument, JsonOption, PatternOption, QuietOption, SparsityOption, parse_masks
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.part import RowsOption, parse_rows, part_of
from maskopt.cli.solvers import parse_solver
from maskopt.cli.words import rows_words, set_words
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from torch import Tensor

    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import Callback, Solver, State

__all__ = ["verify"]

Figures = dict[str, Any]

_SAME = 1e-12  # relative difference of errors that rounding explains


def verify(
    instance: InstanceArgument,
    rows: RowsOption = "0:8",
    columns: Annotated[
        int | None,
        typer.Option("--columns", min=1, help="Use only so many first columns: exact solvers need small problems."),
    ] = None,
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    solver: Annotated[
        str, typer.Option("--solver", help="Heuristic to verify; settings as in 'sparsefw:iterations=500'.")
    ] = "continuation",
    exact: Annotated[
        str | None,
        typer.Option(
            "--exact",
            help="Exact solver: branch-and-bound, scip, brute-force or any other that proves bounds.",
            show_default="branch-and-bound, or scip where the set requires it",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="Setting of the exact solver; may be repeated."),
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Seconds of the exact solver for each row.")] = 60.0,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Processes, each of which verifies one row at a time.")
    ] = 1,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare a heuristic's mask with the proven optimum, row by row (or by blocks of rows that the set couples)."""
    from maskopt.checks import check_time_limit
    from maskopt.solvers import check_compatible

    check_outputs(json)
    check_time_limit(time_limit)
    masks, heuristic = parse_masks(pattern, sparsity), parse_solver(solver)
    _, layer = load_layer(instance, "cpu")
    chosen = parse_rows(rows, layer.shape[0])
    problem = part_of(layer, chosen, columns)
    masks.check(problem.shape)
    exact = exact or _exact_for(problem, masks)
    reference = parse_solver(exact, option or ())
    if not reference.proves:
        raise MaskoptError(
            f"--exact needs a solver that proves bounds, such as branch-and-bound, scip or brute-force; got {exact}."
        )
    for method in (heuristic, reference):
        check_compatible(problem, masks, method)
    verdicts = _verdicts(problem, masks, heuristic, reference, chosen.start, time_limit, jobs, Bar(quiet, solver))
    summary = _summary(verdicts)
    figures = {
        "rows": verdicts,
        "summary": summary,
        "settings": {
            "instance": str(instance),
            "rows": f"{chosen.start}:{chosen.stop}",
            "columns": problem.shape[1],
            "pattern": pattern,
            "masks": repr(masks),
            "solver": repr(heuristic),
            "exact": repr(reference),
            "time_limit": time_limit,
            "jobs": jobs,
        },
        "versions": environment(),
    }
    with json_output(json, figures):
        console = tables(json)
        console.print(_table(verdicts, f"{instance.stem}, {set_words(pattern, sparsity)}: {solver} against {exact}"))
        console.print(facts(_lines(summary)))


def _exact_for(problem: LayerReconstruction, masks: MaskSet) -> str:
    """Return the fastest exact solver for a set."""
    from maskopt.solvers import BranchAndBound

    return "branch-and-bound" if BranchAndBound().requirements.met(problem, masks) else "scip"


def _verdicts(
    problem: LayerReconstruction,
    masks: MaskSet,
    heuristic: Solver,
    reference: Solver,
    first: int,
    time_limit: float,
    jobs: int,
    bar: Bar,
) -> list[Figures]:
    from joblib import Parallel, delayed

    from maskopt.solvers import solve as solve_problem

    row_block = masks.row_block(problem.shape)
    blocks = [slice(start, start + row_block) for start in range(0, problem.shape[0], row_block)]
    with bar:
        mask = solve_problem(problem, masks, heuristic, callback=bar.step("heuristic")).mask
        bar.tell(f"0 of {len(blocks)} verified", 0.0)
        tasks = (
            delayed(_verdict)(
                part_of(problem, index),
                masks if len(blocks) == 1 else masks.rows(index, problem.shape),
                mask[index].clone(),
                reference,
                first + index.start,
                time_limit,
            )
            for index in blocks
        )
        verdicts: list[Figures] = []

        def tell(state: State) -> None:
            within = max(state.fraction, min(1.0, state.seconds / time_limit))
            bar.tell(f"{len(verdicts)} of {len(blocks)} verified", (len(verdicts) + within) / len(blocks))

        if min(jobs, len(blocks)) == 1:
            found = (task[0](*task[1], callback=tell) for task in tasks)
        else:
            found = Parallel(n_jobs=min(jobs, len(blocks)), return_as="generator_unordered")(tasks)
        for verdict in found:
            verdicts.append(verdict)
            bar.tell(f"{len(verdicts)} of {len(blocks)} verified", len(verdicts) / len(blocks))
    return sorted(verdicts, key=lambda verdict: int(verdict["row"]))


def _verdict(
    problem: LayerReconstruction,
    masks: MaskSet,
    mask: Tensor,
    reference: Solver,
    row: int,
    time_limit: float,
    callback: Callback | None = None,
) -> Figures:
    """Return the comparison for one row block, with errors relative to pruning all of it."""
    import torch

    from maskopt.solvers import solve as solve_problem

    start = None if reference.start is None else mask
    result = solve_problem(problem, masks, reference, start=start, callback=callback, time_limit=time_limit)
    scale = float(problem.scale().sum())
    error = float(problem.objective(mask).sum())
    best = min(error, result.total)
    bound = None if result.lower_bound is None else float(result.lower_bound.sum())
    better = error - best > _SAME * error and not torch.equal(mask, result.mask)
    return {
        "row": row,
        "rows": problem.shape[0],
        "heuristic": _relative(error, scale),
        "best": _relative(best, scale),
        "bound": None if bound is None else _relative(bound, scale),
        "gap": None if bound is None else max(0.0, 1.0 - bound / best) if best > 0.0 else 0.0,
        "verdict": _verdict_words(error, best if better else error, bound, result.status.name),
        "excess": _excess(error, best) if better else 0.0,
        "status": result.status.name,
        "status_text": result.status.value,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "scale": scale,
    }


def _verdict_words(error: float, best: float, bound: float | None, status: str) -> str:
    if best < error:
        known = "" if status == "OPTIMAL" else "at least "
        return f"not optimal by {known}{_percent(_excess(error, best))}"
    if status == "OPTIMAL":
        return "proven optimal"
    if bound is None or not bound > 0.0:
        return "unknown"
    return f"within {_percent(_excess(error, bound))}"


def _relative(value: float, scale: float) -> float:
    return value / scale if scale > 0.0 else 0.0


def _excess(value: float, reference: float) -> float:
    """Return by which fraction of the reference a value exceeds it."""
    if value <= reference:
        return 0.0
    return value / reference - 1.0 if reference > 0.0 else math.inf


def _percent(fraction: float) -> str:
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
            "" if verdict["gap"] is None else _percent(verdict["gap"]),
            verdict["verdict"],
            f"{verdict['seconds']:.2f}",
        )
    return table


def _lines(summary: Figures) -> dict[str, str]:
    worst = f", the worst by {_percent(summary['largest_excess'])}" if summary["not_optimal"] else ""
    return {
        "proven optimal": f"{summary['proven_optimal']} of {summary['verified']}",
        "not optimal": f"{summary['not_optimal']}{worst}",
        "time": f"{summary['seconds']:.1f} s",
    }
