"""Masks that move by the alternating direction method of multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["Splitting"]


@dataclass(frozen=True)
class Splitting(MovingRule):
    """Fits dense weights that are drawn towards masked ones, more and more.

    ADMM for the loss of w, subject to w = z and z masked: w is the optimizer's, followed by a proximal step towards
    z - u of growing strength; z is the masked point nearest to w + u in the metric of `Continuation`; u sums up w - z.
    The module computes with w until the fraction `until` of the steps, and with the last mask from then on.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].
    pull : float
        Strength of the proximal step at the end of that time, in (0, 1]: the fraction of the way to z - u in a step. It
        grows with the square of the time.

    References
    ----------
    T. Zhang et al., "A systematic DNN weight pruning framework using alternating direction method of multipliers", ECCV
    2018 (arXiv 1804.03294), section 3. There the penalty is part of the loss; beside Adam, whose steps have a size of
    their own, it is a step of its own.

    Examples
    --------
    >>> from maskopt.recovery import Splitting
    >>> Splitting(pull=0.5).moves
    True
    """

    pull: float = 0.5

    numbers: ClassVar[float] = 2.0  # w of pruned entries, and u

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, pull=real(0, 1, above=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Split(weights, steps, self)


class _Split(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: Splitting) -> None:
        super().__init__(weights, steps, rule)
        self._pull = rule.pull
        self._duals = [torch.zeros_like(weight.master) for weight in weights]
        for weight in weights:
            weight.pruned = 1.0

    def move(self, step: int) -> None:
        strength = self._pull * (1.0 - self.left(step)) ** 2
        for weight, dual in zip(self.weights, self._duals, strict=True):
            with torch.no_grad():
                dual.add_(weight.master)  # the point w + u
                weight.select(dual)
                outside = dual * ~weight.mask  # the new u, and z = point - u
                weight.master.lerp_(dual.sub_(outside).sub_(outside), strength)
                dual.copy_(outside)

    def stay(self) -> None:
        super().stay()
        self._duals = []
