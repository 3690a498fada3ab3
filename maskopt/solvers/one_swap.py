"""1-swap local search: exchange a kept against a pruned entry of the same group while that lowers the error."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, instance_of, whole
from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.blocks import better_of
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.scores import Wanda
from maskopt.solvers.swap_proof import exact_swaps, swap_noise
from maskopt.solvers.swap_search import SwapSearch
from maskopt.solvers.swaps import SwapState

__all__ = ["OneSwap", "descend"]


@dataclass(frozen=True)
class OneSwap(Solver):
    """Best swap of every row until no swap improves (SparseSwaps, arXiv 2512.10922).

    Where groups span rows (whole matrix), a swap may also add in one row and drop in another. The result is a
    proven 1-swap optimum unless `max_steps` ends the search: what the data type's rounding leaves open is decided in
    float64, and what that leaves open without rounding.

    Parameters
    ----------
    start : Solver
        Makes the first mask.
    max_steps : int, optional
        Steps at most; each does the best swap in every row at once. 10 d by default.

    Examples
    --------
    >>> import maskopt
    >>> layer, masks = maskopt.synthetic(rows=4, d=16).problem(), maskopt.PerRow(0.5)
    >>> wanda = maskopt.solve(layer, masks, maskopt.Wanda())
    >>> refined = maskopt.solve(layer, masks, maskopt.OneSwap(), start=wanda.mask)
    >>> refined.total <= wanda.total, refined.status.name
    (True, 'LOCAL_OPTIMUM')
    """

    start: Solver = field(default_factory=Wanda)
    max_steps: int | None = None

    requires: ClassVar[Requirements] = Requirements((LayerReconstruction,), (PartitionMatroid,))
    needs_start: ClassVar[bool] = True
    arrays: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        check_settings(self, start=instance_of(Solver, example="Wanda()"), max_steps=whole(0, optional=True))

    def run(self, problem: LayerReconstruction, masks: PartitionMatroid, start: Tensor, monitor: Monitor) -> Outcome:
        mask, steps, optimal = descend(problem, masks, start, monitor, self.max_steps, proven=True)
        return Outcome(mask, Status.LOCAL_OPTIMUM if optimal else Status.ITERATION_LIMIT, steps, source="swap")


def descend(
    problem: LayerReconstruction,
    masks: PartitionMatroid,
    mask: Tensor,
    monitor: Monitor,
    max_steps: int | None = None,
    *,
    proven: bool = False,
) -> tuple[Tensor, int, bool]:
    """Swap from `mask` until no swap improves.

    Parameters
    ----------
    problem, masks, monitor
        As for a solver.
    mask : Tensor
        Feasible start, boolean, shape (rows, d); not changed.
    max_steps : int, optional
        10 d by default.
    proven : bool
        Whether to go on, in float64 and where that is in doubt without rounding, until it is certain that no swap
        improves.

    Returns
    -------
    mask : Tensor
        Never worse than the start in any row (separable sets) or in total.
    steps : int
        Rounds of simultaneous swaps.
    optimal : bool
        Whether no improving swap is left; up to the rounding of the data type if not `proven`.
    """
    limit = 10 * problem.shape[1] if max_steps is None else max_steps
    kept, steps, optimal = _descended(problem, masks, mask, monitor, limit)
    # Swaps are accepted on float32 products; the answer has to be no worse in exact terms.
    kept = better_of(problem, masks, kept, mask)[0]
    if proven and optimal:
        kept, steps, optimal = _settled(problem, masks, kept, monitor, steps, limit)
    return kept, steps, optimal


def _descended(
    problem: LayerReconstruction, masks: PartitionMatroid, mask: Tensor, monitor: Monitor, limit: int
) -> tuple[Tensor, int, bool]:
    """Swap on carried products, in the problem's type, until none improves by more than its rounding."""
    search, state = SwapSearch(problem, masks), SwapState(problem, masks, mask, double=False)
    monitor.counters["products"] += 1
    # Rows whose last search found nothing need none until they change.
    dirty = torch.ones(problem.shape[0], dtype=torch.bool, device=problem.device)
    steps = 0
    while steps < limit and not monitor.stops(problem, masks, steps, limit, mask=state.mask):
        rows, add, drop_rows, drop = search.step(state.mask, state.carried, dirty)
        if len(rows) == 0:
            return state.mask, steps, True
        state.swap(rows, add, drop_rows, drop)
        monitor.counters["swaps"] += len(rows)
        steps += 1
    return state.mask, steps, False


def _settled(
    problem: LayerReconstruction, masks: PartitionMatroid, mask: Tensor, monitor: Monitor, steps: int, limit: int
) -> tuple[Tensor, int, bool]:
    """Swap in float64 with proven rounding errors; what they leave open is decided without rounding."""
    wide, kept = problem.double(), mask.clone()
    search = SwapSearch(wide, masks, margin=0.0)
    every = torch.arange(problem.shape[0], device=problem.device)
    dirty = torch.ones_like(every, dtype=torch.bool)
    carried = torch.empty(wide.shape, dtype=torch.float64, device=problem.device)
    changed = every
    while True:
        # Products from scratch, so that the errors proven of them hold.
        carried[changed] = wide.rows(changed).product(kept[changed].double())
        search.noise = swap_noise(wide, kept)
        if steps >= limit or monitor.stops(problem, masks, steps, limit, mask=kept):
            return kept, steps, False
        rows, add, drop_rows, drop = search.step(kept, carried, dirty)
        if len(rows) == 0:
            swaps = exact_swaps(problem, kept, carried, search)
            if swaps is None or len(swaps[0]) == 0:
                return kept, steps, swaps is not None
            rows, add, drop_rows, drop = swaps
        kept[rows, add] = True
        kept[drop_rows, drop] = False
        monitor.counters["swaps"] += len(rows)
        steps += 1
        dirty[rows] = True
        dirty[drop_rows] = True
        changed = dirty.nonzero().flatten()
