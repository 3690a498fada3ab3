"""Objectives with a diagonal shift: the same value for every mask, another relaxation."""

from fractions import Fraction

import torch
from torch import Tensor

from maskopt.problems.base import Direction, Point, Problem, Quadratic

__all__ = ["Shifted", "ShiftedQuadratic"]


class Shifted(Problem):
    """The objective f(x) + amount * sum_i diagonal_i (x_i - x_i^2).

    A mask has x_i^2 = x_i, so the added term is zero for every mask. Since x - x^2 >= 0 on [0, 1], a positive diagonal
    raises the relaxation: it tightens bounds as long as the sum stays convex; beyond that it makes the relaxation
    concave, until its local minima are masks (continuation). Points of the base problem are points of this one.

    Parameters
    ----------
    base : Problem
        The objective f.
    diagonal : Tensor
        Shape (rows, d).
    amount : float
        Multiplies the diagonal; separate, so that a schedule of amounts needs no new tensors.

    References
    ----------
    Convex shifts: Hammer and Rubin, Some remarks on quadratic programming with 0-1 variables, RIRO 4, 1970; the best
    ones: Billionnet, Elloumi and Plateau, Discrete Applied Mathematics 157, 2009. Concave shifts: Giannessi and
    Niccolucci, Connections between nonlinear and integer programming problems, Symposia Mathematica 19, 1976.

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import synthetic
    >>> layer = synthetic(rows=1, d=4).problem()
    >>> shifted = layer.shifted(layer.diagonal(), amount=0.1)
    >>> mask = torch.tensor([[True, False, True, False]])
    >>> torch.equal(layer.objective(mask), shifted.objective(mask))
    True
    >>> half = torch.full((1, 4), 0.5)
    >>> bool(shifted.value(shifted.evaluate(half)) > layer.value(layer.evaluate(half)))
    True
    """

    def __init__(self, base: Problem, diagonal: Tensor, amount: float = 1.0) -> None:
        self.base = base
        self.shift = diagonal
        self.amount = amount
        self.coupled = base.coupled
        self.unit = base.unit
        self.lowest = base.lowest

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def evaluate(self, x: Tensor) -> Point:
        return self.base.evaluate(x)

    def hvp(self, x: Tensor) -> Direction:
        return self.base.hvp(x)

    def advance(self, point: Point, direction: Direction, step_size: Tensor) -> None:
        self.base.advance(point, direction, step_size)

    def value(self, point: Point) -> Tensor:
        x = point.x
        return self.base.value(point) + self.amount * (self.shift * (x - x * x)).sum(1, dtype=torch.float64)

    def slope(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        there = torch.addcmul(point.x, direction.vector, step_size.unsqueeze(1))
        added = (self.shift * direction.vector * (1.0 - 2.0 * there)).sum(1).mul_(self.amount)
        return self.base.slope(point, direction, step_size) + added

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        return self.base.sampled(x, fraction, random) + self.amount * self.shift * (1.0 - 2.0 * x)

    def gradient(self, point: Point) -> Tensor:
        gradient = self.base.gradient(point).add(self.shift, alpha=self.amount)
        return gradient.addcmul_(self.shift, point.x, value=-2.0 * self.amount)

    def rows(self, index: slice | Tensor) -> Problem:
        return self.base.rows(index).shifted(self.shift[index], self.amount)

    def objective(self, mask: Tensor) -> Tensor:
        return self.base.objective(mask)

    def exact_objective(self, mask: Tensor) -> list[Fraction] | None:
        return self.base.exact_objective(mask)

    def scale(self) -> Tensor:
        return self.base.scale()

    def double(self) -> Problem:
        return self.base.double().shifted(self.shift.double(), self.amount)

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor | None:
        own = self.shift * self.amount
        return self.base.convexity_error(point, own if shift is None else own + shift)

    def unshifted(self) -> Problem:
        return self.base.unshifted()


class ShiftedQuadratic(Shifted, Quadratic):
    """A shifted objective whose base is quadratic, and which therefore is quadratic.

    Parameters
    ----------
    base : Quadratic
    diagonal, amount
        As for `Shifted`.
    """

    base: Quadratic

    # Those of Shifted would sum the added term separately; `hessian` includes it already.
    slope = Quadratic.slope
    change = Quadratic.change

    def hessian(self, direction: Direction) -> Tensor:
        return torch.addcmul(self.base.hessian(direction), self.shift, direction.vector, value=-2.0 * self.amount)

    def diagonal(self) -> Tensor:
        return self.base.diagonal() - self.amount * self.shift

    def smoothness(self) -> Tensor:
        return self.base.smoothness() + 2.0 * abs(self.amount) * self.shift.abs().amax(1)

    def rows(self, index: slice | Tensor) -> Quadratic:
        return self.base.rows(index).shifted(self.shift[index], self.amount)

    def double(self) -> Quadratic:
        return self.base.double().shifted(self.shift.double(), self.amount)


# Set here, because these classes are made from the two.
Problem._shift_class = Shifted
Quadratic._shift_class = ShiftedQuadratic
