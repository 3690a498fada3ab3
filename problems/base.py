"""The narrow interface through which solvers see an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskopt.problems.shifted import Shifted

__all__ = ["Point", "Problem", "row_dot"]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of `a` with the same row of `b`, shape (rows,)."""
    # A batched (1, d) @ (d, 1) product: one pass over memory and no temporary of size rows x d.
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


@dataclass(frozen=True, slots=True)
class Point:
    """A relaxed mask together with what the objective carries along for it.

    Parameters
    ----------
    x : Tensor
        Relaxed keep mask, shape (rows, d); 1 keeps, 0 prunes.
    carried : Tensor
        What the problem computed for `x`; an *affine* function of `x`, so points mix without a new evaluation.
        Its shape is the problem's own.
    """

    x: Tensor
    carried: Tensor

    def mix(self, other: Point, share: Tensor) -> Point:
        """Return (1 - share) * self + share * other; `share` has shape (rows, 1)."""
        return Point(torch.lerp(self.x, other.x, share), torch.lerp(self.carried, other.carried, share))

    def mix_(self, other: Point, share: Tensor) -> None:
        """Move this point in place by `share`, shape (rows, 1), of the way to `other`."""
        self.x.lerp_(other.x, share)
        self.carried.lerp_(other.carried, share)


class Problem(ABC):
    """A function of relaxed keep masks x in [0, 1]^(rows x d) that is a sum of independent functions of the rows.

    A solver calls `at` once for every new x (the only expensive verb: one matrix product for a layer) and
    everything else on the returned points.
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
        """Return the point of the relaxed mask `x`, shape (rows, d); the tensor is not copied."""

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Return the objective of each row, float64, shape (rows,)."""

    @abstractmethod
    def gradient(self, point: Point) -> Tensor:
        """Return the derivative of each row's objective by x, a new tensor of shape (rows, d)."""

    @abstractmethod
    def curvature(self, point: Point, target: Point) -> Tensor:
        """Return q, shape (rows,), with f(point + s (target - point)) = f(point) + s <gradient, target - point> + s^2 q."""

    @abstractmethod
    def bilinear(self, origin: Point, direction: Point, ends: tuple[Point, ...]) -> tuple[Tensor, ...]:
        """Return B(direction - origin, end - origin) for each end, shape (rows,), where curvature is B(D, D)."""

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
        """Return what relative errors divide by, per row (the objective of pruning everything), float64, shape (rows,)."""

    def shifted(self, diagonal: Tensor, amount: float = 1.0) -> Shifted:
        """Return this objective plus amount * sum_i diagonal_i (x_i - x_i^2), which no mask can see.

        A positive diagonal makes the relaxation concave (continuation), a negative one with Q - D still
        positive semidefinite tightens it (bounds).
        """
        from maskopt.problems.shifted import Shifted

        return Shifted(self, diagonal, amount)
