"""What the surviving weights become: least squares on a mask, and methods that choose mask and weights together."""

from maskopt.weights.admm import ADMM
from maskopt.weights.alps import ALPS
from maskopt.weights.base import Joint, System
from maskopt.weights.fista import FISTAPruner
from maskopt.weights.sparsegpt import SparseGPT

__all__ = ["ADMM", "ALPS", "FISTAPruner", "Joint", "SparseGPT", "System"]
