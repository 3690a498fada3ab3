"""`maskopt verify`: compare a heuristic with an exact solver, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.layer import load_layer
from maskopt.cli.options import InstanceArgument, JsonOption, PatternOption, QuietOption, SparsityOption, parse_masks
from maskopt.cli.output import Bar, check_outputs, environment, json_output, tables
from maskopt.cli.part import check_row_blocks, parse_rows, part_of, part_settings
from maskopt.cli.pool import Backend, BackendOption, JobsOption, on_workers, open_workers
from maskopt.cli.solvers import parse_solver
from maskopt.cli.verify_report import excess_of, percent, show_verdicts, verify_report
from maskopt.cli.words import set_words
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from maskopt.cli.pool import Workers
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import Callback, Solver, State

__all__ = ["verify"]

Figures = dict[str, Any]

_FIRST = 8  # rows that are compared where none are named
_SAME = 1e-12  # relative difference of errors that rounding explains


def verify(
    instance: InstanceArgument,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="A:B",
            help="Range of rows from A up to, but not including, B; : is all.",
            show_default="the first eight, 0:8, or all of a smaller layer",
        ),
    ] = None,
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
    jobs: JobsOption = None,
    backend: BackendOption = Backend.LOKY,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare a heuristic's mask with the proven optimum, row by row (or by blocks of rows that the set couples).

    With --rows, parts of a layer can be verified by several commands, whose JSON files maskopt merge puts together.
    """
    from maskopt.checks import check_time_limit
    from maskopt.solvers import check_compatible

    check_outputs(json)
    check_time_limit(time_limit)
    masks, heuristic = parse_masks(pattern, sparsity), parse_solver(solver)
    _, layer = load_layer(instance, "cpu")
    chosen = slice(0, min(_FIRST, layer.shape[0])) if rows is None else parse_rows(rows, layer.shape[0])
    problem = part_of(layer, chosen, columns)
    settings = part_settings(instance, chosen, (layer.shape[0], problem.shape[1]), pattern, sparsity, masks)
    if settings["row_block"] < layer.shape[0]:  # otherwise the part is a layer of its own, as the report says
        check_row_blocks(masks, chosen, settings["row_block"])
    masks.check(problem.shape)
    exact = exact or _exact_for(problem, masks)
    reference = parse_solver(exact, option or ())
    if not reference.proves:
        raise MaskoptError(
            f"--exact needs a solver that proves bounds, such as branch-and-bound, scip or brute-force; got {exact}."
        )
    for method in (heuristic, reference):
        check_compatible(problem, masks, method)
    with Bar(quiet, solver) as bar, open_workers(backend, jobs) as workers:
        verdicts = _verdicts(problem, masks, heuristic, reference, chosen.start, time_limit, workers, bar)
    settings |= {
        "solver": repr(heuristic),
        "exact": repr(reference),
        "time_limit": time_limit,
        "jobs": workers.count,
        "backend": backend.value,
    }
    title = f"{instance.stem}, {set_words(pattern, sparsity)}: {solver} against {exact}"
    report = verify_report(verdicts, title, settings, environment())
    with json_output(json, report):
        show_verdicts(tables(json), report)


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
    workers: Workers,
    bar: Bar,
) -> list[Figures]:
    """Return the comparisons of all row blocks, none of which depends on the others or on who makes it."""
    row_block = masks.row_block(problem.shape)
    blocks = [slice(start, start + row_block) for start in range(0, problem.shape[0], row_block)]
    weight, gram = problem.weight.numpy(), problem.gram.numpy()
    tasks = [
        (
            weight[index],
            gram,
            masks if len(blocks) == 1 else masks.rows(index, problem.shape),
            heuristic,
            reference,
            first + index.start,
            time_limit,
        )
        for index in blocks
    ]

    def tell(done: int, within: float = 0.0) -> None:
        bar.tell(f"{done} of {len(blocks)} verified", (done + within) / len(blocks))

    tell(0)
    if not workers.here(len(blocks)):
        return on_workers(_verdict, ((*task, workers.check) for task in tasks), workers, tell)
    verdicts: list[Figures] = []

    def tell_within(state: State) -> None:
        tell(len(verdicts), max(state.fraction, min(1.0, state.seconds / time_limit)))

    for task in tasks:
        verdicts.append(_verdict(*task, tell_within if bar.visible else None))
        tell(len(verdicts))
    return verdicts


def _verdict(
    weight: NDArray[Any],
    gram: NDArray[Any],
    masks: MaskSet,
    heuristic: Solver,
    reference: Solver,
    row: int,
    time_limit: float,
    callback: Callback | None = None,
) -> Figures:
    """Return the comparison for one row block, with errors relative to pruning all of it."""
    import torch

    from maskopt.problems import LayerReconstruction
    from maskopt.solvers import solve

    # Copies, because joblib may have mapped the arrays into memory that cannot be written to.
    problem = LayerReconstruction(torch.tensor(weight), torch.tensor(gram), check=False)
    mask = solve(problem, masks, heuristic).mask
    start = None if reference.start is None else mask
    result = solve(problem, masks, reference, start=start, callback=callback, time_limit=time_limit)
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
        "excess": excess_of(error, best) if better else 0.0,
        "status": result.status.name,
        "status_text": result.status.value,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "scale": scale,
    }


def _verdict_words(error: float, best: float, bound: float | None, status: str) -> str:
    if best < error:
        known = "" if status == "OPTIMAL" else "at least "
        return f"not optimal by {known}{percent(excess_of(error, best))}"
    if status == "OPTIMAL":
        return "proven optimal"
    if bound is None or not bound > 0.0:
        return "unknown"
    return f"within {percent(excess_of(error, bound))}"


def _relative(value: float, scale: float) -> float:
    return value / scale if scale > 0.0 else 0.0
