"""Quadratic forms of floats without any rounding: for comparisons that float64 sums could get wrong."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "WIDEST",
    "ExactMatrix",
    "condition",
    "exact_difference",
    "floor_of_sum",
    "fraction",
    "integers",
    "rounded",
    "summable",
    "summed",
]

WIDEST = 512
"""Inputs up to which sums are repeated exactly where float64 is in doubt; beyond, one sum takes too long."""


def condition(inputs: int) -> float:
    """Return how many times larger than their sum the terms of an error may be before it is repeated exactly.

    The longer a sum, the more it costs to repeat it, and the more its terms exceed it on ordinary data.
    """
    return 64.0 + 2.0 * inputs**2


def integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return Python integers n, in the shape of `values`, and an exponent e such that values = n 2^e exactly."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    exponent = exponent - 53
    lowest = int(exponent[whole != 0].min(initial=2**30))
    shifts = np.where(whole != 0, exponent - lowest, 0)
    exact = [int(n) << int(by) for n, by in zip(whole.flat, shifts.flat, strict=True)]
    found = np.empty(values.size, dtype=object)
    found[:] = exact
    return found.reshape(values.shape), lowest if lowest < 2**30 else 0


def fraction(number: int, exponent: int) -> Fraction:
    """Return number 2^exponent."""
    return Fraction(number << exponent) if exponent >= 0 else Fraction(number, 1 << -exponent)


def rounded(value: Fraction) -> float:
    """Return the nearest float; infinity where there is none."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def summed(values: Tensor) -> Fraction:
    """Return the sum of finite floats."""
    whole, exponent = integers(values.detach().double().cpu().numpy().reshape(-1))
    return fraction(sum(whole.tolist()), exponent)


def floor_of_sum(values: Tensor) -> float:
    """Return the largest float that is not above the sum of finite floats; for long vectors one a little smaller."""
    if len(values) > 2**16:
        return float(values.sum()) - len(values) * 2.0**-52 * float(values.abs().sum())
    listed = values.tolist()
    try:
        total = math.fsum(listed)
    except OverflowError:
        return float(values.sum())
    return total if math.fsum([*listed, -total]) >= 0.0 else math.nextafter(total, -math.inf)


def summable(values: Tensor) -> Tensor:
    """Return for which rows of finite numbers, shape (rows, entries), float64 adds up any entries without rounding."""
    size = values.abs()
    small = torch.where(size > 0, size, torch.inf).amin(1)
    # Every entry has 24 digits or fewer, so that all are multiples of the least one's last digit.
    short = (values.float().double() == values).all(1)
    return short & (size.amax(1) * values.shape[1] <= 2.0**28 * small) & (small > 2.0**-100)


class ExactMatrix:
    """A symmetric matrix of floats as integers times a power of two.

    Parameters
    ----------
    matrix : Tensor
        Finite, shape (d, d).
    """

    def __init__(self, matrix: Tensor) -> None:
        self.whole, self.exponent = integers(matrix.detach().double().cpu().numpy())

    def form(self, vector: np.ndarray, exponent: int) -> Fraction:
        """Return v^T A v for v = `vector` 2^exponent, given as integers, shape (d,)."""
        some = np.flatnonzero(vector)
        if not len(some):
            return Fraction(0)
        part = vector[some]
        total = part @ (self.whole[np.ix_(some, some)] @ part)
        return fraction(int(total), 2 * exponent + self.exponent)

    def times(self, vector: np.ndarray, entries: list[int]) -> list[int]:
        """Return some entries of A v for a vector of integers, in units of 2^`exponent`."""
        some = np.flatnonzero(vector)
        part = vector[some]
        return [int(self.whole[entry, some] @ part) if len(some) else 0 for entry in entries]


def exact_difference(one: Tensor, other: Tensor) -> tuple[np.ndarray, int]:
    """Return one - other, both of one shape, as integers times a power of two."""
    pair = torch.stack((one.detach().double(), other.detach().double())).cpu().numpy()
    whole, exponent = integers(pair)
    return whole[0] - whole[1], exponent
