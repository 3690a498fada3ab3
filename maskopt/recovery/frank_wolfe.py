"""Masks that move by Frank-Wolfe steps on relaxed masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["FrankWolfeMasks"]


@dataclass(frozen=True)
class FrankWolfeMasks(MovingRule):
    """Moves relaxed masks by stochastic Frank-Wolfe with momentum while weights are fitted.

    The module computes with x * w, x in the convex hull of the set. After each step of the optimizer x moves a fraction
    towards the mask that is best for the averaged gradient of the loss with respect to x, plus that of a concave term
    which grows until x is a mask, as in `ContinuationFrankWolfe`. Pruned weights have the gradients of kept ones.

    Parameters
    ----------
    step : float
        Fraction of the way to the mask in a step, in (0, 1].
    momentum : float
        Weight of the earlier gradients in the average, in [0, 1).
    until : float
        Fraction of the steps after which masks stay, in (0, 1].

    References
    ----------
    A. Mokhtari, H. Hassani and A. Karbasi, "Stochastic conditional gradient methods", JMLR 21, 2020 (arXiv 1804.09554):
    averaged gradients. arXiv 2512.01147: masks of convolutional networks by Frank-Wolfe with momentum. The concave term
    is this project's.

    Examples
    --------
    >>> from maskopt.recovery import FrankWolfeMasks
    >>> FrankWolfeMasks(step=0.2).moves
    True
    """

    step: float = 0.1
    momentum: float = 0.8

    numbers: ClassVar[float] = 3.0  # values of pruned entries, x, and averaged gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, step=real(0, 1, above=True), momentum=real(0, 1, below=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Relaxed(weights, steps, self)


class _Relaxed(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: FrankWolfeMasks) -> None:
        super().__init__(weights, steps, rule)
        self._rule = rule
        self._averages: dict[int, Tensor] = {}
        for weight in weights:
            weight.relaxed = weight.mask.to(weight.master.dtype)

    def free(self, weight: Masked) -> None:
        gradient = weight.master.grad
        assert gradient is not None
        by_mask = gradient * weight.master.detach()
        average = self._averages.setdefault(id(weight), by_mask)
        if average is not by_mask:
            average.lerp_(by_mask, 1.0 - self._rule.momentum)

    def move(self, step: int) -> None:
        left = self.left(step)
        for weight in self.weights:
            x, average = weight.relaxed, self._averages.get(id(weight))
            assert x is not None
            if average is not None:
                size = float(average.square().mean().sqrt())
                # Concave: what is more than half kept is drawn to one, and what is less to zero.
                shift = size * (1.0 - left) / max(left, 1e-3)
                weight.select_by(average.add(x - 0.5, alpha=-shift).neg_())
                x.lerp_(weight.mask.to(x.dtype), self._rule.step)
            weight.select_by(x)

    def stay(self) -> None:
        super().stay()
        self._averages.clear()
