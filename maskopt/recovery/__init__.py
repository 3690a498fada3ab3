"""Fitting masks and weights to the output of a block or of the model."""

from maskopt.recovery.admm import Splitting
from maskopt.recovery.base import Masked, MaskRule, MaskState, MovingRule, MovingState, Objective
from maskopt.recovery.bilevel import BiLevel
from maskopt.recovery.continuation import Continuation
from maskopt.recovery.exchange import DropAndGrow
from maskopt.recovery.fit import Fitted, clearly_smaller, fit
from maskopt.recovery.fixed import FixedMasks
from maskopt.recovery.frank_wolfe import FrankWolfeMasks
from maskopt.recovery.gumbel import GumbelMasks
from maskopt.recovery.policy_gradient import PolicyGradient
from maskopt.recovery.reselection import Reselection
from maskopt.recovery.settings import Level, Recovery

RULES: dict[str, type[MaskRule]] = {
    "continuation": Continuation,
    "fixed": FixedMasks,
    "reselection": Reselection,
    "admm": Splitting,
    "drop-and-grow": DropAndGrow,
    "frank-wolfe": FrankWolfeMasks,
    "bip": BiLevel,
    "policy-gradient": PolicyGradient,
    "gumbel": GumbelMasks,
}
"""Rules for masks by name."""

__all__ = [
    "RULES",
    "BiLevel",
    "Continuation",
    "DropAndGrow",
    "Fitted",
    "FixedMasks",
    "FrankWolfeMasks",
    "GumbelMasks",
    "Level",
    "MaskRule",
    "MaskState",
    "Masked",
    "MovingRule",
    "MovingState",
    "Objective",
    "PolicyGradient",
    "Recovery",
    "Reselection",
    "Splitting",
    "clearly_smaller",
    "fit",
]
