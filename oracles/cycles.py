"""Square 0/1 matrices of minimal cost by cycle cancelling, exact whatever the scales of the costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.exact import integers, summable

__all__ = ["cheapest_by_cycles"]


def cheapest_by_cycles(cost: Tensor, keep: int, level: Tensor | None) -> Tensor:
    """Return, tile by tile, the 0/1 matrix of minimal cost with `keep` ones in every row and column.

    The problem is a transportation problem with capacities one, that is, a minimum-cost flow. A greedy start is
    improved by cancelling negative cycles, which ends at an optimum (Ahuja, Magnanti and Orlin, Network Flows, 1993,
    section 9.6). Columns are contracted: the arc from row a to row b, which takes a one from row a and puts it into row
    b, has the length min_p (c_bp - c_ap) over the columns p in which a has a one and b has none. The Bellman-Ford
    algorithm searches the n rows of all tiles at once for a negative cycle.

    Parameters
    ----------
    cost : Tensor
        Finite, float64, shape (tiles, n, n).
    keep : int
        At most n.
    level : Tensor, optional
        Small integers as float64, shape (tiles, n, n), minimised first: the cheapest among the matrices of minimal
        total level is returned. Levels other than -1, 0 and 1 are those of fixed entries, all of one size. The optimal
        potentials of the levels describe these matrices, so that costs are never added to levels.

    Returns
    -------
    Tensor
        Boolean, shape (tiles, n, n).
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
    """Take entries in the order of levels, then costs, while their row and column have open slots."""
    tiles, size, _ = cost.shape
    order = cost.flatten(1).argsort(dim=1, stable=True)
    if level is not None:
        order = order.gather(1, level.flatten(1).gather(1, order).argsort(dim=1, stable=True))
    slots = torch.full((2, tiles, size), keep, device=cost.device)
    chosen = torch.zeros((tiles, size * size), dtype=torch.bool, device=cost.device)
    every = torch.arange(tiles, device=cost.device)
    for entry in order.T.contiguous():
        row, column = entry // size, entry % size
        take = (slots[0, every, row] > 0) & (slots[1, every, column] > 0)
        chosen[every, entry] = take
        slots[0, every, row] -= take.long()
        slots[1, every, column] -= take.long()
    return chosen.view_as(cost)


def _mended(chosen: Tensor, cost: Tensor, keep: int) -> Tensor:
    """Complete a greedy choice, in which some rows and columns have fewer than `keep` ones.

    If row i and column j have too few, (i, j) is already taken. Then some taken entry (a, b) has (i, b) and (a, j)
    free; the cheapest such exchange adds a one to row i and to column j and leaves all other sums as they are.
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
    """Return the cost of removing a one and of adding one at each entry, infinite where that is not possible."""
    free_to_leave = mask if stay is None else mask & ~stay
    closed = mask if away is None else mask | away
    return torch.where(free_to_leave, -price, torch.inf), torch.where(closed, torch.inf, price)


def _without_cycles(chosen: Tensor, cost: Tensor, stay: Tensor | None, away: Tensor | None) -> Tensor:
    """Cancel negative cycles until matrices are optimal; entries of `stay` and `away` are fixed."""
    size = cost.shape[1]
    sure = summable(cost.flatten(1))
    # More than rounding can make of a cycle of length zero; shorter cycles are left to exact arithmetic.
    margin = 4 * size**2 * torch.finfo(cost.dtype).eps * cost.abs().amax((1, 2))
    margin = torch.where(sure, 0.0, margin).unsqueeze(1)
    active = torch.arange(len(cost), device=cost.device)
    while len(active):
        fixed = (None if one is None else one[active] for one in (stay, away))
        leave, enter = _ends(chosen[active], cost[active], *fixed)
        length, column = (leave.unsqueeze(2) + enter.unsqueeze(1)).min(3)  # of the arc from row a to row b
        distance = torch.zeros_like(length[:, 0])
        before = torch.zeros_like(distance, dtype=torch.int64)
        for _ in range(size):
            through, row = (distance.unsqueeze(2) + length).min(1)
            nearer = through < distance - margin[active]
            distance = torch.where(nearer, through, distance)
            before = torch.where(nearer, row, before)
        cyclic = nearer.any(1)
        active, before, column = active[cyclic], before[cyclic], column[cyclic]
        every = torch.arange(len(active), device=cost.device)
        node = nearer[cyclic].to(torch.uint8).argmax(1)
        for _ in range(size):
            node = before[every, node]  # ends on the cycle
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
    """Return those tiles of `index` that may have a negative cycle that rounding hides.

    Every sum is rounded down. Distances that no longer fall are then potentials, which prove that there is none.
    """
    if not len(index):
        return index
    fixed = (None if one is None else one[index] for one in (stay, away))
    leave, enter = (
        end.sub_(end.abs() * 2.0**-50).nan_to_num_(torch.inf) for end in _ends(chosen[index], cost[index], *fixed)
    )
    length = (leave.unsqueeze(2) + enter.unsqueeze(1)).amin(3)
    distance = torch.zeros_like(length[:, 0])
    for _ in range(cost.shape[1]):
        through = (distance.unsqueeze(2) + length).amin(1)
        through = torch.where(through.isinf(), through, through - through.abs() * 2.0**-51)
        nearer = through < distance
        distance = torch.minimum(distance, through)
    return index[nearer.any(1)]


def _decided(chosen: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that are one, and those that are zero, in all matrices of minimal level, given one of them.

    Optimal potentials of rows and columns give each entry a reduced level. By complementary slackness an entry whose
    reduced level is not zero has the same value in all these matrices, and every matrix with these values is one.
    """
    leave, enter = _ends(chosen, level, None, None)
    length = (leave.unsqueeze(2) + enter.unsqueeze(1)).amin(3)
    distance = torch.zeros_like(length[:, 0])
    for _ in range(level.shape[1]):
        distance = torch.minimum(distance, (distance.unsqueeze(2) + length).amin(1))
    reduced = level - distance.unsqueeze(2)
    reduced = reduced - torch.where(chosen, reduced, -torch.inf).amax(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    return chosen & (reduced < 0), ~chosen & (reduced > 0)


def _exactly(chosen: Tensor, cost: Tensor, stay: Tensor | None, away: Tensor | None) -> Tensor:
    """Cancel negative cycles of one matrix in integer arithmetic, until it is optimal."""
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
        length = np.take_along_axis(through, column[..., None], 2)[..., 0]
        distance = np.array([0] * size, dtype=object)
        before = np.zeros(size, dtype=np.int64)
        for _ in range(size):
            reached = distance[:, None] + length
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
