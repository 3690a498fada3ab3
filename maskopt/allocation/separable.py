"""The separable problem: one level for each layer, the least total loss within a budget.

    minimise sum_l loss_l(k_l)  subject to  sum_l cost_l(k_l) <= budget

Known as the multiple-choice knapsack problem. One multiplier for the budget solves it where the losses are convex in
the costs, up to what one layer's step costs; dynamic programming over what the multiplier leaves open solves it
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError

__all__ = ["Choice", "Levels", "allocate_levels", "joined"]

_MOST_STATES = 200_000  # partial choices in one layer of the dynamic programme, 16 bytes each
_MOST_SUMS = 10_000_000  # of them and the next layer's levels


@dataclass(frozen=True)
class Levels:
    """The levels that a layer, or a group of layers that must agree, can have.

    Parameters
    ----------
    name : str
        What messages call it.
    costs : tuple of int
        Of each level, such as the number of weights kept, at least 0.
    losses : tuple of float
        Of each level, finite: what the model loses.

    Raises
    ------
    MaskoptError
        If there is no level, a cost is no whole number of at least 0, or a loss is not finite.
    """

    name: str
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.costs or len(self.costs) != len(self.losses):
            raise MaskoptError(
                f"{self.name} needs a cost and a loss for each of its levels; got {len(self.costs)} costs and "
                f"{len(self.losses)} losses."
            )
        for cost in self.costs:
            if not whole(0).fits(cost):
                raise MaskoptError(f"Costs of {self.name} must be whole numbers of at least 0; got {shown(cost)}.")
        for loss in self.losses:
            if not math.isfinite(loss):
                raise MaskoptError(f"Losses of {self.name} must be finite; got {shown(loss)}.")


def joined(name: str, parts: Sequence[Levels]) -> Levels:
    """Return the levels of layers that must all have the same one.

    Parameters
    ----------
    name : str
    parts : sequence of Levels
        With equal numbers of levels; level i of all of them goes together.

    Raises
    ------
    MaskoptError
        If the numbers differ.
    """
    counts = {len(part.costs) for part in parts}
    if len(counts) != 1:
        raise MaskoptError(f"The layers of {name} must have equal numbers of levels; they have {sorted(counts)}.")
    costs = tuple(sum(column) for column in zip(*(part.costs for part in parts), strict=True))
    losses = tuple(math.fsum(column) for column in zip(*(part.losses for part in parts), strict=True))
    return Levels(name, costs, losses)


@dataclass(frozen=True)
class Choice:
    """A level for each layer.

    Attributes
    ----------
    levels : tuple of int
        Index of the level, in the order of the layers.
    cost : int
    loss : float
    lower_bound : float
        On the loss of every choice within the budget.
    multiplier : float
        Loss per unit of the budget, at the optimum of the relaxation.
    optimal : bool
        Whether no choice is better, up to rounding; `lower_bound` is then `loss`.
    """

    levels: tuple[int, ...]
    cost: int
    loss: float
    lower_bound: float
    multiplier: float
    optimal: bool

    @property
    def gap(self) -> float:
        """Loss less lower bound."""
        return self.loss - self.lower_bound


def allocate_levels(layers: Sequence[Levels], budget: int) -> Choice:
    """Choose a level for each layer so that the sum of losses is least within a budget.

    Parameters
    ----------
    layers : sequence of Levels
    budget : int
        Most that the levels may cost together.

    Returns
    -------
    Choice
        Optimal, unless the dynamic programme would hold more than 200,000 partial choices; the best choice found then
        comes with the bound that is proven.

    Raises
    ------
    MaskoptError
        If there is no layer, or the cheapest levels exceed the budget.

    References
    ----------
    P. Sinha and A. A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979: the relaxation
    and the greedy choice. D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal
    of Operational Research 83, 1995: states that a bound rules out are dropped.

    Examples
    --------
    >>> layers = [Levels("a", (1, 2, 3), (9.0, 2.0, 0.0)), Levels("b", (1, 2, 3), (3.0, 2.0, 0.0))]
    >>> allocate_levels(layers, 4).levels
    (2, 0)
    """
    if not layers:
        raise MaskoptError("There is no layer to choose a level for.")
    least = sum(min(layer.costs) for layer in layers)
    if not whole(0).fits(budget):
        raise MaskoptError(f"The budget must be a whole number of at least 0; got {shown(budget)}.")
    if least > budget:
        raise MaskoptError(f"The budget {budget} is less than the cheapest levels cost, {least}.")
    # A level that costs more than all others leave takes part in no choice, but would in sums and bounds.
    payable = [[i for i, cost in enumerate(x.costs) if cost - min(x.costs) <= budget - least] for x in layers]
    costs = [np.array([x.costs[i] for i in kept], dtype=np.int64) for x, kept in zip(layers, payable, strict=True)]
    losses = [np.array([x.losses[i] for i in kept]) for x, kept in zip(layers, payable, strict=True)]
    multiplier, start = _greedy(costs, losses, budget)
    # The Lagrangian: every choice loses at least `base`, plus what its levels lie above their layers' least.
    reduced = [loss + multiplier * cost for cost, loss in zip(costs, losses, strict=True)]
    least_reduced = [float(values.min()) for values in reduced]
    above = [values - low for values, low in zip(reduced, least_reduced, strict=True)]
    base = math.fsum(least_reduced) - multiplier * budget
    found, complete = _complete(costs, above, multiplier, budget, start)
    loss = math.fsum(values[level] for values, level in zip(losses, found, strict=True))
    return Choice(
        levels=tuple(kept[level] for kept, level in zip(payable, found, strict=True)),
        cost=int(sum(values[level] for values, level in zip(costs, found, strict=True))),
        loss=loss,
        lower_bound=loss if complete else min(base, loss),
        multiplier=multiplier,
        optimal=complete,
    )


def _hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Return the levels on the lower convex hull of loss over cost, in the order of costs, losses falling."""
    order = np.lexsort((loss, cost))
    hull: list[int] = []
    for level in order:
        if hull and loss[level] >= loss[hull[-1]]:
            continue
        while hull and cost[hull[-1]] == cost[level]:
            hull.pop()
        while len(hull) > 1 and _slope(cost, loss, hull[-2], hull[-1]) >= _slope(cost, loss, hull[-1], level):
            hull.pop()
        hull.append(int(level))
    return hull


def _slope(cost: np.ndarray, loss: np.ndarray, one: int, other: int) -> float:
    return float((loss[other] - loss[one]) / (cost[other] - cost[one]))


def _greedy(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """Take the steps along the hulls that gain most per cost while they fit; the first that does not is the multiplier.

    Steps that fit are taken after it, too.
    """
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    choice = [hull[0] for hull in hulls]
    left = budget - int(sum(cost[level] for cost, level in zip(costs, choice, strict=True)))
    # Along a hull slopes rise, so that sorting keeps the order of a layer's steps.
    steps = sorted(_steps(hulls, costs, losses), key=lambda step: step[0])
    multiplier: float | None = None
    blocked: set[int] = set()
    for slope, layer, before, after in steps:
        price = int(costs[layer][after] - costs[layer][before])
        if layer in blocked or price > left:
            multiplier = -slope if multiplier is None else multiplier
            blocked.add(layer)
            continue
        choice[layer] = after
        left -= price
    return multiplier or 0.0, choice


def _steps(
    hulls: Sequence[Sequence[int]], costs: Sequence[np.ndarray], losses: Sequence[np.ndarray]
) -> Iterator[tuple[float, int, int, int]]:
    for layer, hull in enumerate(hulls):
        for before, after in pairwise(hull):
            yield _slope(costs[layer], losses[layer], before, after), layer, before, after


def _complete(
    costs: Sequence[np.ndarray], above: Sequence[np.ndarray], multiplier: float, budget: int, start: Sequence[int]
) -> tuple[list[int], bool]:
    """Return the best choice, and whether it is proven.

    The loss of a choice is a constant, plus `above` of its levels, plus the multiplier times what is left of the
    budget. Partial choices that reach the best known choice by `above` alone are dropped, and those that neither cost
    nor lose less than another one.
    """
    best = [int(level) for level in start]
    spent = int(sum(cost[level] for cost, level in zip(costs, best, strict=True)))
    most = math.fsum(values[level] for values, level in zip(above, best, strict=True)) + multiplier * (budget - spent)
    # Sums of the same numbers in another order differ by rounding; what is within it is no improvement.
    most -= 1e-12 * abs(most)
    # Layers with much to choose last: the lists stay short longest.
    order = sorted(range(len(costs)), key=lambda layer: int((above[layer] <= most).sum()))
    cheapest = np.array(
        [int(cost[values <= most].min(initial=budget + 1)) for cost, values in zip(costs, above, strict=True)]
    )
    if most <= 0.0 or bool((cheapest > budget).any()):
        return best, True
    rest = int(cheapest.sum())
    spent_so_far, excess = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[int, np.ndarray, np.ndarray]] = []
    for layer in order:
        rest -= int(cheapest[layer])
        open_levels = np.flatnonzero(above[layer] <= most)
        if len(excess) * len(open_levels) > _MOST_SUMS:
            return best, False
        total = (spent_so_far[:, None] + costs[layer][open_levels]).ravel()
        value = (excess[:, None] + above[layer][open_levels]).ravel()
        parents = np.repeat(np.arange(len(excess)), len(open_levels))
        levels = np.tile(open_levels, len(excess))
        keep = np.flatnonzero((total + rest <= budget) & (value < most))
        keep = keep[np.lexsort((value[keep], total[keep]))]
        # Among partial choices in the order of costs, only those below all before them can lead to the best.
        lowest = np.minimum.accumulate(value[keep] - multiplier * total[keep])
        rising = (
            np.concatenate(([True], (value[keep] - multiplier * total[keep])[1:] < lowest[:-1])) if len(keep) else keep
        )
        keep = keep[rising] if len(keep) else keep
        if not len(keep):
            return best, True
        if len(keep) > _MOST_STATES:
            return best, False
        spent_so_far, excess = total[keep], value[keep]
        history.append((layer, parents[keep], levels[keep]))
    final = excess + multiplier * (budget - spent_so_far)
    state = int(final.argmin())
    if not final[state] < most:
        return best, True
    for layer, parents, levels in reversed(history):
        best[layer] = int(levels[state])
        state = int(parents[state])
    return best, True
