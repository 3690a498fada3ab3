"""Masks that move by straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from maskopt.checks import check_settings, real
from maskopt.recovery.base import Masked, MaskRule, MaskState

__all__ = ["Reselection"]


@dataclass(frozen=True)
class Reselection(MaskRule):
    """Gives pruned weights the gradients of kept ones and selects the mask anew after every step.

    The module computes with m * w; the gradient goes to all of w (straight-through estimation). The mask is that of
    `Continuation`.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in [0, 1].

    References
    ----------
    A. Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR 2021
    (arXiv 2102.04010), section 3: straight-through gradients for masks.

    Examples
    --------
    >>> from maskopt.recovery import Reselection
    >>> Reselection(until=0.5).moves
    True
    """

    until: float = 0.6

    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, until=real(0, 1))

    def begin(self, weights: Sequence[Masked], steps: int) -> MaskState:
        return _StraightThrough(weights, steps, self)


class _StraightThrough(MaskState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: Reselection) -> None:
        super().__init__(weights, steps)
        self._last = rule.until * steps

    def gradient(self, weight: Masked, step: int) -> None:
        if step >= self._last:
            super().gradient(weight, step)

    def stepped(self, step: int) -> None:
        if step <= self._last:
            for weight in self.weights:
                weight.reselect()
