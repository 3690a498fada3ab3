"""The narrow interface through which solvers see an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskopt.problems.shifted import Shifted

__all__ = ["Move", "Point", "Problem"]


@dataclass(frozen=True, slots=True)
class Point:
    """A relaxed mask and the gradient of the (unshifted) objective there.

    For a quadratic objective the gradient is an *affine* function of x, so points mix and subtract without a new
    evaluation; gradients of shifted objectives follow from it without one either.

    Parameters
    ----------
    x : Tensor
        Relaxed keep mask, shape (rows, d); 1 keeps, 0 prunes.
    gradient : Tensor
        Shape (rows, d).
    """

    x: Tensor
    gradient: Tensor

    def advance_(self, move: Move, share: Tensor) -> None:
        """Add `share` (shape (rows, 1)) times `move` in place."""
        self.x.addcmul_(move.x, share)
        self.gradient.addcmul_(move.gradient, share)


@dataclass(frozen=True, slots=True)
class Move:
    """A direction, shape (rows, d), and the change of the gradient along it: the Hessian times it."""

    x: Tensor
    gradient: Tensor

    def blend_(self, other: Move, share: Tensor) -> None:
        """Become (1 - share) * self + share * other in place; `share` has shape (rows, 1)."""
        self.x.lerp_(other.x, share)
        self.gradient.lerp_(other.gradient, share)

    def scale_(self, factor: Tensor) -> None:
        """Multiply each row in place; `factor` has shape (rows, 1)."""
        self.x.mul_(factor)
        self.gradient.mul_(factor)


class Problem(ABC):
    """A function of relaxed keep masks x in [0, 1]^(rows x d) that is a sum of independent functions of the rows.

    Two verbs are expensive, one matrix product each for a layer: `at`, called once to start, and `along`, called once
    for every new direction. Everything else is arithmetic on points and moves.
    """

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
    def at(self, x: Tensor) -> Point:
        """Return the point of the relaxed mask `x`, shape (rows, d); `x` is not copied, the gradient is new."""

    @abstractmethod
    def along(self, x: Tensor) -> Move:
        """Return the move in direction `x`, shape (rows, d); `x` is not copied, the gradient is new."""

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Return the objective of each row, float64, shape (rows,)."""

    def gradient(self, point: Point) -> Tensor:
        """Return the derivative by x, shape (rows, d); read only, it may be the point's own."""
        return point.gradient

    def hessian(self, move: Move) -> Tensor:
        """Return the second derivative times `move`, shape (rows, d); read only, it may be the move's own."""
        return move.gradient

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the coefficients of x_i^2, shape (rows, d)."""

    @abstractmethod
    def rows(self, index: slice) -> Problem:
        """Return the same objective for a slice of the rows; data is shared."""

    @abstractmethod
    def objective(self, mask: Tensor) -> Tensor:
        """Return each row's objective of a boolean mask, evaluated from scratch in float64, shape (rows,)."""

    @abstractmethod
    def scale(self) -> Tensor:
        """Return each row's objective of pruning everything: relative errors divide by it. Float64, shape (rows,)."""

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> Shifted:
        """Return this objective plus amount * sum_i diagonal_i (x_i - x_i^2), which no mask can see.

        A positive diagonal makes the relaxation concave (continuation), a negative one with Q - D still
        positive semidefinite tightens it (bounds).
        """
        from maskopt.problems.shifted import Shifted

        return Shifted(self, diagonal, amount)
