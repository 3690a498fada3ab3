"""Fitting masks and weights to the output of a block or of the model."""

from maskopt.recovery.base import Masked, MaskRule, MaskState, Objective
from maskopt.recovery.continuation import Continuation
from maskopt.recovery.fit import Fitted, clearly_smaller, fit
from maskopt.recovery.fixed import FixedMasks
from maskopt.recovery.reselection import Reselection
from maskopt.recovery.settings import Level, Recovery

__all__ = [
    "Continuation",
    "Fitted",
    "FixedMasks",
    "Level",
    "MaskRule",
    "MaskState",
    "Masked",
    "Objective",
    "Recovery",
    "Reselection",
    "clearly_smaller",
    "fit",
]
