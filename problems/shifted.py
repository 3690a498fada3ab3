"""Diagonal terms moved between the quadratic and the linear part: the same masks, another relaxation."""

import torch
from torch import Tensor

from maskopt.problems.base import Move, Point, Problem

__all__ = ["Shifted"]


class Shifted(Problem):
    """f(x) + amount * sum_i diagonal_i (x_i - x_i^2).

    On masks x_i^2 = x_i, so the added term is zero there whatever `amount` is. Points of the base problem are
    points of this one: nothing carried changes.

    Parameters
    ----------
    base : Problem
        The objective f.
    diagonal : Tensor
        Shape (rows, d).
    amount : float
        Multiplies the diagonal; kept apart so that a schedule costs no new tensor.
    """

    def __init__(self, base: Problem, diagonal: Tensor, amount: float = 1.0) -> None:
        self.base = base
        self.shift = diagonal
        self.amount = amount

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def at(self, x: Tensor) -> Point:
        return self.base.at(x)

    def along(self, x: Tensor) -> Move:
        return self.base.along(x)

    def value(self, point: Point) -> Tensor:
        x = point.x
        return self.base.value(point) + self.amount * (self.shift * (x - x * x)).sum(1, dtype=torch.float64)

    def gradient(self, point: Point) -> Tensor:
        gradient = self.base.gradient(point).add(self.shift, alpha=self.amount)
        return gradient.addcmul_(self.shift, point.x, value=-2.0 * self.amount)

    def hessian(self, move: Move) -> Tensor:
        return torch.addcmul(self.base.hessian(move), self.shift, move.x, value=-2.0 * self.amount)

    def diagonal(self) -> Tensor:
        return self.base.diagonal() - self.amount * self.shift

    def rows(self, index: slice) -> "Shifted":
        return Shifted(self.base.rows(index), self.shift[index], self.amount)

    def objective(self, mask: Tensor) -> Tensor:
        return self.base.objective(mask)

    def scale(self) -> Tensor:
        return self.base.scale()
