"""Independent reference answers by loops and enumeration; of the package they use only a set's definition."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from maskopt.oracles import Budget, MaskSet, PartitionMatroid, TransposableNM
from maskopt.problems import LayerReconstruction

Shape = tuple[int, int]


def groups_of(masks: PartitionMatroid, shape: Shape) -> list[list[int]]:
    """Return the flat indices of every group."""
    rows, columns = shape
    height, width = masks.tile[0] or rows, masks.tile[1] or columns
    return [
        [r * columns + c for r in range(top, top + height) for c in range(left, left + width)]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def counts_of(masks: PartitionMatroid, shape: Shape) -> list[int]:
    groups = groups_of(masks, shape)
    if isinstance(masks.keep, Tensor):
        return masks.keep.tolist()
    if isinstance(masks.keep, float):
        # Exact to twelve digits: 1 - 0.7 is taken as 0.3.
        fraction = Fraction(masks.keep) * (1 - Fraction(1, 10**12))
        return [math.ceil(fraction * len(group)) for group in groups]
    return [masks.keep] * len(groups)


def _places(entries: Tensor | None) -> set[int]:
    return set() if entries is None else set(entries.flatten().nonzero().flatten().tolist())


def held_of(masks: MaskSet) -> set[int]:
    """Return the flat indices of protected entries."""
    return _places(masks.protected)


def banned_of(masks: MaskSet) -> set[int]:
    """Return the flat indices of forbidden entries."""
    return _places(masks.forbidden)


# Which patterns, boolean, shape (number, rows, d), belong to a set, by its definition, without its fixed entries.


def keeps_counts(masks: PartitionMatroid, patterns: Tensor) -> Tensor:
    """Patterns whose tiles keep the count of the set, or at most that."""
    shape, flat = (patterns.shape[1], patterns.shape[2]), patterns.flatten(1)
    member = torch.ones(len(patterns), dtype=torch.bool)
    for group, keep in zip(groups_of(masks, shape), counts_of(masks, shape), strict=True):
        kept = flat[:, group].sum(1)
        member &= (kept <= keep) if masks.at_most else (kept == keep)
    return member


def keeps_lines(masks: TransposableNM, patterns: Tensor) -> Tensor:
    """Patterns that keep the same number in every row and every column of every tile."""
    size, member = masks.group, torch.ones(len(patterns), dtype=torch.bool)
    for top in range(0, patterns.shape[1], size):
        for left in range(0, patterns.shape[2], size):
            tile = patterns[:, top : top + size, left : left + size]
            for line in range(size):
                member &= (tile[:, line].sum(1) == masks.keep) & (tile[:, :, line].sum(1) == masks.keep)
    return member


def costs_little(masks: Budget, patterns: Tensor) -> Tensor:
    """Patterns that keep entries whose prices, added up exactly, stay within the budget."""
    # Floats are fractions of a power of two: multiplied by it, they are whole.
    prices = [Fraction(price) for price in masks.price.flatten().tolist()]
    unit = math.lcm(*(price.denominator for price in prices), Fraction(masks.budget).denominator)
    whole = np.array([int(price * unit) for price in prices], dtype=object)
    return torch.from_numpy((patterns.flatten(1).numpy() @ whole <= int(Fraction(masks.budget) * unit)).astype(bool))


def uses_few_columns(masks: MaskSet, patterns: Tensor) -> Tensor:
    """Patterns that keep at most `entries` entries in at most `columns` columns."""
    return (patterns.sum((1, 2)) <= masks.entries) & (patterns.any(1).sum(1) <= masks.columns)


def cheapest(masks: PartitionMatroid, cost: Tensor) -> Tensor:
    """Return the member of minimum cost, ties to the lower index, by sorting."""
    shape = (cost.shape[0], cost.shape[1])
    held, banned = held_of(masks), banned_of(masks)
    if held or banned:  # with fixed entries, infinity counts as the largest number
        cost = cost.clamp(torch.finfo(cost.dtype).min, torch.finfo(cost.dtype).max)
    costs = cost.flatten().tolist()
    mask = torch.zeros(cost.numel(), dtype=torch.bool)
    for group, keep in zip(groups_of(masks, shape), counts_of(masks, shape), strict=True):
        order = sorted(group, key=lambda index: (index not in held, index in banned, costs[index], index))
        if masks.at_most:
            order = [index for index in order if index in held or (costs[index] < 0 and index not in banned)]
        mask[order[:keep]] = True
    return mask.view(shape)


def errors_of(weight: Tensor, gram: Tensor, chosen: Tensor) -> Tensor:
    """Return each row's error for masks of shape (number, rows, d), float64, shape (number, rows)."""
    pruned = torch.where(chosen, 0.0, weight.double())
    return torch.einsum("nri,ij,nrj->nr", pruned, gram.double(), pruned)


def magnitudes(weight: Tensor, gram: Tensor) -> Tensor:
    """Return |w| |G| |w| of each row: the size of the terms an error is summed from, float64."""
    size = weight.double().abs()
    return ((size @ gram.double().abs()) * size).sum(1)


def best_swaps(problem: LayerReconstruction, masks: PartitionMatroid, mask: Tensor) -> tuple[Tensor, float]:
    """Return each row's best change by a swap within it, and the best change by a swap across two rows.

    Every pair is tried, and every change is the difference of two whole errors.
    """
    weight, gram, kept = problem.weight.double().numpy(), problem.gram.double().numpy(), mask.numpy()
    rows, d = weight.shape
    group_of = np.empty(rows * d, dtype=int)
    for number, group in enumerate(groups_of(masks, (rows, d))):
        group_of[group] = number
    group_of = group_of.reshape(rows, d)
    movable = kept.copy()
    movable.flat[sorted(held_of(masks))] = False
    pruned, steps = np.where(kept, 0.0, weight), np.eye(d)

    def error(vectors: np.ndarray) -> np.ndarray:
        return ((vectors @ gram) * vectors).sum(-1)

    within = np.full(rows, np.inf)
    add, drop = np.full((rows, d), np.inf), np.full((rows, d), np.inf)
    for row in range(rows):
        base, current = pruned[row], error(pruned[row])
        change = steps * weight[row][:, None]
        back, out = np.flatnonzero(~kept[row]), np.flatnonzero(movable[row])
        add[row, back] = error(base - change[back]) - current
        drop[row, out] = error(base + change[out]) - current
        pairs = error(base - change[back][:, None] + change[out][None, :]) - current
        allowed = group_of[row][back][:, None] == group_of[row][out][None, :]
        within[row] = pairs[allowed].min(initial=np.inf)
    across = np.inf
    for number in np.unique(group_of):
        inside = group_of == number
        gain, loss = np.where(inside, add, np.inf).min(1), np.where(inside, drop, np.inf).min(1)
        both = gain[:, None] + loss[None, :]
        np.fill_diagonal(both, np.inf)
        across = min(across, both.min())
    return torch.from_numpy(within), float(across)
