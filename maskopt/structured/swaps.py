"""Exact swaps of units until none lowers the error, by way of small problems of the units that matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.problems.refit import Refit
from maskopt.structured.backward import remove_cheapest, without

__all__ = ["Search"]

_GAIN = 1e-9  # of the error, that a swap has to gain: less may be rounding
_NOISE = 1e-14  # of the error of removing everything, likewise
_ENTRIES = 2**24  # of the arrays of pairs of units at a time
_SIDE = 256  # columns on each side of a small problem: kept ones, and others


@dataclass(frozen=True)
class Search:
    """Local search by swaps of a kept unit and another one.

    Parameters
    ----------
    must, may : Tensor
        Units that have to be kept, and that can be, boolean, shape (units,).
    rounds : int
        At most, each of which evaluates all pairs.
    exchange : int
        Units that are exchanged at once where no swap is left, at most.
    stops : callable
        Called with the number of rounds done; True if the search has to end.
    count : callable
        Called with a name and a number of what was done.
    """

    must: Tensor
    may: Tensor
    rounds: int
    exchange: int
    stops: Callable[[int], bool]
    count: Callable[[str, int], object]

    def improve(self, state: Refit) -> bool:
        """Swap until no swap lowers the error, in place; return whether that was reached.

        Every round evaluates all pairs from a fresh factorisation. Then the kept units that cost least and the others
        whose best swap is best make a problem of their own (`Refit.joined`), whose errors are those of the whole up to
        a constant: there swaps and exchanges go on, until none is left, at a cost that does not depend on the size of
        the layer. The rounds end where neither a swap of any pair nor exchanges in the small problem lower the error.

        Parameters
        ----------
        state : Refit
            Fresh; replaced by a fresh one of the units found.
        """
        loss = state.loss()
        for round_ in range(self.rounds):
            if self.stops(round_):
                return False
            least = float(_GAIN * loss + _NOISE * (state.blocks.target * state.blocks.product).sum())
            found = self._through_few(state, least, round_)
            if found is None:
                return True
            trial = Refit(state.blocks, found)
            after = trial.loss()
            if not bool(after < loss):  # only where rounding decides
                return True
            state.kept, state.inverse, state.weight, loss = trial.kept, trial.inverse, trial.weight, after
        return False

    def _through_few(self, state: Refit, least: float, round_: int) -> Tensor | None:
        """Return a better choice, found in the small problem of the units that matter; None if there is none."""
        others = state.missing(self.may)
        changes, partners = self._best(state, others)
        side = max(1, _SIDE // state.blocks.width)
        entering = torch.argsort(changes, stable=True)[:side]
        # The partners of the best swaps, then the units whose removal costs least; none that has to stay.
        costs = state.removal_costs()
        costs[partners[entering[: (side + 1) // 2]]] = -1.0
        costs.masked_fill_(self.must[state.kept], torch.inf)
        leaving = torch.argsort(costs, stable=True)[: min(side, int((~self.must[state.kept]).sum()))]
        if min(len(leaving), len(entering)) == 0:
            return None
        few = state.joined(leaving, state.additions(others[entering]))
        inner = _Swaps(self.rounds, least / few.unit, lambda: self.stops(round_), self.count)
        start = Refit(few, torch.arange(len(leaving), device=leaving.device))
        better = inner.settled(start, self.exchange)
        if bool((start.loss() - better.loss()) <= inner.least):
            return None
        units = torch.cat((state.kept[leaving], others[entering]))
        return torch.cat((without(state.kept, leaving), units[better.kept]))

    def _best(self, state: Refit, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best change of a swap for each of the other units, and the place of the one that leaves."""
        changes, partners = [], []
        for part in _parts(state, others):
            found = state.swap_changes(state.additions(part))
            found.masked_fill_(self.must[state.kept].unsqueeze(1), torch.inf)
            least = found.min(0)
            changes.append(least.values)
            partners.append(least.indices)
        self.count("pairs", len(others) * len(state.kept))
        if not changes:
            return state.weight.new_empty(0), state.kept.new_empty(0)
        return torch.cat(changes), torch.cat(partners)


@dataclass(frozen=True)
class _Swaps:
    """Swaps in a small problem in which every unit may go or stay; all pairs are evaluated in every round."""

    rounds: int
    least: float
    stops: Callable[[], bool]
    count: Callable[[str, int], object]

    def settled(self, state: Refit, exchange: int) -> Refit:
        """Return what swaps and exchanges of more units lead to."""
        state = Refit(state.blocks, state.kept)
        swapped, size = self._descend(state), 2
        limit = min(exchange, len(state.kept), state.blocks.number - len(state.kept))
        while swapped and size <= limit:
            trial = Refit(state.blocks, state.kept)
            self._exchange(trial, size)
            swapped = self._descend(trial)
            if swapped and bool(trial.loss() < state.loss() - self.least):
                state = trial
            else:
                size *= 2
        return state

    def _descend(self, state: Refit) -> bool:
        """Swap until no swap lowers the error, in place; return whether that was reached."""
        for _ in range(self.rounds):
            if self.stops():
                return False
            if not self._swap(state):
                return True
        return False

    def _swap(self, state: Refit) -> bool:
        """Make swaps that lower the error, in place, the best first, each after another evaluation."""
        others = state.missing()
        before, loss, made = state.kept, state.loss(), 0
        best = state.swap_changes(state.additions(others)).amin(0)
        order = torch.argsort(best, stable=True)
        for place in order[best[order] < -self.least].tolist():
            addition = state.additions(others[place : place + 1])
            changes = state.swap_changes(addition)[:, 0]
            leaving = int(changes.argmin())
            if float(changes[leaving]) < -self.least:
                state.exchange(leaving, addition)
                made += 1
        if made == 0:
            return False
        state.refresh()
        if not bool(state.loss() < loss):  # only where rounding decides
            state.kept = before
            state.refresh()
            return False
        self.count("swaps", made)
        return True

    def _exchange(self, state: Refit, size: int) -> None:
        """Remove the cheapest units one by one, then add as many that gain most, in place."""
        remove_cheapest(state, size, torch.zeros(state.blocks.number, dtype=torch.bool, device=state.kept.device))
        state.kept = torch.cat((state.kept, state.most_gaining(state.missing(), size)))
        state.refresh()


def _parts(state: Refit, units: Tensor) -> Sequence[Tensor]:
    """Return units in parts for which the arrays of pairs with the kept ones are not too large."""
    columns = len(state.inverse) * state.blocks.width
    return torch.split(units, max(1, _ENTRIES // max(1, columns)))
