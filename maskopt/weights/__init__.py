"""What the surviving weights become: least squares on a mask, and methods that choose mask and weights together."""

from maskopt.weights.alps import ALPS
from maskopt.weights.base import Joint, System

__all__ = ["ALPS", "Joint", "System"]
