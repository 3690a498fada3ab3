"""The order in which units leave layers that read the same ones, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskopt.problems import ColumnSubset
from maskopt.problems.refit import Refit
from maskopt.structured.backward import remove_units, without

__all__ = ["removal_scores"]

_PART = 64  # of the kept units one in so many leaves at a time, at least one
_APART = 2.0**-20  # by which scores rise at least, relatively: ranks survive float32


def removal_scores(problems: Sequence[ColumnSubset], *, refit: bool = True) -> Tensor:
    """Return what layers lose by each unit when all units leave, always those that then cost least.

    A cost is the sum over the layers of what a removal adds to the error, relative to the layer's error without any
    unit. Scores do not fall in the order of removal: to remove the units of least score, as many as one likes, is what
    greedy removal does. Costs O(d^3) for each layer, and three float64 arrays of d x d.

    Parameters
    ----------
    problems : sequence of ColumnSubset
        The layers: of the same units, of any numbers of columns.
    refit : bool
        Whether the weights that stay are fitted anew after each removal, or stay as they are.

    Returns
    -------
    Tensor
        Float64, shape (units,).

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import ColumnSubset
    >>> one, two = (ColumnSubset(torch.tensor([row]), torch.eye(3)) for row in ([3.0, 1.0, 2.0], [0.0, 5.0, 1.0]))
    >>> removal_scores([one]).argsort().tolist(), removal_scores([one, two]).argsort().tolist()
    ([1, 2, 0], [2, 0, 1])
    """
    every = torch.arange(problems[0].blocks.number, device=problems[0].device)
    states = [_Fitted(problem) if refit else _Unfitted(problem) for problem in problems]
    scores = torch.zeros(len(every), dtype=torch.float64, device=every.device)
    kept, level = every, scores.new_zeros(())
    while len(kept):
        costs = torch.stack([state.costs() for state in states]).sum(0)
        places = torch.argsort(costs, stable=True)[: max(1, len(costs) // _PART)]
        steps = 1.0 + _APART * torch.arange(1, len(places) + 1, device=every.device)
        values = torch.maximum(costs[places].cummax(0).values, level * steps)
        scores[kept[places]] = values
        level = values[-1]
        kept = without(kept, places)
        if len(kept):
            for state in states:
                state.remove(places)
    return scores


class _Fitted:
    """A layer whose weights on the units left are those of least error."""

    def __init__(self, problem: ColumnSubset) -> None:
        blocks = problem.blocks
        self._state = Refit(blocks, torch.arange(blocks.number, device=problem.device))
        self._total = (blocks.target * blocks.product).sum()

    def costs(self) -> Tensor:
        """Return what removing each unit left adds to the relative error, shape (units left,)."""
        return torch.where(self._total > 0, self._state.removal_costs() / self._total, 0.0)

    def remove(self, places: Tensor) -> None:
        """Remove units, given by their places among those left."""
        remove_units(self._state, places)


class _Unfitted:
    """A layer whose weights stay: its error is a quadratic form of which units are gone."""

    def __init__(self, problem: ColumnSubset) -> None:
        blocks = problem.blocks
        form = (blocks.target.T @ blocks.target) * blocks.gram
        self._form = form.view(blocks.number, blocks.width, blocks.number, blocks.width).sum((1, 3))
        self._with_gone = torch.zeros_like(self._form[0])
        self._total = (blocks.target * blocks.product).sum()

    def costs(self) -> Tensor:
        """As for fitted layers; a cost may be negative, where errors cancel."""
        return torch.where(self._total > 0, (self._form.diagonal() + 2.0 * self._with_gone) / self._total, 0.0)

    def remove(self, places: Tensor) -> None:
        """As for fitted layers."""
        stay = without(torch.arange(len(self._form), device=places.device), places)
        self._with_gone = (self._with_gone + self._form[:, places].sum(1))[stay]
        self._form = self._form[stay][:, stay]
