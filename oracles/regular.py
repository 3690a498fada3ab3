"""Square 0/1 matrices with the same number of ones in every row and column: the cheapest, all, and their number."""

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

_TABLE = 128  # matrices up to which all are listed and compared
_BLOCK = 2**22  # entries of a temporary


def cheapest_regular(cost: Tensor, keep: int, kept: Tensor | None = None, pruned: Tensor | None = None) -> Tensor:
    """Return, tile by tile, the 0/1 matrix of minimal cost with `keep` ones in every row and column.

    Parameters
    ----------
    cost : Tensor
        Float64, without NaN, shape (tiles, n, n). Where entries are infinite the matrix holds as few infinite and as
        many minus-infinite ones as possible, net of each other, and is cheapest among those.
    keep : int
        At most n.
    kept, pruned : Tensor, optional
        Entries that have to be ones and zeros, boolean, shape (tiles, n, n); where no matrix has all of them, as many
        as possible are.

    Returns
    -------
    Tensor
        Boolean, shape (tiles, n, n). Where at most 128 matrices exist, the one whose ones come first is chosen among
        equal ones; otherwise the choice is deterministic but follows no such rule.

    Notes
    -----
    This is a transportation problem. Up to 128 matrices are compared in one matrix product; otherwise it is solved as a
    minimum-cost flow (`cheapest_by_cycles`). Both are exact: where rounding might decide, sums are compared digit by
    digit or as integers.
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
    """Return finite costs, zero for fixed entries, and the levels of entries: integers minimised before the costs."""
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
        # At most twice the rounding error of a sum.
        noise = cost.shape[1] * 2.0**-51 * cost[rough].abs().sum(1)
        near = sums[rough] <= (minimum[rough] + noise).unsqueeze(1)
        several = near.sum(1) > 1
        rough, near = rough[several], near[several]
        if len(rough):
            best[rough] = _by_digits(table, cost[rough], near)
    return best


def _by_digits(table: Tensor, cost: Tensor, near: Tensor) -> Tensor:
    """Return the first of the cheapest among the matrices marked in `near`, (tiles, matrices), without any rounding.

    Costs are read 40 binary digits at a time; sums of such digits are integers that float64 represents exactly.
    Differences are carried to the next digits, and matrices that can no longer become the cheapest are dropped.
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
    """Yield every matrix with some fixed entries, in lexicographic order.

    Parameters
    ----------
    size, keep : int
        Side of the matrices, and ones in each row and column.
    kept, pruned : tuple of int
        Flat indices of entries that are one, or zero.

    Yields
    ------
    tuple of int
        Flat indices of the ones, ascending.

    Examples
    --------
    >>> list(every_regular(2, 1))
    [(0, 3), (1, 2)]
    """
    must, never = set(kept), set(pruned)
    free = [[row * size + column for column in range(size) if row * size + column not in never] for row in range(size)]

    def below(row: int, open_: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if row == size:
            yield ()
            return
        needed = must.intersection(range(row * size, (row + 1) * size))
        for ones in itertools.combinations([entry for entry in free[row] if open_[entry % size]], keep):
            if needed <= set(ones):
                left = list(open_)
                for entry in ones:
                    left[entry % size] -= 1
                if max(left) < size - row:
                    for others in below(row + 1, tuple(left)):
                        yield ones + others

    return below(0, (keep,) * size)


@functools.cache
def count_regular(size: int, keep: int) -> int:
    """Return the number of matrices (OEIS A008300).

    Parameters
    ----------
    size, keep : int
        Side of the matrices, and ones in each row and column.

    Examples
    --------
    >>> count_regular(4, 2), count_regular(8, 4)
    (90, 116963796250)
    """

    @functools.cache
    def fillings(rows: int, open_: tuple[int, ...]) -> int:
        """Count the fillings of the last rows if open_[r] columns still need r ones."""
        if rows == 0:
            return 1
        total = 0
        for taken in itertools.product(*(range(min(number, keep) + 1) for number in open_[1:])):
            if sum(taken) != keep:
                continue
            # Columns that now need r ones: those that did and took none, and those that needed r + 1 and took one.
            left = [old - gone + come for old, gone, come in zip(open_, (0, *taken), (*taken, 0), strict=True)]
            if all(number == 0 for need, number in enumerate(left) if need > rows - 1):
                total += math.prod(map(math.comb, open_[1:], taken)) * fillings(rows - 1, tuple(left))
        return total

    return fillings(size, (0,) * keep + (size,)) if keep else 1


@functools.cache
def regular_table(size: int, keep: int) -> Tensor | None:
    """Return all matrices as rows of a table, in lexicographic order.

    Parameters
    ----------
    size, keep : int
        Side of the matrices, and ones in each row and column.

    Returns
    -------
    Tensor or None
        Float64, shape (number, size^2); None if there are more than 128.
    """
    if size > 8 or count_regular(size, keep) > _TABLE:
        return None
    listed = list(every_regular(size, keep))
    table = torch.zeros((len(listed), size * size), dtype=torch.float64)
    for row, ones in enumerate(listed):
        table[row, list(ones)] = 1.0
    return table
