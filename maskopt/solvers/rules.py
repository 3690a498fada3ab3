"""Direction and step rules of the Frank-Wolfe loop: small, stateless, free to combine."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from maskopt.problems import Point, Problem

__all__ = ["Conjugate", "Direction", "ExactStep", "OpenLoopStep", "Pool", "Step", "Vanilla"]


class Pool(Protocol):
    """Turns one number per row into the number each row's step may depend on.

    The identity where rows are independent; the sum over rows where the set couples them.
    """

    def __call__(self, per_row: Tensor) -> Tensor: ...


class Direction(Protocol):
    """Chooses the point to move towards."""

    def target(self, objective: Problem, point: Point, vertex: Point, previous: Point | None, pool: Pool) -> Point:
        """Return a point of the hull, given the oracle's vertex and the previous target."""


class Step(Protocol):
    """Chooses how far to move, as a share of the way to the target."""

    def share(
        self, iteration: int, objective: Problem, gradient: Tensor, point: Point, target: Point, pool: Pool
    ) -> Tensor:
        """Return shares in [0, 1], shape (rows,)."""


@dataclass(frozen=True)
class Vanilla:
    """Move towards the oracle's vertex (Frank and Wolfe, 1956)."""

    def target(self, objective: Problem, point: Point, vertex: Point, previous: Point | None, pool: Pool) -> Point:
        return vertex


@dataclass(frozen=True)
class Conjugate:
    """Mix the vertex with the previous target so that successive directions are conjugate.

    With B the second-order form of the objective and T the previous target, the new target aT + (1-a)v has
    B(T - x, aT + (1-a)v - x) = 0 (Mitradjieva and Lindberg, Transportation Science 47(2), 2013, section 3). The
    carried products of T and v are known, so it costs no matrix product; it removes most of the zig-zagging that
    ill-conditioned layers cause.

    Parameters
    ----------
    slack : float
        The vertex keeps at least this share of the target.
    """

    slack: float = 0.2

    def target(self, objective: Problem, point: Point, vertex: Point, previous: Point | None, pool: Pool) -> Point:
        if previous is None:
            return vertex
        to_vertex, to_previous = map(pool, objective.bilinear(point, previous, (vertex, previous)))
        below = to_vertex - to_previous
        share = torch.where(below == 0, 0.0, to_vertex / below).nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, 1.0 - self.slack)
        return vertex.mix(previous, share.unsqueeze(1))


@dataclass(frozen=True)
class OpenLoopStep:
    """2 / (t + offset): needs nothing from the objective."""

    offset: int = 2

    def share(
        self, iteration: int, objective: Problem, gradient: Tensor, point: Point, target: Point, pool: Pool
    ) -> Tensor:
        return gradient.new_full((gradient.shape[0],), 2.0 / (iteration + self.offset))


@dataclass(frozen=True)
class ExactStep:
    """The best share in [0, 1] for a quadratic objective, convex or not."""

    def share(
        self, iteration: int, objective: Problem, gradient: Tensor, point: Point, target: Point, pool: Pool
    ) -> Tensor:
        slope = pool(torch.bmm(gradient.unsqueeze(1), (target.x - point.x).unsqueeze(2)).view(-1))
        curvature = pool(objective.curvature(point, target))
        inside = (slope / (-2.0 * curvature)).clamp_(0.0, 1.0)
        # Where the objective is concave along the segment one of its ends is best.
        return torch.where(curvature > 0, inside, (slope + curvature < 0).to(slope.dtype))
