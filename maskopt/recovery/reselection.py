"""Masks that move by straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["Reselection"]


@dataclass(frozen=True)
class Reselection(MovingRule):
    """Gives pruned weights the gradients of kept ones and selects the mask anew after every step.

    The module computes with m * w; the gradient goes to all of w (straight-through estimation). The mask is that of
    `Continuation`.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].

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

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _StraightThrough(weights, steps, self)


class _StraightThrough(MovingState):
    def move(self, step: int) -> None:
        for weight in self.weights:
            weight.reselect()
