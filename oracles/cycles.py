"""Square 0/1 matrices of least cost by exchanges along cycles, exact whatever the scales of the costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.exact import integers, summable

__all__ = ["cheapest_by_cycles"]


def cheapest_by_cycles(cost: Tensor, keep: int, level: Tensor | None) -> Tensor:
    """Return, tile by tile, the 0/1 matrix of least cost with `keep` ones in every row and column.

    A start by greedy choice is improved until no cyclic exchange of ones improves it (Ahuja, Magnanti, Orlin, Network
    Flows, section 9.6: cancelling negative cycles is exact). Columns are contracted: moving a one from row a to row b
    costs the least of c_bp - c_ap over columns p in which a has a one and b has none, and Bellman and Ford look for a
    negative cycle among the n rows of all tiles at once.

    Parameters
    ----------
    cost : Tensor
        Finite, float64, shape (tiles, n, n).
    keep : int
    level : Tensor, optional
        Small integers as float64: of all matrices those of least level count, and of these the cheapest is returned.
        Larger ones than 1 and -1 are those of fixed entries, all of one size.
        Which matrices these are follows from the levels' optimal potentials, so that costs are never added to levels.
    """
    if level is None:
        chosen = _mended(_greedy(cost, keep), cost, keep)
        return _without_cycles(chosen, cost, None, None)
    chosen = _mended(_greedy(cost, keep, level), level, keep)
    if bool((level.abs() == 1.0).any()):
        chosen = _without_cycles(chosen, level, None, None)
        stay, away = _decided(chosen, level)
    else:  # nothing but fixed entries: what is decided is known, and mostly reached already
        stay, away = level < 0, level > 0
        wrong = ((chosen & away) | (~chosen & stay)).flatten(1).any(1).nonzero().flatten()
        chosen[wrong] = _without_cycles(chosen[wrong], level[wrong], None, None)
    return _without_cycles(chosen, torch.where(stay | away, 0.0, cost), stay, away)


def _greedy(cost: Tensor, keep: int, level: Tensor | None = None) -> Tensor:
    """Take the cheapest entries, those of lower levels first, for which row and column have room."""
    tiles, size, _ = cost.shape
    order = cost.flatten(1).argsort(dim=1, stable=True)
    if level is not None:
        order = order.gather(1, level.flatten(1).gather(1, order).argsort(dim=1, stable=True))
    room = torch.full((2, tiles, size), keep, device=cost.device)
    chosen = torch.zeros((tiles, size * size), dtype=torch.bool, device=cost.device)
    every = torch.arange(tiles, device=cost.device)
    for entry in order.T.contiguous():
        row, column = entry // size, entry % size
        take = (room[0, every, row] > 0) & (room[1, every, column] > 0)
        chosen[every, entry] = take
        room[0, every, row] -= take.long()
        room[1, every, column] -= take.long()
    return chosen.view_as(cost)


def _mended(chosen: Tensor, cost: Tensor, keep: int) -> Tensor:
    """Fill rows and columns that are short in a choice to which no entry can be added.

    Row i and column j are short, so (i, j) is taken; then some taken (a, b) has (i, b) and (a, j) free, and the
    cheapest such exchange is made. It leaves everything else as full as it was.
    """
    size = cost.shape[1]
    short = (chosen.sum(2) < keep).any(1).nonzero().flatten()
    while len(short):
        mask, price, every = chosen[short], cost[short], torch.arange(len(short), device=cost.device)
        row, column = mask.sum(2).argmin(1), mask.sum(1).argmin(1)
        into = torch.where(mask, torch.inf, price)
        change = into[every, row].unsqueeze(1) + into[every, :, column].unsqueeze(2)
        change += torch.where(mask, -price, torch.inf)
        best = change.flatten(1).argmin(1)
        a, b = best // size, best % size
        chosen[short, a, b] = False
        chosen[short, row, b] = True
        chosen[short, a, column] = True
        short = short[(chosen[short].sum(2) < keep).any(1)]
    return chosen


def _ends(mask: Tensor, price: Tensor, stay: Tensor | None, away: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what it costs to take a one away and to put one, infinite where that is not possible."""
    free_to_leave = mask if stay is None else mask & ~stay
    closed = mask if away is None else mask | away
    return torch.where(free_to_leave, -price, torch.inf), torch.where(closed, torch.inf, price)


def _without_cycles(chosen: Tensor, cost: Tensor, stay: Tensor | None, away: Tensor | None) -> Tensor:
    """Improve matrices by cyclic exchanges, entries of `stay` and `away` apart, until they are optimal."""
    size = cost.shape[1]
    sure = summable(cost.flatten(1))
    # Above what rounding makes of a cycle of zero length; what is below is left to exact arithmetic.
    margin = 4 * size**2 * torch.finfo(cost.dtype).eps * cost.abs().amax((1, 2))
    margin = torch.where(sure, 0.0, margin).unsqueeze(1)
    active = torch.arange(len(cost), device=cost.device)
    while len(active):
        fixed = (None if one is None else one[active] for one in (stay, away))
        leave, enter = _ends(chosen[active], cost[active], *fixed)
        move, column = (leave.unsqueeze(2) + enter.unsqueeze(1)).min(3)  # from row a to row b
        distance = torch.zeros_like(move[:, 0])
        before = torch.zeros_like(distance, dtype=torch.int64)
        for _ in range(size):
            through, row = (distance.unsqueeze(2) + move).min(1)
            nearer = through < distance - margin[active]
            distance = torch.where(nearer, through, distance)
            before = torch.where(nearer, row, before)
        cyclic = nearer.any(1)
        active, before, column = active[cyclic], before[cyclic], column[cyclic]
        every = torch.arange(len(active), device=cost.device)
        node = nearer[cyclic].to(torch.uint8).argmax(1)
        for _ in range(size):
            node = before[every, node]  # now on the cycle
        start, open_ = node, torch.ones_like(node, dtype=torch.bool)
        mask = chosen[active]
        for _ in range(size):
            source = before[every, node]
            place = column[every, source, node]
            mask[every, source, place] &= ~open_
            mask[every, node, place] |= open_
            node = torch.where(open_, source, node)
            open_ &= node != start
        chosen[active] = mask
    for tile in _undecided(chosen, cost, stay, away, (~sure).nonzero().flatten()).tolist():
        fixed = (None if one is None else one[tile] for one in (stay, away))
        chosen[tile] = _exactly(chosen[tile], cost[tile], *fixed)
    return chosen


def _undecided(chosen: Tensor, cost: Tensor, stay: Tensor | None, away: Tensor | None, index: Tensor) -> Tensor:
    """Return which of some tiles may hold a negative cycle that rounding hides.

    With every sum rounded down, distances that do not fall any more are potentials that prove there is none.
    """
    if not len(index):
        return index
    fixed = (None if one is None else one[index] for one in (stay, away))
    leave, enter = (
        end.sub_(end.abs() * 2.0**-50).nan_to_num_(torch.inf) for end in _ends(chosen[index], cost[index], *fixed)
    )
    move = (leave.unsqueeze(2) + enter.unsqueeze(1)).amin(3)
    distance = torch.zeros_like(move[:, 0])
    for _ in range(cost.shape[1]):
        through = (distance.unsqueeze(2) + move).amin(1)
        through = torch.where(through.isinf(), through, through - through.abs() * 2.0**-51)
        nearer = through < distance
        distance = torch.minimum(distance, through)
    return index[nearer.any(1)]


def _decided(chosen: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries every matrix of least level keeps, and which it prunes, given one such matrix.

    Potentials of rows and columns leave each entry a reduced level; where that is not zero the entry is the same in all
    of them (complementary slackness), and every matrix that agrees with these entries is one of them.
    """
    leave, enter = _ends(chosen, level, None, None)
    move = (leave.unsqueeze(2) + enter.unsqueeze(1)).amin(3)
    distance = torch.zeros_like(move[:, 0])
    for _ in range(level.shape[1]):
        distance = torch.minimum(distance, (distance.unsqueeze(2) + move).amin(1))
    reduced = level - distance.unsqueeze(2)
    reduced = reduced - torch.where(chosen, reduced, -torch.inf).amax(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    return chosen & (reduced < 0), ~chosen & (reduced > 0)


def _exactly(chosen: Tensor, cost: Tensor, stay: Tensor | None, away: Tensor | None) -> Tensor:
    """Improve one matrix by cyclic exchanges in whole numbers, until it is optimal."""
    size = len(cost)
    price, _ = integers(cost.cpu().numpy())
    mask = chosen.cpu().numpy().copy()
    leaves, enters = np.ones_like(mask), np.ones_like(mask)
    if stay is not None:
        leaves &= ~stay.cpu().numpy()
    if away is not None:
        enters &= ~away.cpu().numpy()
    never = 8 * size * (1 + max(abs(number) for number in price.flat))
    while True:
        leave = np.where(mask & leaves, -price, never)
        enter = np.where(~mask & enters, price, never)
        through = leave[:, None, :] + enter[None, :, :]
        column = through.argmin(2)
        move = np.take_along_axis(through, column[..., None], 2)[..., 0]
        distance = np.array([0] * size, dtype=object)
        before = np.zeros(size, dtype=np.int64)
        for _ in range(size):
            reached = distance[:, None] + move
            row = reached.argmin(0)
            best = reached[row, np.arange(size)]
            nearer = (best < distance).astype(bool)
            distance, before = np.where(nearer, best, distance), np.where(nearer, row, before)
        if not nearer.any():
            return torch.from_numpy(mask).to(chosen.device)
        node = int(nearer.argmax())
        for _ in range(size):
            node = int(before[node])
        start = node
        while True:
            source = int(before[node])
            place = int(column[source, node])
            mask[source, place], mask[node, place] = False, True
            node = source
            if node == start:
                break
