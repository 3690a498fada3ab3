"""The interface of an objective to solvers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

__all__ = ["Direction", "GradientOnly", "Point", "Problem", "Quadratic"]


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

    Each expensive operation has a method of its own: `evaluate`, called to start; `hvp`, called once for every new
    direction; and `advance`. For a `Quadratic` `advance` costs no matrix product; for other functions `hvp` costs none.

    Class attributes
    ----------------
    coupled : bool
        Whether the objective is one number for all rows. Then all rows take the same steps, and each reports an equal
        part of the objective.
    unit : float
        The objective is `unit` times what `value`, `slope` and `change` return.
    lowest : float
        A lower bound on each row's objective, valid for every mask.
    """

    _shift_class: ClassVar[type[Any]]
    """What `shifted` returns; `maskopt.problems.shifted`, which imports this module, sets it."""

    coupled: bool = False
    unit: float = 1.0
    lowest: float = -math.inf

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
        """Return the point of the relaxed mask `x`, with its gradient.

        Parameters
        ----------
        x : Tensor
            In [0, 1], shape (rows, d); it is not copied.
        """

    @abstractmethod
    def hvp(self, x: Tensor) -> Direction:
        """Return a direction with its Hessian product.

        Parameters
        ----------
        x : Tensor
            The direction, shape (rows, d); it is not copied.
        """

    @abstractmethod
    def advance(self, point: Point, direction: Direction, step_size: Tensor) -> None:
        """Replace the point by point + step_size * direction, in place; `step_size` has shape (rows, 1)."""

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Return the objective of each row in `unit`, float64, shape (rows,)."""

    @abstractmethod
    def slope(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        """Return each row's directional derivative at point + step_size * direction, both of shape (rows,)."""

    def change(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        """Return each row's change of the objective by the step `step_size` in `direction`, both of shape (rows,)."""
        there = torch.addcmul(point.x, direction.vector, step_size.unsqueeze(1))
        return (self.value(self.evaluate(there)) - self.value(point)).to(step_size.dtype)

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        """Return an unbiased estimate of the gradient at `x` at about `fraction` of the cost of the whole gradient."""
        return self.gradient(self.evaluate(x))

    def gradient(self, point: Point) -> Tensor:
        """Return the gradient, shape (rows, d); read only, as it may be the tensor that the point holds."""
        return point.gradient

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Problem:
        """Return the same objective for some rows: a slice (data is shared) or a vector of row numbers."""

    @abstractmethod
    def objective(self, mask: Tensor) -> Tensor:
        """Return each row's objective of a boolean mask, evaluated from scratch in float64, shape (rows,)."""

    def exact_objective(self, mask: Tensor) -> list[Fraction] | None:
        """Return each row's objective of a boolean mask in rational arithmetic; None where that is not possible."""
        return None

    @abstractmethod
    def scale(self) -> Tensor:
        """Return each row's objective when everything is pruned, float64, shape (rows,).

        Relative errors are relative to it.
        """

    @abstractmethod
    def double(self) -> Problem:
        """Return the same objective in float64, for numbers that have to be proven."""

    @abstractmethod
    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor | None:
        """Return a proven bound on how far each row's objective may lie below its linear model at `point`.

        The linear model f(x) + <grad f(x), y - x> of a convex function is a lower bound of f(y); of any function, the
        linear model less this number is one, for all y in the unit cube. The rounding errors of `value` and `gradient`
        are included. Meant for problems returned by `double`.

        Parameters
        ----------
        point : Point
            Where the linear model is taken.
        shift : Tensor, optional
            Bound the objective plus sum_i shift_i (x_i - x_i^2) instead, shape (rows, d).

        Returns
        -------
        Tensor or None
            In `unit`, float64, shape (rows,); None where no bound is known.
        """

    def unshifted(self) -> Problem:
        """Return the objective without shifts: the same on every mask."""
        return self

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> Problem:
        """Return this objective plus amount * sum_i diagonal_i (x_i - x_i^2), which is zero for every mask.

        Parameters
        ----------
        diagonal : Tensor
            Shape (rows, d).
        amount : float
            Multiplies the diagonal; separate, so that a schedule of amounts needs no new tensors.

        Returns
        -------
        Shifted
        """
        return cast(Problem, self._shift_class(self, diagonal, amount))


def shift_convexity_error(point: Point, shift: Tensor | None) -> Tensor:
    """Return how far sum_i shift_i (x_i - x_i^2) may lie below its linear model at `point`, float64, shape (rows,)."""
    if shift is None:
        return point.x.new_zeros(len(point.x), dtype=torch.float64)
    farthest = torch.maximum(point.x, 1.0 - point.x).double().square()
    return farthest.mul_(shift.double().clamp_min(0.0)).sum(1)


class GradientOnly(Problem):
    """A function of which values and gradients alone are known: every step and every slope evaluates it anew."""

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, x.new_empty(0))

    def advance(self, point: Point, direction: Direction, step_size: Tensor) -> None:
        point.x.addcmul_(direction.vector, step_size)
        point.gradient.copy_(self.evaluate(point.x).gradient)

    def slope(self, point: Point, direction: Direction, step_size: Tensor) -> Tensor:
        there = self.evaluate(torch.addcmul(point.x, direction.vector, step_size.unsqueeze(1)))
        slope: Tensor = torch.linalg.vecdot(there.gradient, direction.vector)
        return slope


class Quadratic(Problem):
    """An objective with a constant Hessian.

    The gradient is affine in x. Points are therefore updated without a new evaluation, and exact line searches and
    conjugate directions cost no matrix product; this holds for shifted objectives too.

    Class attributes
    ----------------
    coupled, unit, lowest
        As for `Problem`.
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
        """Return the Hessian times `direction`, shape (rows, d); read only, as it may be the direction's `product`."""
        return direction.product

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the coefficients of x_i^2, shape (rows, d)."""

    @abstractmethod
    def smoothness(self) -> Tensor:
        """Return a proven upper bound on the spectral norm of each row's Hessian, shape (rows,)."""

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Quadratic: ...

    @abstractmethod
    def double(self) -> Quadratic: ...

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> Quadratic:
        return cast(Quadratic, self._shift_class(self, diagonal, amount))
