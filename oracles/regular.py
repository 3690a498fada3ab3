"""Square 0/1 matrices with one number of ones in every row and column: the cheapest, all of them, and how many."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["cheapest_regular", "count_regular", "every_regular", "regular_table"]

_TABLE = 128  # so many matrices are listed and compared at once
_BLOCK = 2**22  # entries of a temporary


def cheapest_regular(cost: Tensor, keep: int) -> Tensor:
    """Return, tile by tile, the 0/1 matrix of least cost with `keep` ones in every row and column.

    Parameters
    ----------
    cost : Tensor
        Finite, float64, shape (tiles, n, n).
    keep : int
        At most n.

    Returns
    -------
    Tensor
        Boolean, shape (tiles, n, n). Where few matrices exist, the one whose ones come first is chosen among equals;
        elsewhere the choice among equals is fixed but has no such rule.

    Notes
    -----
    Few matrices are compared in one product. Else a start by greedy choice is improved until no cyclic exchange of
    ones improves it (Ahuja, Magnanti, Orlin, Network Flows, section 9.6: cancelling negative cycles is exact).
    Columns are contracted: moving a one from row a to row b costs the least of c_bp - c_ap over columns p in which a
    has a one and b has none, and Bellman and Ford look for a negative cycle among the n rows of all tiles at once.
    """
    tiles, size, _ = cost.shape
    table = regular_table(size, keep)
    chosen = torch.empty(cost.shape, dtype=torch.bool, device=cost.device)
    step = max(1, _BLOCK // (size**3 if table is None else len(table)))
    for start in range(0, tiles, step):
        part = cost[start : start + step]
        if table is None:
            chosen[start : start + step] = _without_cycles(_greedy(part, keep), part)
        else:
            listed = table.to(cost.device)
            best = (part.flatten(1) @ listed.T).argmin(1)
            chosen[start : start + step] = listed[best].view_as(part).bool()
    return chosen


def _greedy(cost: Tensor, keep: int) -> Tensor:
    """Return a matrix for each tile: the cheapest entries for which row and column have room, then mended."""
    tiles, size, _ = cost.shape
    order = cost.flatten(1).argsort(dim=1, stable=True).T.contiguous()
    room = torch.full((2, tiles, size), keep, device=cost.device)
    chosen = torch.zeros((tiles, size * size), dtype=torch.bool, device=cost.device)
    every = torch.arange(tiles, device=cost.device)
    for entry in order:
        row, column = entry // size, entry % size
        take = (room[0, every, row] > 0) & (room[1, every, column] > 0)
        chosen[every, entry] = take
        room[0, every, row] -= take.long()
        room[1, every, column] -= take.long()
    return _mended(chosen.view_as(cost), cost, keep)


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


def _without_cycles(chosen: Tensor, cost: Tensor) -> Tensor:
    """Improve matrices by cyclic exchanges until none improves: then they are optimal."""
    size = cost.shape[1]
    # Above what rounding makes of a cycle of zero length.
    margin = 4 * size**2 * torch.finfo(cost.dtype).eps * cost.abs().amax((1, 2)).unsqueeze(1)
    active = torch.arange(len(cost), device=cost.device)
    while len(active):
        mask, price = chosen[active], cost[active]
        leave, enter = torch.where(mask, -price, torch.inf), torch.where(mask, torch.inf, price)
        move, column = (leave.unsqueeze(2) + enter.unsqueeze(1)).min(3)  # from row a to row b
        distance = torch.zeros_like(price[:, 0])
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
    return chosen


def every_regular(
    size: int, keep: int, kept: tuple[int, ...] = (), pruned: tuple[int, ...] = ()
) -> Iterator[tuple[int, ...]]:
    """Yield the flat indices of the ones of every matrix, in lexicographic order, that keeps and prunes some."""
    must, never = set(kept), set(pruned)
    free = [[row * size + column for column in range(size) if row * size + column not in never] for row in range(size)]

    def below(row: int, room: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if row == size:
            yield ()
            return
        needed = must.intersection(range(row * size, (row + 1) * size))
        for ones in itertools.combinations([entry for entry in free[row] if room[entry % size]], keep):
            if needed <= set(ones):
                left = list(room)
                for entry in ones:
                    left[entry % size] -= 1
                if max(left) < size - row:
                    for others in below(row + 1, tuple(left)):
                        yield ones + others

    return below(0, (keep,) * size)


@functools.cache
def count_regular(size: int, keep: int) -> int:
    """Return how many matrices there are (OEIS A008300)."""

    @functools.cache
    def directions(rows: int, room: tuple[int, ...]) -> int:
        """Count fillings of the last rows if room[r] columns still need r ones."""
        if rows == 0:
            return 1
        total = 0
        for taken in itertools.product(*(range(min(number, keep) + 1) for number in room[1:])):
            if sum(taken) != keep:
                continue
            # Columns that need r ones: those of before, less those that took one, and those that come from r + 1.
            left = [old - gone + come for old, gone, come in zip(room, (0, *taken), (*taken, 0), strict=True)]
            if all(number == 0 for need, number in enumerate(left) if need > rows - 1):
                total += math.prod(map(math.comb, room[1:], taken)) * directions(rows - 1, tuple(left))
        return total

    return directions(size, (0,) * keep + (size,)) if keep else 1


@functools.cache
def regular_table(size: int, keep: int) -> Tensor | None:
    """Return all matrices, float64, shape (number, size^2), in lexicographic order; None if they are many."""
    if size > 8 or count_regular(size, keep) > _TABLE:
        return None
    listed = list(every_regular(size, keep))
    table = torch.zeros((len(listed), size * size), dtype=torch.float64)
    for row, ones in enumerate(listed):
        table[row, list(ones)] = 1.0
    return table
