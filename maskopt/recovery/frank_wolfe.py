"""Masks that move by Frank-Wolfe steps on relaxed masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MaskRule, MaskState

__all__ = ["FrankWolfeMasks"]


@dataclass(frozen=True)
class FrankWolfeMasks(MaskRule):
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
    until: float = 0.6

    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, step=real(0, 1, above=True), momentum=real(0, 1, below=True), until=real(0, 1, above=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MaskState:
        return _Relaxed(weights, steps, self)


class _Relaxed(MaskState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: FrankWolfeMasks) -> None:
        super().__init__(weights, steps)
        self._rule, self._last = rule, rule.until * steps
        self._averages: dict[int, Tensor] = {}
        for weight in weights:
            weight.relaxed = weight.mask.to(weight.master.dtype)

    def gradient(self, weight: Masked, step: int) -> None:
        if weight.relaxed is None:
            super().gradient(weight, step)
            return
        gradient = weight.master.grad
        assert gradient is not None
        by_mask = gradient * weight.master.detach()
        average = self._averages.setdefault(id(weight), by_mask)
        if average is not by_mask:
            average.lerp_(by_mask, 1.0 - self._rule.momentum)

    def stepped(self, step: int) -> None:
        fraction = min(1.0, step / self._last)
        for weight in self.weights:
            x, average = weight.relaxed, self._averages.get(id(weight))
            if x is None:
                continue
            if average is not None:
                size = float(average.square().mean().sqrt())
                # Concave: what is more than half kept is drawn to one, and what is less to zero.
                shift = size * fraction / max(1.0 - fraction, 1e-3)
                weight.select_by(average.add(x - 0.5, alpha=-shift).neg_())
                x.lerp_(weight.mask.to(x.dtype), self._rule.step)
            weight.select_by(x)
            if step >= self._last:
                weight.relaxed = None
        if step >= self._last:
            self._averages.clear()
