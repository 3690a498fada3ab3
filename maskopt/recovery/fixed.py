"""Masks that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskopt.recovery.base import Masked, MaskRule, MaskState

__all__ = ["FixedMasks"]


@dataclass(frozen=True)
class FixedMasks(MaskRule):
    """Keeps all masks: only the weights are fitted.

    Examples
    --------
    >>> from maskopt.recovery import FixedMasks
    >>> FixedMasks().moves
    False
    """

    def begin(self, weights: Sequence[Masked], steps: int) -> MaskState:
        return MaskState(weights, steps)
