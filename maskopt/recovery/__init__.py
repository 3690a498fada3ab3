"""Fitting masks and weights to the output of a block or of the model."""

from maskopt.recovery.admm import Splitting
from maskopt.recovery.base import Masked, MaskRule, MaskState, Objective
from maskopt.recovery.continuation import Continuation
from maskopt.recovery.exchange import DropAndGrow
from maskopt.recovery.fit import Fitted, clearly_smaller, fit
from maskopt.recovery.fixed import FixedMasks
from maskopt.recovery.frank_wolfe import FrankWolfeMasks
from maskopt.recovery.reselection import Reselection
from maskopt.recovery.settings import Level, Recovery

RULES: dict[str, type[MaskRule]] = {
    "continuation": Continuation,
    "fixed": FixedMasks,
    "reselection": Reselection,
    "admm": Splitting,
    "drop-and-grow": DropAndGrow,
    "frank-wolfe": FrankWolfeMasks,
}
"""Rules for masks by name."""

__all__ = [
    "RULES",
    "Continuation",
    "DropAndGrow",
    "Fitted",
    "FixedMasks",
    "FrankWolfeMasks",
    "Level",
    "MaskRule",
    "MaskState",
    "Masked",
    "Objective",
    "Recovery",
    "Reselection",
    "Splitting",
    "clearly_smaller",
    "fit",
]
