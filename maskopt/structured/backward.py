"""Greedy removal of units, one after the other, each time the one whose removal costs least after the refit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.problems.refit import Refit, traces

__all__ = ["remove_cheapest", "remove_units", "without"]

_BATCH = (64, 128)  # columns that are removed from the whole inverse at once, at least and at most
_PART = 1 / 32  # of the kept columns, that many in between
_CHOICE = 384  # columns among which they are chosen


def remove_cheapest(state: Refit, number: int, must: Tensor, stops: Callable[[int], bool] | None = None) -> None:
    """Remove units from the kept ones, in place, each time the one whose removal costs least.

    Costs of removing some of a few units depend only on the block of the inverse and of V^T V that belongs to those
    few. So batches of 64 to 128 columns are chosen among the 384 cheapest at the time, one by one with exact costs
    after every removal, and then leave the whole inverse by one product. A removal costs O(columns^2) at the speed of
    large products. Where there are no more columns than that, all of them are candidates at every step.

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
        order = state.cheapest(must)
        if stops is not None and stops(done):
            remove_units(state, order[: number - done])
            return
        width, columns = state.blocks.width, min(max(_BATCH[0], round(_PART * len(state.inverse))), _BATCH[1])
        batch = min(number - done, max(1, columns // width))
        free = order[: min(max(batch, _CHOICE // width), int((~must[state.kept]).sum()))]
        remove_units(state, free[_in_turn(state, free, batch)])
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
    state.inverse = state.inverse[stay].index_select(1, stay).addmm_(half.T, half, alpha=-1.0)
    state.kept = state.kept[~leaves]


def without(units: Tensor, places: Tensor) -> Tensor:
    """Return units, shape (k,), without those at some places."""
    return units[torch.ones_like(units, dtype=torch.bool).index_fill_(0, places, False)]


def _in_turn(state: Refit, places: Tensor, number: int) -> Tensor:
    """Return which of some kept units to remove, the cheapest after each removal, as indices of `places`.

    Parameters
    ----------
    places : Tensor
        Of the units in `state.kept`, shape (c,), of which any may go.
    number : int
        How many, at most c.
    """
    width = state.blocks.width
    columns = state.blocks.columns(places)
    inverse = state.inverse[columns.unsqueeze(1), columns]
    weight = state.weight[:, columns]
    form = weight.T @ weight
    every = torch.arange(len(places), device=places.device)
    gone = torch.zeros(len(places), dtype=torch.bool, device=places.device)
    chosen = []
    for _ in range(number):
        own, forms = (each.view(len(places), width, len(places), width)[every, :, every] for each in (inverse, form))
        place = int(traces(own, forms).masked_fill_(gone, torch.inf).argmin())
        mine = slice(place * width, (place + 1) * width)
        # P - H H^T and V - (V_u L^-T) H^T, with P_uu = L L^T and H = P_u L^-T.
        factor, _ = torch.linalg.cholesky_ex(inverse[mine, mine])
        half = torch.linalg.solve_triangular(factor, inverse[mine], upper=False)
        mixed = torch.linalg.solve_triangular(factor, form[mine], upper=False)
        inner = torch.linalg.solve_triangular(factor, mixed[:, mine].T, upper=False)
        mixed = mixed - 0.5 * (inner.T @ half)
        inverse.addmm_(half.T, half, alpha=-1.0)
        form.addmm_(mixed.T, half, alpha=-1.0).addmm_(half.T, mixed, alpha=-1.0)
        gone[place] = True
        chosen.append(place)
    return torch.tensor(chosen, dtype=torch.int64, device=places.device)
