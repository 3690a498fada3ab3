"""Exact greedy removal, then exact swaps until none lowers the error; all choices where they are few."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.problems.refit import Refit
from maskopt.solvers.base import Status
from maskopt.structured.base import Selection, Structured
from maskopt.structured.swaps import Search

__all__ = ["ExactSwaps"]

_WORK = 3e10  # multiplications that trying every choice may take


@dataclass(frozen=True)
class ExactSwaps(Structured):
    """Greedy removal by the exact cost after the refit, then exact swaps until no swap of two units lowers the error.

    Where there are few choices, as of attention heads, every one is evaluated instead, and the best is optimal. Costs
    and gains are those of the refitted weights, so that nothing has to be approximated: see `Refit`. The last round of
    swaps evaluates all pairs from a fresh factorisation in float64: a local optimum has no swap that lowers the error.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    enumerate : int
        Choices up to which all are evaluated.
    rounds : int
        Of swaps, at most.
    exchange : int
        Where no swap is left among the units that matter most, the cheapest 2, 4, 8 ... of them up to this number are
        exchanged for those that then gain most, and swaps go on from there; what that leads to is taken if its error
        is smaller.

    References
    ----------
    Removal by downdates of the inverse: X. Meng et al., "OSSCAR", arXiv 2403.12983, section 3. Sequential
    replacement: A. Miller, "Subset Selection in Regression", 2nd edition, 2002, chapter 3.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.Columns(16), ExactSwaps())
    >>> result.status.name, int(result.mask[0].sum())
    ('LOCAL_OPTIMUM', 16)
    >>> maskopt.solve(layer, maskopt.Columns(30), ExactSwaps()).status.name
    'OPTIMAL'
    """

    enumerate: int = 5000
    rounds: int = 100
    exchange: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, enumerate=whole(0), rounds=whole(0), exchange=whole(0))

    @property
    def draft(self) -> ExactSwaps:
        """Greedy removal without swaps: they take most of the time, and gain about as much at any number of units."""
        return replace(self, rounds=0)

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        if self._few(selection):
            return _best_of_all(selection)
        planned = int(selection.may.sum()) - selection.keep + self.rounds
        state, number = selection.shared.removed(selection, lambda done: selection.stops(done, planned))
        count = selection.monitor.counters
        count["removals"] += number

        def stops(rounds: int) -> bool:
            return selection.stops(number + rounds, planned)

        def counted(name: str, amount: int) -> None:
            count[name] += amount

        search = Search(selection.must, selection.may, self.rounds, self.exchange, stops, counted)
        status = Status.LOCAL_OPTIMUM if search.improve(state) else Status.ITERATION_LIMIT
        return selection.chosen(state.kept), status

    def _few(self, selection: Selection) -> bool:
        blocks = selection.subset.blocks
        free, missing = int((selection.may & ~selection.must).sum()), selection.keep - int(selection.must.sum())
        choices, columns = math.comb(free, missing), selection.keep * blocks.width
        return choices <= min(self.enumerate, _WORK / (columns**3 + columns**2 * len(blocks.target)))


def _best_of_all(selection: Selection) -> tuple[Tensor, Status]:
    """Return the best choice of all and OPTIMAL; if the solve has to stop, the best so far."""
    blocks, must = selection.subset.blocks, selection.must.nonzero().flatten()
    free = (selection.may & ~selection.must).nonzero().flatten().tolist()
    missing = selection.keep - len(must)
    count, best, least = math.comb(len(free), missing), must, math.inf
    for number, some in enumerate(itertools.combinations(free, missing)):
        if number and selection.stops(number, count):
            break
        state = Refit(blocks, torch.cat((must, torch.tensor(some, dtype=must.dtype, device=must.device))))
        loss = float(state.loss())
        if loss < least:
            best, least = state.kept, loss
    selection.monitor.counters["choices"] += count
    return selection.chosen(best), Status.OPTIMAL
