"""How fast the blocks of a model make up for what is lost before them."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

__all__ = ["attenuation"]

_STRONGEST = 3.0  # e^-3 of what the first block loses is left at the end


def attenuation(losses: np.ndarray, behind: np.ndarray, left: float) -> float:
    """Return the rate a >= 0 with sum_l losses_l exp(-a behind_l) = left * sum_l losses_l.

    Parameters
    ----------
    losses : ndarray
        At least 0.
    behind : ndarray
        How much of the model lies behind each layer, in [0, 1].
    left : float
        The share of all losses that is left. At 1 or more the rate is 0, and it is 3 at most, so that a share too small
        to be reached stays finite.
    """

    def excess(rate: float) -> float:
        return float((losses * np.exp(-rate * behind)).sum() - left * losses.sum())

    if not excess(0.0) > 0:
        return 0.0
    return _STRONGEST if excess(_STRONGEST) >= 0 else float(brentq(excess, 0.0, _STRONGEST))
