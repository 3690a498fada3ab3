"""1-swap local search: exchange a kept against a pruned entry of the same group while that lowers the error."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.blocks import better_of
from maskopt.solvers.scores import Wanda
from maskopt.solvers.swap_search import SwapSearch
from maskopt.solvers.swaps import SwapState

__all__ = ["OneSwap", "better_of", "descend"]


@dataclass(frozen=True)
class OneSwap(Solver):
    """Best swap of every row until no swap improves (SparseSwaps, arXiv 2512.10922).

    Where groups span rows (whole matrix), a swap may also add in one row and drop in another. The result is a
    proven 1-swap optimum, up to the rounding of the data type, unless `max_steps` ends the search.

    Parameters
    ----------
    start : Solver
        Makes the first mask.
    max_steps : int, optional
        Steps at most; each does the best swap in every row at once. 10 d by default.
    """

    start: Solver = field(default_factory=Wanda)
    max_steps: int | None = None

    requires: ClassVar[tuple[str, ...]] = ("weight", "gram")
    asks: ClassVar[tuple[str, ...]] = ("swap_groups",)
    arrays: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 0:
            raise MaskoptError(f"OneSwap needs max_steps >= 0; got {self.max_steps}.")

    def run(self, problem: Problem, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        assert isinstance(problem, LayerReconstruction)
        assert start is not None
        mask, steps, optimal = descend(problem, masks, start, monitor, self.max_steps)
        return Outcome(mask, Status.LOCAL_OPTIMUM if optimal else Status.ITERATION_LIMIT, steps, source="swap")


def descend(
    problem: LayerReconstruction,
    masks: MaskSet,
    mask: Tensor,
    monitor: Monitor,
    max_steps: int | None = None,
) -> tuple[Tensor, int, bool]:
    """Swap from `mask` until no swap improves.

    Parameters
    ----------
    problem, masks, watch
        As for a solver.
    mask : Tensor
        Feasible start, boolean, shape (rows, d); not changed.
    max_steps : int, optional
        10 d by default.

    Returns
    -------
    mask : Tensor
        Never worse than the start in any row (separable sets) or in total.
    steps : int
        Rounds of simultaneous swaps.
    optimal : bool
        Whether no improving swap is left.
    """
    assert isinstance(masks, PartitionMatroid)
    search = SwapSearch(problem, masks)
    limit = 10 * problem.shape[1] if max_steps is None else max_steps
    start, state = mask, SwapState(problem, masks, mask, double=False)
    monitor.counters["products"] += 1
    # Rows whose last search found nothing need none until they change.
    dirty = torch.ones(problem.shape[0], dtype=torch.bool, device=problem.device)
    steps, optimal = 0, False
    while steps < limit and not monitor.stops(problem, masks, steps, limit, mask=state.mask):
        rows, add, drop_rows, drop = search.step(state.mask, state.carried, dirty)
        if len(rows) == 0:
            optimal = True
            break
        state.swap(rows, add, drop_rows, drop)
        monitor.counters["swaps"] += len(rows)
        steps += 1
    # Swaps are accepted on float32 products; the answer has to be no worse in exact terms.
    return better_of(problem, masks, state.mask, start)[0], steps, optimal
