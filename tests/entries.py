"""The entries of the registries of sets and solvers; tests derive from them what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.solvers import Solver

__all__ = ["SetEntry", "SolverEntry"]


@dataclass(frozen=True)
class SetEntry:
    """A set of masks to test.

    Every test of sets and of solvers runs on it. Properties that it claims are tested too; by default it claims none.

    Attributes
    ----------
    make : callable
        (shape, fraction) -> set: one that fits a weight of this shape (rows, d), whatever it is, and keeps about this
        fraction of the entries, in [0, 1].
    member : callable, optional
        (set, patterns) -> boolean tensor: which patterns, boolean, shape (number, rows, d), belong to the set. Written
        from the definition, without the class's methods. By default membership is taken from `milp_constraints`.
    matroid : bool
        It is a `PartitionMatroid`: sorting each group is an independent oracle.
    equal_size : bool
        Members keep equally many entries, so that adding a constant to the cost changes nothing.
    integral : bool
        The linear relaxation of `milp_constraints` has no fractional vertices.
    down_closed : bool
        A member in which a kept entry is pruned is a member.
    """

    make: Callable[[tuple[int, int], float], MaskSet]
    member: Callable[..., Tensor] | None = None
    matroid: bool = False
    equal_size: bool = False
    integral: bool = False
    down_closed: bool = False


@dataclass(frozen=True)
class SolverEntry:
    """A solver to test, with few iterations, so that it can be tried on everything.

    Attributes
    ----------
    solver : Solver
    iterative : bool
        It iterates and calls `stops` in each iteration: callbacks, limits and starts are tested.
    bounded : bool
        Its results carry a proven lower bound.
    swap_optimal : bool
        Its masks are 1-swap optima, no worse than Wanda's.
    keeps_start : bool
        Stopped at once, it returns a mask no worse than the one that its `start` makes, if it has one.
    chaotic : bool
        Rounding may lead it to another mask: results in float32 and float64 are about as good, not equal.
    sees_tiny_rows : bool, optional
        Whether in float32 it sees weights of rows 1e-25 times the largest, whose squares underflow. False is tested
        too, as a known limit.
    sees_small_channels : bool
        In float32 it sees channels 1e-15 times the largest.
    """

    solver: Solver
    iterative: bool = True
    bounded: bool = False
    swap_optimal: bool = False
    keeps_start: bool = True
    chaotic: bool = False
    sees_tiny_rows: bool | None = None
    sees_small_channels: bool = True
