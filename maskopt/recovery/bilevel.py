"""Masks that move by bi-level optimization: scores descend on the loss of weights that are fitted to their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["BiLevel"]


@dataclass(frozen=True)
class BiLevel(MovingRule):
    """Alternates a step on the weights of the mask with a step on scores, whose projection is the mask (BiP).

    The upper level minimises L(m * w(m)) over masks m, w(m) being the minimiser of the lower level
    L(m * w) + gamma/2 |w|^2. With g the gradient of L by m * w, a step of the lower level follows m * g + gamma w. Its
    stationary point, and the Hessian taken as gamma alone, give dw/dm = -g / gamma, so that the upper level's gradient
    is (w - m * g / gamma) * g: no second derivative is left, because m and w are multiplied entry by entry. Scores
    follow it, and the mask is the projection of the scores, which is what the set's oracle selects. A pruned entry
    counts with the weight that this lower level would give it, -g / gamma, because it was zero to begin with and its
    first-order term vanished. gamma is a number for each input, in proportion to its variance given the others, and
    the gradient by m is an average over steps.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, and the ridge is left out, in (0, 1].
    ridge : float
        Size of gamma w relative to the gradient, both as root mean squares, in the first step.
    step : float
        Of the scores, relative to those of kept entries at the start, as root mean squares.
    momentum : float
        Weight of the earlier gradients in the average, in [0, 1).

    References
    ----------
    Y. Zhang et al., "Advancing model pruning via bi-level optimization", NeurIPS 2022 (arXiv 2210.04092), section 4:
    the implicit gradient of a bi-linear problem, and the two alternating steps. Gradient descent there, Adam's steps
    for the weights here; the metric, the average and what pruned entries count are this project's.

    Examples
    --------
    >>> from maskopt.recovery import BiLevel
    >>> BiLevel(ridge=0.1).moves
    True
    """

    ridge: float = 0.01
    step: float = 0.005
    momentum: float = 0.8

    numbers: ClassVar[float] = 3.0  # values of pruned entries, scores, and averaged gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, ridge=real(0, above=True), step=real(0, above=True), momentum=real(0, 1, below=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Levels(weights, steps, self)


class _Levels(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: BiLevel) -> None:
        super().__init__(weights, steps, rule)
        self._rule = rule
        self._gammas: dict[int, float] = {}
        self._averages: dict[int, Tensor] = {}
        self._scores = [_normed(weight.cost(weight.master.detach()).sqrt(), weight.mask) for weight in weights]

    def free(self, weight: Masked) -> None:
        gradient = weight.master.grad
        assert gradient is not None
        values = weight.master.detach()
        average = self._averages.setdefault(id(weight), gradient.clone())
        average.lerp_(gradient, 1.0 - self._rule.momentum)
        pull = weight.curved(values)
        gamma = self._gammas.setdefault(id(weight), self._rule.ridge * _ratio(gradient[weight.mask], pull[weight.mask]))
        gradient.add_(pull, alpha=gamma)
        weight.scale_gradient(0.0)

    def move(self, step: int) -> None:
        for weight, scores in zip(self.weights, self._scores, strict=True):
            average, gamma = self._averages.get(id(weight)), self._gammas.get(id(weight), 0.0)
            if average is None or gamma <= 0.0:
                continue  # without a gradient, as of an expert that no token chose, nothing is known
            kept = weight.master.detach().masked_fill(~weight.mask, 0.0)
            upper = upper_gradient(kept, average, weight.promise(average), gamma)
            size = float(upper.square().mean().sqrt())
            if size > 0.0:
                scores.sub_(upper, alpha=self._rule.step * self.left(step - 1) / size)
                before = weight.mask
                weight.select_by(scores)
                with torch.no_grad():
                    weight.master.masked_fill_(~(weight.mask & before), 0.0)

    def stay(self) -> None:
        super().stay()
        self._averages.clear()
        self._scores = []


def upper_gradient(values: Tensor, gradient: Tensor, promise: Tensor, gamma: float) -> Tensor:
    """Return the upper level's gradient by the mask where it is 1, and what keeping an entry changes where it is 0.

    Parameters
    ----------
    values, gradient : Tensor
        Weights, zero where they are pruned, and the loss's gradient by what the module computes with.
    promise : Tensor
        The gradient's squares over the metric.
    gamma : float
        Of the ridge in that metric.
    """
    return values * gradient - promise / gamma


def _normed(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores of pruned entries as zero, and of kept ones with a root mean square of one."""
    scores = scores.masked_fill(~mask, 0.0)
    size = float(scores[mask].square().mean().sqrt()) if bool(mask.any()) else 0.0
    return scores / size if size > 0.0 else scores


def _ratio(one: Tensor, other: Tensor) -> float:
    """Return the root of a ratio of mean squares; 0 where there is none."""
    below = float(other.square().sum())
    return (float(one.square().sum()) / below) ** 0.5 if below > 0.0 else 0.0
