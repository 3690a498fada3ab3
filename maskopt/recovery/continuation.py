"""Masks that move by continuation: pruned weights take part a little at first, and less and less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MaskRule, MaskState

__all__ = ["Continuation"]


@dataclass(frozen=True)
class Continuation(MaskRule):
    """Fits weights on relaxed masks that become masks while the fit proceeds.

    The module computes with x * w, where x is 1 for kept entries and tau for pruned ones. tau falls from 1 to 0:
    tau = (1 - t / `until`)^`power` at a fraction t of the steps. Pruned entries start at zero, and with the exact
    gradient of the relaxed weights, tau times the gradient of the others, they grow where the objective asks for it.
    After each step the mask becomes the one of its set with the largest (w_j c_j)^2, c_j^2 the variance of input j
    given the others, which is what removing w_j costs while the other weights can compensate (`ConditionalADMM`). From
    `until` on, masks stay.

    Straight-through gradients (`Reselection`) let pruned entries grow whether they help or not; here they help from the
    start, so that an exchange changes little.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].
    power : float
        Of the fall of tau.

    References
    ----------
    This project's own: the continuation of `ContinuationFrankWolfe`, for objectives above the layer.

    Examples
    --------
    >>> from maskopt.recovery import Continuation
    >>> Continuation(until=0.5).moves
    True
    """

    until: float = 0.6
    power: float = 2.0

    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, until=real(0, 1, above=True), power=real(0, above=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MaskState:
        return _Relaxed(weights, steps, self)


class _Relaxed(MaskState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: Continuation) -> None:
        super().__init__(weights, steps)
        self._rule = rule
        self._show(0)

    def _show(self, step: int) -> None:
        """Set what pruned entries count, before the step of this number."""
        left = max(0.0, 1.0 - step / (self._rule.until * self.steps))
        for weight in self.weights:
            weight.pruned = left**self._rule.power

    def gradient(self, weight: Masked, step: int) -> None:
        weight.scale_gradient(weight.pruned)

    def stepped(self, step: int) -> None:
        if self.weights and self.weights[0].pruned > 0.0:
            for weight in self.weights:
                weight.reselect()
        self._show(step)
