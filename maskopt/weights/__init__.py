"""Updates of the surviving weights: least squares on a mask, and methods that choose mask and weights together."""

from maskopt.weights.admm import ADMM
from maskopt.weights.alps import ALPS
from maskopt.weights.base import Joint, System
from maskopt.weights.conditional import ConditionalADMM, conditional_deviations
from maskopt.weights.fista import FISTAPruner
from maskopt.weights.least_squares import LeastSquares, conjugate_gradients, exact_weights
from maskopt.weights.registry import WEIGHTS, make_weights
from maskopt.weights.sparsegpt import SparseGPT

__all__ = [
    "ADMM",
    "ALPS",
    "WEIGHTS",
    "ConditionalADMM",
    "FISTAPruner",
    "Joint",
    "LeastSquares",
    "SparseGPT",
    "System",
    "conditional_deviations",
    "conjugate_gradients",
    "exact_weights",
    "make_weights",
]
