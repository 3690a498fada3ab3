"""Sums and quadratic forms of floats in exact arithmetic, for comparisons that rounding could decide wrongly."""

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
    "nearest_float",
    "summable",
    "summed",
]

WIDEST = 512
"""Number of inputs up to which doubtful sums are repeated exactly; beyond, one sum takes too long."""


def condition(inputs: int) -> float:
    """Return how many times larger than their sum the terms of an error may be before it is repeated exactly.

    The longer a sum, the more it costs to repeat it, and the more its terms exceed it on ordinary data.
    """
    return 64.0 + 2.0 * inputs**2


def integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return integers n and an exponent e such that values = n 2^e exactly.

    Parameters
    ----------
    values : ndarray
        Finite floats of any shape.

    Returns
    -------
    ndarray, int
        n, Python integers in the shape of `values`, and e.

    Examples
    --------
    >>> integers(np.array([0.5, 3.0]))
    (array([4503599627370496, 27021597764222976], dtype=object), -53)
    """
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
    """Return number * 2^exponent.

    Parameters
    ----------
    number, exponent : int
    """
    return Fraction(number << exponent) if exponent >= 0 else Fraction(number, 1 << -exponent)


def nearest_float(value: Fraction) -> float:
    """Return the float nearest to a number, infinity of its sign where that exceeds the range of floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def summed(values: Tensor) -> Fraction:
    """Return the exact sum of finite floats.

    Parameters
    ----------
    values : Tensor
        Finite, of any shape.
    """
    whole, exponent = integers(values.detach().double().cpu().numpy().reshape(-1))
    return fraction(sum(whole.tolist()), exponent)


def floor_of_sum(values: Tensor) -> float:
    """Return a float that is not above the exact sum: the largest one for vectors of up to 2^16 entries.

    Parameters
    ----------
    values : Tensor
        Finite, float64, shape (entries,).
    """
    if len(values) > 2**16:
        return float(values.sum()) - len(values) * 2.0**-52 * float(values.abs().sum())
    listed = values.tolist()
    try:
        total = math.fsum(listed)
    except OverflowError:
        return float(values.sum())
    return total if math.fsum([*listed, -total]) >= 0.0 else math.nextafter(total, -math.inf)


def summable(values: Tensor) -> Tensor:
    """Return the rows whose entries float64 adds up without rounding, any subset of them and in any order.

    Parameters
    ----------
    values : Tensor
        Finite, float64, shape (rows, entries).

    Returns
    -------
    Tensor
        Boolean, shape (rows,).
    """
    size = values.abs()
    small = torch.where(size > 0, size, torch.inf).amin(1)
    # Every entry has at most 24 digits, so that all are multiples of the last digit of the smallest.
    short = (values.float().double() == values).all(1)
    return short & (size.amax(1) * values.shape[1] <= 2.0**28 * small) & (small > 2.0**-100)


class ExactMatrix:
    """A symmetric matrix of floats as integers times a power of two.

    Parameters
    ----------
    matrix : Tensor
        Finite, shape (d, d).

    Attributes
    ----------
    whole : ndarray
        Python integers, shape (d, d).
    exponent : int
        The matrix is whole * 2^exponent.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.whole, self.exponent = integers(matrix.detach().double().cpu().numpy())
        # Digits so short that float64 adds up d products of two of them exactly.
        self._bits = (53 - len(self.whole).bit_length()) // 2
        self._digits: dict[int, np.ndarray] | None = None  # of `whole`, filled on demand

    def forms(self, vectors: np.ndarray, exponent: int) -> list[Fraction]:
        """Return v^T A v for each row v of vectors * 2^exponent.

        The matrix and the vectors are cut into digits, whose products are matrix products in float64, without rounding.

        Parameters
        ----------
        vectors : ndarray
            Python integers, shape (vectors, d).
        exponent : int
        """
        if self._digits is None:
            self._digits = _digits(self.whole, self._bits)
        levels: dict[int, np.ndarray] = {}
        for low, part in _digits(vectors, self._bits).items():
            for high, lines in self._digits.items():
                product = (part @ lines).astype(np.int64)
                levels[low + high] = levels[low + high] + product if low + high in levels else product
        total = np.zeros(vectors.shape, dtype=object)
        for shift, level in levels.items():
            total = total + (level.astype(object) << shift)
        return [fraction(int(number), 2 * exponent + self.exponent) for number in (total * vectors).sum(1)]


def _digits(whole: np.ndarray, bits: int) -> dict[int, np.ndarray]:
    """Return float64 arrays whose sum, each times 2 to its key, is an array of Python integers; none of them is zero.

    No entry is larger than 2^bits.
    """
    rest, sign, found, shift = np.abs(whole), np.where(whole < 0, -1.0, 1.0), dict[int, np.ndarray](), 0
    while rest.any():
        part = (rest & ((1 << bits) - 1)).astype(np.float64)
        if part.any():
            found[shift] = part * sign
        rest, shift = rest >> bits, shift + bits
    return found


def exact_difference(one: Tensor, other: Tensor) -> tuple[np.ndarray, int]:
    """Return one - other as integers times a power of two.

    Parameters
    ----------
    one, other : Tensor
        Finite, of one shape.

    Returns
    -------
    ndarray, int
        Python integers n in that shape and an exponent e; the difference is n 2^e.
    """
    pair = torch.stack((one.detach().double(), other.detach().double())).cpu().numpy()
    whole, exponent = integers(pair)
    return whole[0] - whole[1], exponent
