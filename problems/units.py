"""Powers of two divided out of data, so that squares and sums of extreme data stay inside the range of floats."""

import math

from torch import Tensor

from maskopt.errors import MaskoptError

__all__ = ["divided", "layer_units"]


def layer_units(weight: Tensor, gram: Tensor, target: Tensor | None = None) -> tuple[float, float]:
    """Return the units in which a layer's weight and Gram are stored for the solvers.

    Division by a power of two changes no digit. Data of ordinary size have the units one.

    Parameters
    ----------
    weight : Tensor
        Shape (rows, d).
    gram : Tensor
        Shape (d, d).
    target : Tensor, optional
        Shape (rows, d); in the unit of the weight.

    Returns
    -------
    float, float
        Powers of two. The unit of errors is the product of the first's square and the second.

    Raises
    ------
    MaskoptError
        If errors of the layer may exceed the range of float64.
    """
    largest = max(float(matrix.abs().max()) for matrix in (weight, target) if matrix is not None)
    widest = float(gram.diagonal().max())
    # An error is at most (d * largest)^2 * widest per row.
    if 2 * _exponent(largest * weight.shape[1]) + _exponent(widest) > 1020:
        raise MaskoptError("Weight and Gram are so large that the error of the layer exceeds float64; scale them down.")
    weight_unit, gram_unit = _power_of_two(largest), _power_of_two(widest)
    # The unit of errors must not underflow, though errors themselves may.
    power = 2 * round(math.log2(weight_unit)) + round(math.log2(gram_unit))
    return math.ldexp(weight_unit, max(0, (-1000 - power + 1) // 2)), gram_unit


def divided(matrix: Tensor, unit: float) -> Tensor:
    """Return a matrix divided by a power of two, in its type; the matrix itself if that is one.

    Parameters
    ----------
    matrix : Tensor
    unit : float
        A power of two.
    """
    # Through float64: the unit of subnormal float32 data is itself no float32 number.
    return matrix if unit == 1.0 else (matrix.double() / unit).to(matrix.dtype)


def _power_of_two(size: float) -> float:
    """Return one for data of ordinary size, else the power of two that brings `size` near one."""
    if size <= 0.0 or 2.0**-24 <= size <= 2.0**24:
        return 1.0
    return 2.0 ** round(math.log2(size))


def _exponent(size: float) -> int:
    """Return the binary exponent of a number; of infinity, one beyond every number's."""
    return math.frexp(size)[1] if size < math.inf else 2000
