"""Masks that move by continuation: pruned weights take part a little at first, and less and less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["Continuation"]


@dataclass(frozen=True)
class Continuation(MovingRule):
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

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, power=real(0, above=True))

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Relaxed(weights, steps, self)


class _Relaxed(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: Continuation) -> None:
        super().__init__(weights, steps, rule)
        self._power = rule.power
        for weight in weights:
            weight.pruned = 1.0

    def free(self, weight: Masked) -> None:
        weight.scale_gradient(weight.pruned)

    def move(self, step: int) -> None:
        for weight in self.weights:
            weight.reselect()
            weight.pruned = self.left(step) ** self._power
