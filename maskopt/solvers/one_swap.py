"""1-swap local search: exchange a kept against a pruned entry of the same group while that lowers the error."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, instance_of, whole
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.base import Monitor, Outcome, Solver, Status, row_block_of
from maskopt.solvers.rules import RowBlocks
from maskopt.solvers.scores import Wanda
from maskopt.solvers.swap_search import SwapSearch

__all__ = ["OneSwap", "better_of", "descend"]

_REFRESH = 32  # steps after which the carried products are computed anew


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
    asks: ClassVar[tuple[str, ...]] = ("swap_tile",)
    arrays: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        check_settings(self, start=instance_of(Solver, example="Wanda()"), max_steps=whole(0, optional=True))

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
    start, kept = mask, mask.clone()
    carried = problem.product(kept.to(problem.dtype))
    monitor.counters["products"] += 1
    # Rows whose last search found nothing need none until they change.
    dirty = torch.ones(problem.shape[0], dtype=torch.bool, device=problem.device)
    steps, optimal = 0, False
    while steps < limit and not monitor.stops(problem, masks, steps, limit, mask=kept):
        rows, add, drop_rows, drop = search.step(kept, carried, dirty)
        if len(rows) == 0:
            optimal = True
            break
        kept[rows, add] = True
        kept[drop_rows, drop] = False
        weight, gram = problem.scaled_weight, problem.scaled_gram
        carried.index_add_(0, rows, gram[add] * weight[rows, add].unsqueeze(1), alpha=-1)
        carried.index_add_(0, drop_rows, gram[drop] * weight[drop_rows, drop].unsqueeze(1))
        monitor.counters["swaps"] += len(rows)
        steps += 1
        if steps % _REFRESH == 0:
            touched = dirty.nonzero().flatten()
            carried[touched] = problem.rows(touched).product(kept[touched].to(problem.dtype))
    # Swaps are accepted on float32 products; the answer has to be no worse in exact terms.
    return better_of(problem, masks, kept, start)[0], steps, optimal


def better_of(problem: Problem, masks: MaskSet, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better and the worse of two masks, row block by row block; `one` counts as better where they are equal."""
    row_blocks = RowBlocks(row_block_of(problem, masks))
    swap = (row_blocks(problem.objective(two)) < row_blocks(problem.objective(one))).unsqueeze(1)
    return torch.where(swap, two, one), torch.where(swap, one, two)
