"""The narrow interface through which solvers see an objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskopt.problems.shifted import ShiftedQuadratic

__all__ = ["Direction", "Point", "Problem", "Quadratic"]


@dataclass(frozen=True, slots=True)
class Point:
    """A relaxed mask and the gradient of the (unshifted) objective there.

    Parameters
    ----------
    x : Tensor
        Relaxed keep mask, shape (rows, d); 1 keeps, 0 prunes.
    gradient : Tensor
        Shape (rows, d).
    """

    x: Tensor
    gradient: Tensor

    def take(self, index: Tensor) -> Point:
        """Return a copy for some rows."""
        return Point(self.x[index], self.gradient[index])


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction and its Hessian product.

    Attributes
    ----------
    vector : Tensor
        The direction, shape (rows, d).
    product : Tensor
        The Hessian times the direction, which is the change of the gradient by it, shape (rows, d). Empty where the
        objective is not quadratic.
    """

    vector: Tensor
    product: Tensor

    def blend_(self, other: Direction, fraction: Tensor) -> None:
        """Become (1 - fraction) * self + fraction * other in place; `fraction` has shape (rows, 1)."""
        self.vector.lerp_(other.vector, fraction)
        self.product.lerp_(other.product, fraction)

    def scale_(self, factor: Tensor) -> None:
        """Multiply each row in place; `factor` has shape (rows, 1)."""
        self.vector.mul_(factor)
        self.product.mul_(factor)

    def take(self, index: Tensor) -> Direction:
        """Return a copy for some rows."""
        return Direction(self.vector[index], self.product[index] if len(self.product) else self.product)


class Problem(ABC):
    """A function of relaxed keep masks x in [0, 1]^(rows x d), a sum of one term per row.

    What is expensive has a method of its own: `evaluate`, called to start; `hvp`, called once for every new direction;
    and `advance`. For a `Quadratic` the last costs no matrix product; for other functions `hvp` costs none.
    """

    coupled: bool = False
    """Whether all rows have one value in common: then steps are common too, and each row reports an equal part."""

    unit: float = 1.0
    """Objectives are `unit` times what `value` and `gradient` say."""

    lowest: float = -math.inf
    """No row of a mask has a smaller objective."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, d)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating-point type the solvers work in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device the solvers work on."""

    @abstractmethod
    def evaluate(self, x: Tensor) -> Point:
        """Return the point of the relaxed mask `x`, shape (rows, d); `x` is not copied, the gradient is new."""

    @abstractmethod
    def hvp(self, x: Tensor) -> Direction:
        """Return the direction `x`, shape (rows, d), with its Hessian product; `x` is not copied."""

    @abstractmethod
    def advance(self, point: Point, direction: Direction, step_size: Tensor) -> None:
        """Add `step_size` (shape (rows, 1)) times `direction` to the point in place."""

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Return the objective of each row in `unit`, float64, shape (rows,)."""

    @abstractmethod
    def slope(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        """Return each row's derivative in `direction` after a step of `step_size`, both shape (rows,)."""

    def change(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        """Return each row's change of the objective by a step of `step_size` in `direction`, both shape (rows,)."""
        there = torch.addcmul(point.x, direction.vector, step_size.unsqueeze(1))
        return (self.value(self.evaluate(there)) - self.value(point)).to(step_size.dtype)

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        """Return an unbiased estimate of the gradient at `x` that costs about `fraction` of the whole."""
        return self.gradient(self.evaluate(x))

    def gradient(self, point: Point) -> Tensor:
        """Return the derivative by x, shape (rows, d); read only, it may be the point's own."""
        return point.gradient

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Problem:
        """Return the same objective for some rows: a slice (data is shared) or a vector of row numbers."""

    @abstractmethod
    def objective(self, mask: Tensor) -> Tensor:
        """Return each row's objective of a boolean mask, evaluated from scratch in float64, shape (rows,)."""

    def exact_objective(self, mask: Tensor) -> list[Fraction] | None:
        """Return each row's objective of a boolean mask without any rounding; None where that is not possible."""
        return None

    @abstractmethod
    def scale(self) -> Tensor:
        """Return each row's objective of pruning everything: relative errors divide by it. Float64, shape (rows,)."""

    @abstractmethod
    def double(self) -> Problem:
        """Return the same objective in float64, for figures that have to be proven."""

    @abstractmethod
    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor | None:
        """Return how far each row may lie below its linear model at `point` anywhere in the unit cube; None: unknown.

        Zero for a convex function, up to the rounding of `value` and `gradient`, which is included. Proven, in
        float64; meant for problems made by `double`. In `unit`, shape (rows,).

        Parameters
        ----------
        point : Point
            Where the linear model is made.
        shift : Tensor, optional
            Answer for the objective plus sum_i shift_i (x_i - x_i^2) instead, shape (rows, d).
        """

    def unshifted(self) -> Problem:
        """Return the objective without shifts: the same on every mask."""
        return self

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> Problem:
        """Return this objective plus amount * sum_i diagonal_i (x_i - x_i^2), which no mask can see.

        x - x^2 >= 0, so a positive diagonal raises the relaxation: it tightens bounds as long as the sum stays
        convex, and makes the relaxation concave and its local minima masks beyond that (continuation).

        Parameters
        ----------
        diagonal : Tensor
            Shape (rows, d).
        amount : float
            Multiplies the diagonal; kept apart so that a schedule costs no new tensor.
        """
        from maskopt.problems.shifted import Shifted

        return Shifted(self, diagonal, amount)


def shift_convexity_error(point: Point, shift: Tensor | None) -> Tensor:
    """Return how far sum_i shift_i (x_i - x_i^2) may fall below its linear model at `point`, per row."""
    if shift is None:
        return point.x.new_zeros(len(point.x), dtype=torch.float64)
    farthest = torch.maximum(point.x, 1.0 - point.x).double().square()
    return farthest.mul_(shift.double().clamp_min(0.0)).sum(1)


class Quadratic(Problem):
    """An objective with a constant Hessian.

    Gradients are affine in x, so points are updated without a new evaluation, exact line searches and conjugate
    directions cost nothing, and all of that holds for shifted objectives too.
    """

    def advance(self, point: Point, direction: Direction, step_size: Tensor) -> None:
        point.x.addcmul_(direction.vector, step_size)
        point.gradient.addcmul_(direction.product, step_size)

    def slope(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        start: Tensor = torch.linalg.vecdot(self.gradient(point), direction.vector)
        curvature: Tensor = torch.linalg.vecdot(self.hessian(direction), direction.vector)
        return start + step_size * curvature

    def change(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        start: Tensor = torch.linalg.vecdot(self.gradient(point), direction.vector)
        curvature: Tensor = torch.linalg.vecdot(self.hessian(direction), direction.vector)
        return step_size * (start + 0.5 * step_size * curvature)

    def hessian(self, direction: Direction) -> Tensor:
        """Return the second derivative times `direction`, shape (rows, d); read only, it may be the direction's own."""
        return direction.product

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the coefficients of x_i^2, shape (rows, d)."""

    @abstractmethod
    def smoothness(self) -> Tensor:
        """Return a proven upper bound of the largest eigenvalue of each row's Hessian (its size), shape (rows,)."""

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Quadratic: ...

    @abstractmethod
    def double(self) -> Quadratic: ...

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> ShiftedQuadratic:
        from maskopt.problems.shifted import ShiftedQuadratic

        return ShiftedQuadratic(self, diagonal, amount)
