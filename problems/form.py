"""A plain quadratic form, with one matrix for all rows."""

from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from maskopt.checks import matrix
from maskopt.errors import MaskoptError
from maskopt.exact import WIDEST, ExactMatrix, condition, nearest_float, summed
from maskopt.problems.base import Direction, Point, Quadratic, shift_convexity_error
from maskopt.problems.checks import symmetrised
from maskopt.problems.convexity import eigenvalue_floor

__all__ = ["QuadraticForm"]


class QuadraticForm(Quadratic):
    """x^T Q x + <c, x> for each row x of the mask, with the same Q for all rows.

    Parameters
    ----------
    quadratic : Tensor
        Q, shape (d, d), symmetric up to rounding: the attribute `quadratic` is the mean of Q and its transpose. It need
        not be positive semidefinite, but lower bounds are useful only where it is.
    linear : Tensor
        c, shape (rows, d).

    Raises
    ------
    MaskoptError
        If shapes disagree, an entry is not finite, or Q is not symmetric.

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import QuadraticForm
    >>> problem = QuadraticForm(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[-2.0, 0.0]]))
    >>> problem.objective(torch.tensor([[True, False]])), problem.objective(torch.tensor([[True, True]]))
    (tensor([-1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    def __init__(self, quadratic: Tensor, linear: Tensor) -> None:
        quadratic, linear = matrix("matrix Q", quadratic), matrix("linear term", linear)
        if linear.ndim != 2 or quadratic.shape != (linear.shape[1], linear.shape[1]):
            raise MaskoptError(
                f"A quadratic form needs Q (d, d) and c (rows, d); got {tuple(quadratic.shape)} and "
                f"{tuple(linear.shape)}."
            )
        if not bool(torch.isfinite(quadratic).all()) or not bool(torch.isfinite(linear).all()):
            raise MaskoptError("A quadratic form needs finite entries.")
        if not torch.allclose(quadratic, quadratic.T, rtol=1e-5, atol=1e-6 * float(quadratic.abs().max())):
            raise MaskoptError("The matrix of a quadratic form must be symmetric; take (Q + Q^T) / 2.")
        self.quadratic, self.linear = symmetrised(quadratic), linear

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape[0], self.linear.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.dtype

    @property
    def device(self) -> torch.device:
        return self.linear.device

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, torch.addmm(self.linear, x, self.quadratic, alpha=2.0))

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, (x @ self.quadratic).mul_(2.0))

    def value(self, point: Point) -> Tensor:
        return (point.gradient + self.linear).mul_(point.x).sum(1, dtype=torch.float64).mul_(0.5)

    def objective(self, mask: Tensor) -> Tensor:
        x, exact = mask.double(), self.double()
        values = ((x @ exact.quadratic).add_(exact.linear)).mul_(x).sum(1)
        if self.shape[1] > WIDEST:
            return values
        # Where terms cancel, the sum is repeated in exact arithmetic.
        size = ((x @ exact.quadratic.abs()).add_(exact.linear.abs())).mul_(x).sum(1)
        index = (values.abs() * condition(self.shape[1]) < size).nonzero().flatten()
        if len(index):
            whole = self._exact_values(mask[index], self.linear[index])
            values[index] = torch.tensor([nearest_float(value) for value in whole], dtype=torch.float64).to(values)
        return values

    def exact_objective(self, mask: Tensor) -> list[Fraction]:
        return self._exact_values(mask, self.linear)

    def _exact_values(self, mask: Tensor, linear: Tensor) -> list[Fraction]:
        places = mask.long().cpu().numpy().astype(object)
        sums = (summed(row[kept]) for row, kept in zip(linear, mask, strict=True))
        return [form + part for form, part in zip(self._exact_matrix.forms(places, 0), sums, strict=True)]

    @cached_property
    def _exact_matrix(self) -> ExactMatrix:
        return ExactMatrix(self.quadratic)

    def scale(self) -> Tensor:
        # Pruning everything gives zero; gaps are relative to the sum of all terms' absolute values instead.
        exact = self.double()
        return exact.quadratic.abs().sum() + exact.linear.abs().sum(1)

    def rows(self, index: slice | Tensor) -> "QuadraticForm":
        return self._with(self.quadratic, self.linear[index])

    def double(self) -> "QuadraticForm":
        return self._with(self.quadratic.double(), self.linear.double())

    def _with(self, quadratic: Tensor, linear: Tensor) -> "QuadraticForm":
        form = object.__new__(QuadraticForm)
        form.quadratic, form.linear = quadratic, linear
        return form

    def diagonal(self) -> Tensor:
        return self.quadratic.diagonal().expand(self.shape)

    def smoothness(self) -> Tensor:
        return self.quadratic.abs().sum(1).amax().mul(2.0).expand(self.shape[0])

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        matrix = self.quadratic.double()
        floor = eigenvalue_floor(matrix)
        if floor is None:
            # No eigenvalue lies further below zero (Gershgorin).
            floor = -float(matrix.abs().sum(1).amax())
        farthest = torch.maximum(point.x, 1.0 - point.x).double().square().sum(1)
        rounding = (self.shape[1] + 8) * 2.0**-50 * self.scale()
        return shift_convexity_error(point, shift) - floor * farthest + rounding
