"""Square 0/1 matrices with one number of ones in every row and column: the cheapest, all of them, and how many."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from maskopt.exact import summable
from maskopt.oracles.cycles import cheapest_by_cycles

__all__ = ["cheapest_regular", "count_regular", "every_regular", "regular_table"]

_TABLE = 128  # so many matrices are listed and compared at once
_BLOCK = 2**22  # entries of a temporary


def cheapest_regular(cost: Tensor, keep: int, kept: Tensor | None = None, pruned: Tensor | None = None) -> Tensor:
    """Return, tile by tile, the 0/1 matrix of least cost with `keep` ones in every row and column.

    Parameters
    ----------
    cost : Tensor
        Float64, without NaN, shape (tiles, n, n). Where entries are infinite the matrix holds as few infinite and as
        many minus-infinite ones as possible, net of each other, and is cheapest among those.
    keep : int
        At most n.
    kept, pruned : Tensor, optional
        Entries that have to be ones and zeros, boolean; where no matrix has them so, as many as possible are.

    Returns
    -------
    Tensor
        Boolean, shape (tiles, n, n). Where few matrices exist, the one whose ones come first is chosen among equals;
        elsewhere the choice among equals is fixed but has no such rule.

    Notes
    -----
    Few matrices are compared in one product, others are improved by exchanges (`cheapest_by_cycles`). Either is exact:
    where rounding might decide, the sums are compared digit by digit or in whole numbers.
    """
    cost, level = _leveled(cost, kept, pruned)
    tiles, size, _ = cost.shape
    table = regular_table(size, keep)
    chosen = torch.empty(cost.shape, dtype=torch.bool, device=cost.device)
    step = max(1, _BLOCK // (size**3 if table is None else len(table)))
    for start in range(0, tiles, step):
        part = slice(start, start + step)
        ranks = None if level is None else level[part]
        if table is None:
            chosen[part] = cheapest_by_cycles(cost[part], keep, ranks)
        else:
            listed = table.to(cost.device)
            best = _first_of(listed, cost[part].flatten(1), None if ranks is None else ranks.flatten(1))
            chosen[part] = listed[best].view(-1, size, size).bool()
    return chosen


def _leveled(cost: Tensor, kept: Tensor | None, pruned: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return finite costs, zero for fixed entries, and the levels of entries: whole numbers that go before costs."""
    infinite = cost.isinf()
    level: Tensor | None = None
    if bool(infinite.any()):
        level = cost.sign().masked_fill(~infinite, 0.0)
        cost = cost.masked_fill(infinite, 0.0)
    weight = 2.0 * cost.shape[1] ** 2 + 1.0
    for fixed, sign in ((kept, -1.0), (pruned, 1.0)):
        if fixed is not None:
            level = torch.zeros_like(cost) if level is None else level
            level = level.masked_fill(fixed, sign * weight)
            cost = cost.masked_fill(fixed, 0.0)
    largest = cost.abs().amax((1, 2), keepdim=True)
    if bool((largest > 2.0**900).any()):  # sums must not overflow
        cost = torch.where(largest > 2.0**900, cost * 2.0**-140, cost)
    return cost, level


def _first_of(table: Tensor, cost: Tensor, level: Tensor | None) -> Tensor:
    """Return the first of the cheapest matrices for each tile, shape (tiles,)."""
    sums = cost @ table.T
    if level is not None:
        ranks = level.float() @ table.float().T  # small whole numbers
        sums.masked_fill_(ranks > ranks.amin(1, keepdim=True), torch.inf)
    minimum, best = sums.min(1)
    rough = (~summable(cost)).nonzero().flatten()
    if len(rough):
        # Rounding of a sum, twice, at most.
        noise = cost.shape[1] * 2.0**-51 * cost[rough].abs().sum(1)
        near = sums[rough] <= (minimum[rough] + noise).unsqueeze(1)
        several = near.sum(1) > 1
        rough, near = rough[several], near[several]
        if len(rough):
            best[rough] = _by_digits(table, cost[rough], near)
    return best


def _by_digits(table: Tensor, cost: Tensor, near: Tensor) -> Tensor:
    """Return the first of the cheapest among the matrices marked in `near`, (tiles, matrices), without any rounding.

    Costs are read 40 binary digits at a time, whose sums are whole numbers that float64 holds exactly. Differences are
    carried on to the next digits; matrices that the remaining digits cannot bring back leave.
    """
    alive, carried = near.clone(), torch.zeros_like(near, dtype=torch.float64)
    exponent = torch.frexp(cost.abs().amax(1, keepdim=True)).exponent
    rest = torch.ldexp(cost, 40 - exponent)
    while True:
        digits = rest.round()
        rest = torch.ldexp(rest - digits, torch.full_like(exponent, 40))
        total = (carried + digits @ table.T).masked_fill(~alive, torch.inf)
        above = total - total.amin(1, keepdim=True)
        alive &= above <= cost.shape[1]
        if not bool(rest.any()) or bool((alive.sum(1) == 1).all()):
            return above.masked_fill(~alive, torch.inf).argmin(1)
        carried = torch.where(alive, above, 0.0) * 2.0**40


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
