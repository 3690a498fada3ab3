"""The functions that run a solver."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.precision import ordinary_torch
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.arguments import check_arguments
from maskopt.solvers.base import Solver
from maskopt.solvers.chunks import Chunk, row_chunks
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.history import Record, Recorder, merged
from maskopt.solvers.monitor import Callback, Monitor
from maskopt.solvers.outcome import GapKind, Outcome, Result, Status, weakest
from maskopt.solvers.rules import RowBlocks, row_block_of
from maskopt.threads import sized_threads

__all__ = ["check_compatible", "solve", "solve_parts", "solve_sets"]

_HELD = 2  # arrays of shape (rows, d) that a solve may hold of each set at a time


def solve(
    problem: Problem,
    masks: MaskSet,
    solver: Solver | None = None,
    *,
    start: Tensor | Solver | None = None,
    callback: Callback | None = None,
    time_limit: float | None = None,
    memory: int = 2**30,
    record: Record | None = None,
) -> Result:
    """Choose a mask.

    Parameters
    ----------
    problem : Problem
        Usually a `LayerReconstruction`.
    masks : MaskSet
        The feasible set: `PerRow(0.5)`, `NM(keep=2, group=4)`, `Unstructured(0.4)` ...
    solver : Solver, optional
        `ContinuationFrankWolfe()` by default.
    start : Tensor or Solver, optional
        A feasible boolean mask, or the solver that makes one, instead of the solver's own choice.
    callback : callable, optional
        Called with a `State` about once per iteration; returning `Stop.STOP` ends the solve early.
    time_limit : float, optional
        Seconds after which the best mask so far is returned, with status TIME_LIMIT.
    memory : int
        Bytes of working memory; where rows are independent they are solved in blocks that fit.
    record : int or "doubling", optional
        Iterations at which values, bounds and rounded errors are evaluated in float64 for `Result.history`: every so
        many, or 0, 1, 2, 4, 8 ...; by default the solver's own choice. The result is the best mask seen.

    Returns
    -------
    Result

    Raises
    ------
    MaskoptError
        If the set does not fit the weight, the start is infeasible, or problem and solver do not go together.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=4, d=16).problem()
    >>> result = maskopt.solve(layer, maskopt.PerRow(0.5))
    >>> result.mask.sum(1).tolist(), result.sparsity
    ([8, 8, 8, 8], 0.5)
    >>> result.status.name
    'LOCAL_OPTIMUM'
    """
    check_arguments(problem, masks, solver, start, callback, time_limit, memory, record)
    parts = [slice(0, problem.shape[0])]
    return solve_parts(
        problem,
        masks,
        solver,
        parts,
        start=start,
        callback=callback,
        time_limit=time_limit,
        memory=memory,
        record=record,
    )[0]


def solve_parts(
    problem: Problem,
    masks: MaskSet,
    solver: Solver | None,
    parts: Sequence[slice],
    *,
    start: Tensor | Solver | None = None,
    callback: Callback | None = None,
    time_limit: float | None = None,
    memory: int = 2**30,
    record: Record | None = None,
) -> list[Result]:
    """Choose the masks of some rows as if each part were solved alone, with one factorisation for all of them.

    The last bits of what a row becomes may depend on how many others are multiplied with it. Here they depend on the
    row's own part only, so that several processes can share the parts in any way.

    Parameters
    ----------
    problem : Problem
    masks, solver, start, callback, time_limit, memory, record
        As for `solve`; where there are several parts, `solver.solves_rows_apart(masks)`.
    parts : sequence of slice
        Rows, with start and stop.

    Returns
    -------
    list of Result
        Seconds are by number of rows, and counters, of all parts, those of the first one.

    Raises
    ------
    MaskoptError
        As of `solve`.
    """
    solver = ContinuationFrankWolfe() if solver is None else solver
    monitor = Monitor(type(solver).__name__, callback, time_limit, memory)
    pieces = [(masks, part) for part in parts]
    return _solve(problem, pieces, solver, start, monitor, solver.record if record is None else record)


def solve_sets(
    problem: Problem, sets: Sequence[MaskSet], solver: Solver | None = None, *, memory: int = 2**30
) -> list[Result]:
    """Choose a mask of each of several sets; what a solver has in common for them, it does once: factorisations.

    Parameters
    ----------
    problem : Problem
    sets : sequence of MaskSet
        Of whole units (`Columns`) those that keep more first: greedy removal then goes on from one to the next.
    solver, memory
        As for `solve`.

    Returns
    -------
    list of Result
        As of `solve`, up to choices between units that cost the same or nearly so. Seconds are in equal parts, and
        counters, of all sets that were solved together, those of the first one.

    Raises
    ------
    MaskoptError
        As of `solve`.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=4, d=16).problem()
    >>> half, quarter = solve_sets(layer, [maskopt.PerRow(0.5), maskopt.PerRow(0.25)])
    >>> half.sparsity, quarter.sparsity
    (0.5, 0.75)
    """
    solver = ContinuationFrankWolfe() if solver is None else solver
    rows, columns = problem.shape
    together = max(1, int(memory / (_HELD * rows * columns * torch.finfo(problem.dtype).bits / 8)))
    results = list[Result]()
    for first in range(0, len(sets), together):
        monitor = Monitor(type(solver).__name__, None, None, memory)
        pieces = [(masks, slice(0, rows)) for masks in sets[first : first + together]]
        results += _solve(problem, pieces, solver, None, monitor, solver.record)
    return results


def check_compatible(problem: Problem, masks: MaskSet, solver: Solver) -> None:
    """Check that problem, set and solver go together, as `solve` does first.

    Parameters
    ----------
    problem : Problem
    masks : MaskSet
    solver : Solver

    Raises
    ------
    MaskoptError
        With what is missing, if they do not.
    """
    solver.requirements.check(problem if solver.relaxes else problem.unshifted(), masks, solver.name)


def _solve(
    problem: Problem,
    pieces: Sequence[tuple[MaskSet, slice]],
    solver: Solver,
    start: Tensor | Solver | None,
    monitor: Monitor,
    record: Record,
) -> list[Result]:
    """Return the results of rows of the problem, each with the masks of its set."""
    for masks in _different(pieces):
        check_compatible(problem, masks, solver)
        masks.check(problem.shape)  # raises here, before any work, where the set does not fit
    rows, columns = problem.shape
    with ordinary_torch(problem.device), sized_threads(rows * columns * columns):
        start = solver.start if start is None else start
        starts = {id(masks): _start_mask(problem, masks, start) for masks in _different(pieces)}
        chunks = _chunks(problem, pieces, starts, solver, monitor.memory, record)
        outcomes = iter(solver.run_chunks([chunk for part in chunks for chunk in part], monitor))
        return _results(problem, pieces, solver, chunks, outcomes, monitor)


def _chunks(
    problem: Problem,
    pieces: Sequence[tuple[MaskSet, slice]],
    starts: Mapping[int, Tensor | None],
    solver: Solver,
    memory: int,
    record: Record,
) -> list[list[Chunk]]:
    """Return what is solved at a time, of each piece; starting masks are by the identity of the set."""
    seen = problem if solver.relaxes else problem.unshifted()
    everything, total, done = slice(0, problem.shape[0]), _rows_of(pieces), 0
    chunks = list[list[Chunk]]()
    for masks, part in pieces:
        first, row_block = starts[id(masks)], row_block_of(problem, masks)
        if first is None and solver.needs_start:
            raise MaskoptError(
                f"{solver.name} needs a mask to start from; give solve(..., start=...) a mask or a solver."
            )
        apart = solver.solves_rows_apart(masks) or (solver.row_wise and solver.blockwise)
        chunks.append([])
        for index in row_chunks(seen, solver.arrays, memory, row_block, part) if apart else [part]:
            own = seen if index == everything else seen.rows(index)
            own_masks = masks if index == everything else masks.rows(index, problem.shape)
            recorder = None if record == 0 else Recorder(own, own_masks, RowBlocks(row_block), record)
            before, done = done, done + index.stop - index.start
            start_mask = None if first is None else first[index]
            chunks[-1].append(Chunk(own, own_masks, start_mask, (before / total, done / total), recorder))
    return chunks


def _results(
    problem: Problem,
    pieces: Sequence[tuple[MaskSet, slice]],
    solver: Solver,
    chunks: Sequence[Sequence[Chunk]],
    outcomes: Iterator[Outcome],
    monitor: Monitor,
) -> list[Result]:
    """Return the result of each piece, from the outcomes of its chunks."""
    everything, total = slice(0, problem.shape[0]), _rows_of(pieces)
    results = list[Result]()
    for (masks, part), mine in zip(pieces, chunks, strict=True):
        whole = part == everything
        own, own_masks = (problem, masks) if whole else (problem.rows(part), masks.rows(part, problem.shape))
        recorders = [chunk.recorder for chunk in mine if chunk.recorder is not None]
        found = list(itertools.islice(outcomes, len(mine)))
        result = _evaluated(own, own_masks, solver, found, recorders, monitor.ended)
        seconds = monitor.seconds * (part.stop - part.start) / total
        results.append(replace(result, seconds=seconds, counters={} if results else dict(monitor.counters)))
    return results


def _rows_of(pieces: Sequence[tuple[MaskSet, slice]]) -> int:
    return sum(part.stop - part.start for _, part in pieces)


def _different(pieces: Sequence[tuple[MaskSet, slice]]) -> list[MaskSet]:
    """Return every set once; anybody's sets need not be hashable."""
    return list({id(masks): masks for masks, _ in pieces}.values())


def _evaluated(
    problem: Problem,
    masks: MaskSet,
    solver: Solver,
    outcomes: Sequence[Outcome],
    recorders: Sequence[Recorder],
    ended: Status | None,
) -> Result:
    """Return the result of the outcomes of a problem's chunks, without seconds and counters."""
    mask = torch.cat([outcome.mask for outcome in outcomes])
    if not masks.contains(mask):
        raise RuntimeError(f"{type(solver).__name__} returned a mask outside {masks}; this is a bug in the solver.")
    weight, before, objective = None, None, problem.objective(mask)
    if all(outcome.weight is not None for outcome in outcomes):
        before = objective
        seen = problem if solver.relaxes else problem.unshifted()
        weight, objective = _accepted(seen, solver, mask, before, [outcome.weight for outcome in outcomes])
    bound = _bound(outcomes)
    optimal = bound is not None and bool((objective.view(len(bound), -1).sum(1) <= bound).all())
    unproven = GapKind.NONE if all(recorder.convex for recorder in recorders) else GapKind.STATIONARY
    return Result(
        mask=mask,
        objective=objective,
        scale=problem.scale(),
        status=Status.OPTIMAL if optimal else ended or weakest([outcome.status for outcome in outcomes]),
        gap_kind=unproven if bound is None else GapKind.PROVEN,
        lower_bound=bound,
        iterations=max(outcome.iterations for outcome in outcomes),
        seconds=0.0,
        solver=repr(solver),
        history=merged([recorder.history for recorder in recorders]),
        sources=dict(sum((Counter(recorder.sources) for recorder in recorders), Counter())),
        weight=weight,
        kept_objective=before,
    )


def _bound(outcomes: Sequence[Outcome]) -> Tensor | None:
    """Return the proven bounds of all row blocks, None unless every chunk has some."""
    bounds = [outcome.lower_bound for outcome in outcomes if outcome.lower_bound is not None]
    return torch.cat(bounds) if len(bounds) == len(outcomes) else None


def _accepted(
    problem: Problem, solver: Solver, mask: Tensor, before: Tensor, parts: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return a mask's weights and their errors; rows that an update made worse keep the weights they had."""
    weight = torch.cat([part for part in parts if part is not None])
    if not isinstance(problem, LayerReconstruction):
        raise RuntimeError(f"{type(solver).__name__} returned weights of a problem that has none; this is a bug in it.")
    if bool((weight != 0).logical_and(~mask).any()):
        raise RuntimeError(f"{type(solver).__name__} returned weights outside its mask; this is a bug in the solver.")
    objective = problem.error(weight)
    worse = ~(objective <= before)
    weight = torch.where(worse.unsqueeze(1), problem.weight * mask, weight)
    return weight, torch.where(worse, before, objective)


def _start_mask(problem: Problem, masks: MaskSet, start: Tensor | Solver | None) -> Tensor | None:
    if start is None:
        return None
    if isinstance(start, Solver):
        return solve(problem, masks, start).mask
    if start.shape != problem.shape or not masks.contains(start.to(problem.device)):
        raise MaskoptError(
            f"The start must be a boolean mask of shape {tuple(problem.shape)} in {masks}; got a {start.dtype} tensor "
            f"of shape {tuple(start.shape)}{'' if start.shape != problem.shape else ' that is not in the set'}."
        )
    return start.to(problem.device)
