"""Exact greedy removal, then exact swaps until none lowers the error; all choices where they are few."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.problems.refit import Refit
from maskopt.solvers.base import Status
from maskopt.structured.backward import remove_cheapest
from maskopt.structured.base import Selection, Structured

__all__ = ["ExactSwaps"]

_WORK = 3e10  # multiplications that trying every choice may take
_GAIN = 1e-9  # of the error, that a swap has to gain: less may be rounding
_NOISE = 1e-14  # of the error of removing everything, likewise
_ENTRIES = 2**24  # of the arrays of pairs of units at a time


@dataclass(frozen=True)
class ExactSwaps(Structured):
    """Greedy removal by the exact cost after the refit, then exact swaps until no swap of two units lowers the error.

    Where there are few choices, as of attention heads, every one is evaluated instead, and the best is optimal. Costs
    and gains are those of the refitted weights, so that nothing has to be approximated: see `Refit`. The last round of
    swaps is computed from a fresh factorisation in float64.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    enumerate : int
        Choices up to which all are evaluated.
    rounds : int
        Of swaps, at most.
    exchange : int
        Where no swap is left, the cheapest 2, 4, 8 ... units up to this number are exchanged for those that then gain
        most, and swaps go on from there; what that leads to is taken if its error is smaller.

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

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        if self._few(selection):
            return _best_of_all(selection)
        state = Refit(selection.subset.blocks, selection.may.nonzero().flatten())
        number = len(state.kept) - selection.keep
        planned = number + self.rounds
        remove_cheapest(state, number, selection.must, lambda done: selection.stops(done, planned))
        selection.monitor.counters["removals"] += number
        state.refresh()
        swapped, rounds = self._swap(selection, state, number, planned)
        size, limit = 2, min(self.exchange, selection.keep - int(selection.must.sum()), number)
        while swapped and size <= limit:
            trial = Refit(state.blocks, state.kept)
            _exchange(selection, trial, size)
            optimal, more = self._swap(selection, trial, number + rounds, planned)
            rounds += more
            if optimal and bool(trial.loss() < state.loss() * (1.0 - _GAIN)):
                state = trial
            else:
                size *= 2
            if selection.monitor.ended is not None:
                break
        status = Status.LOCAL_OPTIMUM if swapped else Status.ITERATION_LIMIT
        return torch.zeros_like(selection.must).index_fill_(0, state.kept, True), status

    def _swap(self, selection: Selection, state: Refit, done: int, planned: int) -> tuple[bool, int]:
        """Swap until no swap lowers the error, in place; return whether that was reached, and after how many rounds."""
        for round_ in range(self.rounds):
            if selection.stops(done + round_, planned):
                return False, round_
            if not _Swaps(selection, state).improve():
                return True, round_ + 1
        return False, self.rounds

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
    return torch.zeros_like(selection.must).index_fill_(0, best, True), Status.OPTIMAL


def _exchange(selection: Selection, state: Refit, size: int) -> None:
    """Remove the cheapest units one by one, then add as many that gain most, in place."""
    remove_cheapest(state, size, selection.must)
    others = selection.may.clone().index_fill_(0, state.kept, False).nonzero().flatten()
    gains = torch.cat([state.additions(part).gains for part in _parts(state, others)])
    added = others[torch.argsort(gains, descending=True, stable=True)[:size]]
    state.kept = torch.cat((state.kept, added))
    state.refresh()


def _parts(state: Refit, units: Tensor) -> Sequence[Tensor]:
    """Return units in parts for which the arrays of pairs with the kept ones are not too large."""
    columns = len(state.inverse) * state.blocks.width
    return torch.split(units, max(1, _ENTRIES // max(1, columns)))


class _Swaps:
    """One round of swaps: all pairs are evaluated, then the best ones are made, each after another evaluation."""

    def __init__(self, selection: Selection, state: Refit) -> None:
        self.selection, self.state = selection, state
        size = (state.blocks.target * state.blocks.product).sum()
        self.loss = state.loss()
        self.least = float(_GAIN * self.loss + _NOISE * size)

    def improve(self) -> bool:
        """Make swaps that lower the error, in place; return whether there were any."""
        state, made = self.state, 0
        before = state.kept
        for unit in self._candidates():
            addition = state.additions(unit)
            changes = self._allowed(state.swap_changes(addition))[:, 0]
            place = int(changes.argmin())
            if float(changes[place]) < -self.least:
                state.exchange(place, addition)
                made += 1
                self.selection.monitor.counters["swaps"] += 1
                if self.selection.monitor.ended is not None:
                    break
        if made == 0:
            return False
        state.refresh()
        if not bool(state.loss() < self.loss):  # only where rounding decides
            state.kept = before
            state.refresh()
            return False
        return True

    def _candidates(self) -> list[Tensor]:
        """Return units whose best swap lowers the error, the best first, each of shape (1,)."""
        others = self.selection.may.clone().index_fill_(0, self.state.kept, False).nonzero().flatten()
        parts = _parts(self.state, others)
        found = [self._allowed(self.state.swap_changes(self.state.additions(part))).amin(0) for part in parts]
        self.selection.monitor.counters["pairs"] += len(others) * len(self.state.kept)
        changes = torch.cat(found) if found else self.state.weight.new_empty(0)
        order = torch.argsort(changes, stable=True)
        return [others[place : place + 1] for place in order[changes[order] < -self.least].tolist()]

    def _allowed(self, changes: Tensor) -> Tensor:
        return changes.masked_fill_(self.selection.must[self.state.kept].unsqueeze(1), torch.inf)
