"""Direction and step rules of the Frank-Wolfe loop: small, stateless, free to combine."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.problems import Move, Problem

__all__ = ["Conjugate", "Direction", "ExactStep", "OpenLoopStep", "Pool", "Step", "Vanilla"]


class Pool(Protocol):
    """Turns one number per row into the number each row's step may depend on.

    The identity where rows are independent; the sum over rows where the set couples them.
    """

    def __call__(self, per_row: Tensor) -> Tensor: ...


class Direction(Protocol):
    """Chooses the way to go; `remembers` asks the loop to keep the previous move."""

    remembers: ClassVar[bool]

    def choose(self, objective: Problem, move: Move, previous: Move | None, pool: Pool) -> Move:
        """Return a move inside the hull.

        Parameters
        ----------
        move : Move
            From the point to the oracle's vertex; may be overwritten.
        previous : Move or None
            From the point to where the last move would have ended at full length.
        """


class Step(Protocol):
    """Chooses how far to go."""

    def share(self, iteration: int, objective: Problem, gradient: Tensor, move: Move, pool: Pool) -> Tensor:
        """Return shares of the move in [0, 1], shape (rows,)."""


@dataclass(frozen=True)
class Vanilla:
    """Go to the oracle's vertex (Frank and Wolfe, 1956)."""

    remembers: ClassVar[bool] = False

    def choose(self, objective: Problem, move: Move, previous: Move | None, pool: Pool) -> Move:
        return move


@dataclass(frozen=True)
class Conjugate:
    """Mix the way to the vertex with the previous way so that successive ways are conjugate.

    With H the Hessian, p the previous way and v the way to the vertex, the new way (1 - a) v + a p has
    <p, H ((1 - a) v + a p)> = 0 (Mitradjieva and Lindberg, Transportation Science 47(2), 2013, section 3). H p is
    known, so it costs no matrix product; it removes most of the zig-zagging that ill-conditioned layers cause.

    Parameters
    ----------
    slack : float
        The vertex keeps at least this share.
    """

    slack: float = 0.2

    remembers: ClassVar[bool] = True

    def choose(self, objective: Problem, move: Move, previous: Move | None, pool: Pool) -> Move:
        if previous is not None:
            bent = objective.hessian(previous)
            cross, own = pool(vecdot(bent, move.x)), pool(vecdot(bent, previous.x))
            share = (cross / (cross - own)).nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, 1.0 - self.slack)
            move.blend_(previous, share.unsqueeze(1))
        return move


@dataclass(frozen=True)
class OpenLoopStep:
    """2 / (t + offset): needs nothing from the objective."""

    offset: int = 2

    def share(self, iteration: int, objective: Problem, gradient: Tensor, move: Move, pool: Pool) -> Tensor:
        return gradient.new_full((gradient.shape[0],), 2.0 / (iteration + self.offset))


@dataclass(frozen=True)
class ExactStep:
    """The best share in [0, 1] for a quadratic objective, convex or not."""

    def share(self, iteration: int, objective: Problem, gradient: Tensor, move: Move, pool: Pool) -> Tensor:
        slope = pool(vecdot(gradient, move.x))
        curvature = pool(vecdot(objective.hessian(move), move.x))
        inside = (-slope / curvature).clamp_(0.0, 1.0)
        # Where the objective is concave along the move one of its ends is best.
        return torch.where(curvature > 0, inside, (slope + 0.5 * curvature < 0).to(slope.dtype))
