"""Swaps that rounding could hide: proven errors of their costs in float64, and their signs without rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskopt.exact import WIDEST, exact_difference, integers
from maskopt.problems import LayerReconstruction
from maskopt.solvers.swap_search import SwapSearch
from maskopt.solvers.swaps import pair_change

__all__ = ["exact_swaps", "swap_noise"]

_WORK = 2**24  # entries of the Gram that are read as whole numbers for one call, at most

Swaps = tuple[Tensor, Tensor, Tensor, Tensor]


def swap_noise(problem: LayerReconstruction, kept: Tensor) -> Tensor:
    """Return how wrong the cost of putting back or taking out an entry may be, float64, shape (rows, d).

    With c = G z carried, the cost is -+ 2 w_i c_i + w_i^2 G_ii. A sum of d products |z_k G_ik| <= |z_k| r_k r_i has an
    error of at most about d 2^-53 times their sum.
    """
    sizes, weight = problem.entry_sizes(), problem.scaled_weight.abs()
    off = weight * ~kept
    if problem.aims_elsewhere:
        off = off + (problem.scaled_target - problem.scaled_weight).abs()
    own = weight * sizes
    total = (off * sizes).sum(1, keepdim=True)
    # Products may underflow, but for those with zeros.
    underflow = problem.shape[1] * 2.0**-1070 * (own > 0)
    return own * ((problem.shape[1] + 8) * 2.0**-51 * total + 2.0**-49 * own) + underflow


def exact_swaps(problem: LayerReconstruction, kept: Tensor, carried: Tensor, search: SwapSearch) -> Swaps | None:
    """Return swaps that lower the error although float64 is in doubt of it, one change per row; none: none does.

    None where there are so many doubts that they cannot all be looked at, and where a Gram that is indefinite by
    rounding makes a row's sum negative: its error counts as zero, so that swaps with other rows have other prices.

    Parameters
    ----------
    problem : LayerReconstruction
        In its own type.
    kept : Tensor
        The mask.
    carried : Tensor
        G z in float64, from scratch, shape (rows, d).
    search : SwapSearch
        In float64, with proven `noise`, which found no swap that improves for certain.
    """
    every = torch.arange(len(kept), device=kept.device)
    add_cost, drop_cost, noise = search.costs(every, kept, carried)
    low_add, low_drop = add_cost - noise, drop_cost - noise
    budget = _WORK
    found: list[tuple[int, int, int, int]] = []
    for row in search.doubtful(kept, carried).nonzero().flatten().tolist():
        pairs = _pairs_in_row(search, row, low_add[row], low_drop[row])
        entries = np.unique(pairs)
        budget -= len(entries) * problem.shape[1] + 16 * len(pairs)
        if budget < 0:
            return None
        swap = _Exact.of(problem, kept, row, entries).best(pairs) if len(pairs) else None
        if swap is not None:
            found.append((row, swap[0], row, swap[1]))
    if not found and search.height > 1:
        if _negative_somewhere(problem, kept):
            return None
        across = _across_rows(problem, kept, search, low_add, low_drop, budget)
        if across is None:
            return None
        found = across
    columns = torch.tensor(found, dtype=torch.int64, device=kept.device).view(-1, 4)
    return columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3]


def _negative_somewhere(problem: LayerReconstruction, kept: Tensor) -> bool:
    """Whether some row's quadratic form is negative."""
    rows = ((problem.objective(kept) == 0) & (problem.target != problem.weight * kept).any(1)).nonzero().flatten()
    if not len(rows) or problem.indefiniteness() == 0.0:
        return False
    if problem.shape[1] > WIDEST:
        return True
    off, exponent = exact_difference(problem.target[rows], problem.weight[rows] * kept[rows])
    return any(form < 0 for form in problem.exact_gram().forms(off, exponent))


def _pairs_in_row(search: SwapSearch, row: int, add: Tensor, drop: Tensor) -> np.ndarray:
    """Return all pairs (put back, take out) of a row that may lower the error, shape (pairs, 2)."""
    found = []
    weight = search.weight[row]
    for segment in range(search.segments):
        part = slice(segment * search.width, (segment + 1) * search.width)
        weights = weight[part].unsqueeze(1), weight[part]
        both = pair_change(search.gram[part, part], weights, (add[part].unsqueeze(1), drop[part]))
        found.append((both < 0).nonzero() + segment * search.width)
    return torch.cat(found).cpu().numpy()


@dataclass
class _Exact:
    """Costs of some entries of one row as whole numbers, all times 2^`exponent`."""

    entries: dict[int, int]  # place of an entry in what follows
    weight: list[int]
    times: list[int]  # (G z)_i
    gram: np.ndarray  # of the entries with each other
    exponent: int

    @staticmethod
    def of(problem: LayerReconstruction, kept: Tensor, row: int, entries: np.ndarray) -> _Exact:
        """Read a row of the data."""
        weight = problem.weight[row]
        rows = torch.stack((problem.target[row], weight * kept[row], weight)).double().cpu().numpy()
        whole, exponent = integers(rows)
        off = whole[0] - whole[1]
        some = np.flatnonzero(off)
        lines = problem.gram[torch.from_numpy(entries).to(problem.device)].double().cpu().numpy()
        gram, unit = integers(lines[:, np.concatenate((some, entries))])
        times = [int(line @ off[some]) if len(some) else 0 for line in gram[:, : len(some)]]
        places = {int(entry): place for place, entry in enumerate(entries)}
        return _Exact(places, whole[2][entries].tolist(), times, gram[:, len(some) :], 2 * exponent + unit)

    def put_back(self, entry: int) -> int:
        """Return the change of the error if a pruned entry is kept."""
        i = self.entries[entry]
        return int(self.weight[i] * (self.weight[i] * self.gram[i, i] - 2 * self.times[i]))

    def take_out(self, entry: int) -> int:
        """Return the change of the error if a kept entry is pruned."""
        i = self.entries[entry]
        return int(self.weight[i] * (self.weight[i] * self.gram[i, i] + 2 * self.times[i]))

    def best(self, pairs: np.ndarray) -> tuple[int, int] | None:
        """Return the pair that lowers the error most, if one does."""
        change, pair = 0, None
        for add, drop in pairs.tolist():
            i, j = self.entries[add], self.entries[drop]
            both = 2 * self.weight[i] * self.weight[j] * int(self.gram[i, j])
            total = self.put_back(add) + self.take_out(drop) - both
            if total < change:
                change, pair = total, (add, drop)
        return pair


def _across_rows(
    problem: LayerReconstruction, kept: Tensor, search: SwapSearch, add: Tensor, drop: Tensor, budget: int
) -> list[tuple[int, int, int, int]] | None:
    """Return at most one swap between two rows of a tile that lowers the error; None: too many doubts."""
    height, width = search.height, search.width
    for top in range(0, len(kept), height):
        for left in range(0, search.columns, width):
            tile = slice(top, top + height), slice(left, left + width)
            best_add, best_drop = add[tile].amin(), drop[tile].amin()
            adds = (add[tile] + best_drop < 0).nonzero() + torch.tensor([top, left], device=kept.device)
            drops = (drop[tile] + best_add < 0).nonzero() + torch.tensor([top, left], device=kept.device)
            rows = sorted(set(torch.cat((adds, drops))[:, 0].tolist()))
            budget -= (len(adds) + len(drops)) * problem.shape[1]
            if budget < 0:
                return None
            if len(adds) and len(drops) and (swap := _best_across(problem, kept, rows, adds, drops)) is not None:
                return [swap]
    return []


def _best_across(
    problem: LayerReconstruction, kept: Tensor, rows: list[int], adds: Tensor, drops: Tensor
) -> tuple[int, int, int, int] | None:
    costs: list[list[tuple[int, int, int, int]]] = [[], []]  # cost, exponent, row, entry
    for row in rows:
        mine = [places[places[:, 0] == row, 1].cpu().numpy() for places in (adds, drops)]
        exact = _Exact.of(problem, kept, row, np.unique(np.concatenate(mine)))
        for kind, (entries, cost) in enumerate(zip(mine, (exact.put_back, exact.take_out), strict=True)):
            costs[kind] += [(cost(int(entry)), exact.exponent, row, int(entry)) for entry in entries]
    # One exponent for all.
    lowest = min(cost[1] for kind in costs for cost in kind)
    level = [sorted((c << (e - lowest), row, entry) for c, e, row, entry in kind) for kind in costs]
    best: tuple[int, tuple[int, int, int, int]] | None = None
    for gain, row, entry in level[0]:
        partner = next(((loss, other, out) for loss, other, out in level[1] if other != row), None)
        if partner is not None and gain + partner[0] < (0 if best is None else best[0]):
            best = gain + partner[0], (row, entry, partner[1], partner[2])
    return None if best is None else best[1]
