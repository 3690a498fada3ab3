"""Greedy removal of units, one after the other, each time the one whose removal costs least after the refit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.problems.refit import Refit, traces

__all__ = ["remove_cheapest", "remove_units"]

_DELAY = 64  # columns whose removal is applied to the whole inverse at once


def remove_cheapest(state: Refit, number: int, must: Tensor, stops: Callable[[int], bool] | None = None) -> None:
    """Remove units from the kept ones, in place, each time the one whose removal costs least.

    The changes that removals make to the inverse are collected and applied as one product for every 64 columns; until
    then only what the next choice needs is kept up to date. A removal costs O(rows * columns), and the products
    O(columns^2) for each removal at the speed of large products.

    Parameters
    ----------
    state : Refit
    number : int
        How many to remove; there are as many that may be.
    must : Tensor
        Units that stay, boolean, shape (units,).
    stops : callable, optional
        Called with the number removed so far; once it returns True the rest is removed at once by the present costs.
    """
    done = 0
    while done < number:
        batch = min(number - done, max(1, _DELAY // state.blocks.width))
        if stops is not None and stops(done):
            costs = state.removal_costs().masked_fill(must[state.kept], torch.inf)
            remove_units(state, torch.argsort(costs, stable=True)[: number - done])
            return
        _Eliminations(state, must).run(batch)
        done += batch


def remove_units(state: Refit, places: Tensor) -> None:
    """Remove some kept units at once, in place, by a downdate of their rank.

    Parameters
    ----------
    state : Refit
    places : Tensor
        Of the units in `state.kept`, int64, shape (number,).
    """
    width = state.blocks.width
    leaves = torch.zeros(len(state.kept), dtype=torch.bool, device=places.device).index_fill_(0, places, True)
    gone, stay = ((flags.repeat_interleave(width).nonzero().flatten()) for flags in (leaves, ~leaves))
    own = torch.linalg.cholesky(state.inverse[gone.unsqueeze(1), gone])
    half = torch.linalg.solve_triangular(own, state.inverse[gone.unsqueeze(1), stay], upper=False)
    lost = torch.linalg.solve_triangular(own, state.weight[:, gone].T, upper=False)
    state.weight = state.weight[:, stay].addmm_(lost.T, half, alpha=-1.0)
    state.inverse = state.inverse[stay.unsqueeze(1), stay].addmm_(half.T, half, alpha=-1.0)
    state.kept = state.kept[~leaves]


class _Eliminations:
    """Some removals from the inverse P and the weights V as they were: P - U U^T and V - Q U^T."""

    def __init__(self, state: Refit, must: Tensor) -> None:
        self.state, self.width = state, state.blocks.width
        self.stays = must[state.kept]
        self.own, self.forms = state.diagonal_blocks()
        self.left: Tensor = state.inverse.new_empty((len(state.inverse), 0))
        self.lost: Tensor = state.inverse.new_empty((len(state.weight), 0))

    def run(self, number: int) -> None:
        """Remove that many units."""
        alive = torch.ones(len(self.state.kept), dtype=torch.bool, device=self.stays.device)
        left = self.state.inverse.new_empty((len(self.state.inverse), number * self.width))
        lost = self.state.inverse.new_empty((len(self.state.weight), number * self.width))
        for step in range(number):
            self.left, self.lost = left[:, : step * self.width], lost[:, : step * self.width]
            costs = traces(self.own, self.forms).masked_fill_(self.stays | ~alive, torch.inf)
            place = int(costs.argmin())
            some = slice(step * self.width, (step + 1) * self.width)
            left[:, some], lost[:, some] = self._without(place)
            alive[place] = False
        self._apply(alive, left, lost)

    def _without(self, place: int) -> tuple[Tensor, Tensor]:
        """Return the new columns of U and Q, and bring the diagonal blocks up to date."""
        state, width = self.state, self.width
        mine = slice(place * width, (place + 1) * width)
        column = state.inverse[:, mine] - self.left @ self.left[mine].T
        weight = state.weight[:, mine] - self.lost @ self.left[mine].T
        factor, _ = torch.linalg.cholesky_ex(column[mine])
        half = torch.linalg.solve_triangular(factor, column.T, upper=False).T
        gone = torch.linalg.solve_triangular(factor, weight.T, upper=False).T
        mixed = state.weight.T @ gone - self.left @ (self.lost.T @ gone)
        ours, theirs = half.view(-1, width, width), mixed.view(-1, width, width)
        if width == 1:
            self.own -= ours.square()
            self.forms += ours * (ours * gone.square().sum() - 2.0 * theirs)
        else:
            cross = theirs @ ours.mT
            self.own -= ours @ ours.mT
            self.forms += ours @ (gone.T @ gone) @ ours.mT - cross - cross.mT
        return half, gone

    def _apply(self, alive: Tensor, left: Tensor, lost: Tensor) -> None:
        state = self.state
        stay = alive.repeat_interleave(self.width).nonzero().flatten()
        state.inverse = state.inverse[stay.unsqueeze(1), stay].addmm_(left[stay], left[stay].T, alpha=-1.0)
        state.weight = state.weight[:, stay].addmm_(lost, left[stay].T, alpha=-1.0)
        state.kept = state.kept[alive]
