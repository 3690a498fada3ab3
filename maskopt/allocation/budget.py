"""From losses at a few levels, or from wished sparsities, to counts of every layer within a budget of kept weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from maskopt.allocation.separable import Levels
from maskopt.errors import MaskoptError
from maskopt.oracles import Counts

__all__ = ["apportioned", "budget_of", "filled", "interpolated", "levels_of"]

_MOST_LEVELS = 200


def budget_of(counts: Mapping[str, Counts], sparsity: float) -> int:
    """Return how many weights layers may keep together: what is pruned is rounded down to whole weights.

    Parameters
    ----------
    counts : mapping of str to Counts
        By layer.
    sparsity : float
        Fraction of all weights to prune, in [0, 1].
    """
    total = sum(each.cost * each.most for each in counts.values())
    return total - math.floor(sparsity * total * (1 + 1e-12))


def apportioned(counts: Mapping[str, Counts], sparsities: Mapping[str, float], budget: int) -> dict[str, int]:
    """Return counts near to wished sparsities that keep as much of the budget as they can, and not more.

    Every layer has its wish rounded down; what is left goes to the layers that lost most, a step each.

    Parameters
    ----------
    counts : mapping of str to Counts
    sparsities : mapping of str to float
    budget : int
        Most weights kept by all layers together.

    Raises
    ------
    MaskoptError
        If the rounded wishes exceed the budget, or a wish is no number.
    """
    for name in counts:
        if not math.isfinite(sparsities[name]):
            raise MaskoptError(f"The sparsity of {name} must be a number; got {sparsities[name]}.")
    wishes = {name: min(1.0, max(0.0, 1 - sparsities[name])) * each.most for name, each in counts.items()}
    found = {name: math.floor(wish * (1 + 1e-12)) for name, wish in wishes.items()}
    left = budget - sum(counts[name].cost * count for name, count in found.items())
    if left < 0:
        raise MaskoptError(f"The sparsities keep {-left} weights more than the budget of {budget} allows.")
    order = sorted(found, key=lambda name: (found[name] - wishes[name]) * counts[name].cost)
    for name in order:
        if counts[name].cost <= left and found[name] < counts[name].most and found[name] < wishes[name]:
            found[name] += 1
            left -= counts[name].cost
    return filled(counts, found, left)


def filled(counts: Mapping[str, Counts], chosen: Mapping[str, int], left: int) -> dict[str, int]:
    """Spend what is left of a budget as far as steps allow, evenly over the layers.

    Parameters
    ----------
    counts : mapping of str to Counts
    chosen : mapping of str to int
    left : int
        Weights.
    """
    found = dict(chosen)
    while True:
        fits = [name for name, each in counts.items() if each.cost <= left and found[name] < each.most]
        if not fits:
            return found
        for name in sorted(fits, key=lambda name: -counts[name].cost):
            each = counts[name]
            more = min(each.most - found[name], left // each.cost, max(1, each.most // _MOST_LEVELS))
            found[name] += more
            left -= more * each.cost


def interpolated(counts: Sequence[int], losses: Sequence[float], at: np.ndarray, *, positive: bool) -> np.ndarray:
    """Return losses between measured levels.

    Parameters
    ----------
    counts : sequence of int
        Of the levels, ascending.
    losses : sequence of float
    at : ndarray
        Counts within the measured range.
    positive : bool
        Whether losses are positive and grow geometrically as counts fall, as divergences from the dense model do. They
        are then made monotone, because noise may not reward pruning, and interpolated in logarithms. Others are
        interpolated linearly.
    """
    x, y = np.asarray(counts, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(x) == 1:
        return np.full(len(at), y[0])
    if not positive:
        return np.asarray(np.interp(at, x, y))
    floor = max(float(y.max()), 1e-30) * 1e-9
    falling = np.maximum.accumulate(np.maximum(y, floor)[::-1])[::-1]
    return np.asarray(np.exp(PchipInterpolator(x, np.log(falling))(at)))


def levels_of(low: int, high: int) -> np.ndarray:
    """Return the counts from `low` to `high` that a layer chooses among: all, or 200 evenly spread."""
    number = min(_MOST_LEVELS, high - low + 1)
    return np.unique(np.linspace(low, high, number).round().astype(np.int64))


def separable_levels(name: str, counts: Counts, at: np.ndarray, losses: np.ndarray) -> Levels:
    """Return a layer's levels for `allocate_levels`, with what its counts cost."""
    return Levels(name, tuple(int(count) * counts.cost for count in at), tuple(float(loss) for loss in losses))
