"""MILP formulations of sets, and what follows from one: membership, a linear minimisation oracle, a proven bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from maskopt.errors import MaskoptError

__all__ = ["MilpFormulation"]


@dataclass(frozen=True)
class MilpFormulation:
    """Linear constraints on a flattened mask and on auxiliary variables.

    A mask belongs to the set if its entries in {0, 1}, in row-major order, and some values of the auxiliary variables
    fulfil the constraints together.

    Parameters
    ----------
    constraints : LinearConstraint
        lb <= A (m, z) <= ub; A is dense or sparse and has one column for each of the rows * d entries of the mask m,
        then one for each auxiliary variable z.
    auxiliary : int
        Number of auxiliary variables.
    integrality : int or sequence of int
        Types of the auxiliary variables: 1 for integer (the default), 0 for continuous, as in `scipy.optimize.milp`.
    lower, upper : float or sequence of float
        Finite bounds of the auxiliary variables, 0 and 1 by default.

    Raises
    ------
    MaskoptError
        If the numbers of variables disagree, or a bound of an auxiliary variable is not finite.

    Examples
    --------
    At most one of the two columns of a 2 x 2 mask is used; z_j says whether column j may be.

    >>> import numpy as np
    >>> from scipy.optimize import LinearConstraint
    >>> rows = [[1, 0, 1, 0, -2, 0], [0, 1, 0, 1, 0, -2], [0, 0, 0, 0, 1, 1]]  # m00 + m10 <= 2 z0, ..., z0 + z1 <= 1
    >>> one_column = MilpFormulation(LinearConstraint(rows, -np.inf, [0, 0, 1]), auxiliary=2)
    >>> [one_column.contains(np.array(mask)) for mask in ([1, 0, 1, 0], [1, 1, 0, 0])]
    [True, False]
    >>> one_column.cheapest(np.array([-1.0, -3.0, -1.0, 2.0]))
    array([False,  True, False, False])
    """

    constraints: LinearConstraint
    auxiliary: int = 0
    integrality: int | Sequence[int] = 1
    lower: float | Sequence[float] = 0.0
    upper: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        # scipy keeps a dense matrix as it is given and does not broadcast its sides; here all have one form.
        given = self.constraints.A
        matrix = csr_array(given if hasattr(given, "tocsr") else np.atleast_2d(given), dtype=float, copy=True)
        matrix.sum_duplicates()
        low, high = (np.broadcast_to(side, matrix.shape[:1]) for side in (self.constraints.lb, self.constraints.ub))
        object.__setattr__(self, "constraints", LinearConstraint(matrix, low, high))
        for name in ("integrality", "lower", "upper"):
            value = np.asarray(getattr(self, name), dtype=float)
            if value.ndim > 1 or value.size not in (1, self.auxiliary):
                raise MaskoptError(
                    f"A formulation with {self.auxiliary} auxiliary variables has {value.size} values of {name}."
                )
            object.__setattr__(self, name, np.broadcast_to(value, self.auxiliary))
        if not 0 <= self.auxiliary <= matrix.shape[1]:
            raise MaskoptError(
                f"A matrix of {matrix.shape[1]} columns cannot have {self.auxiliary} auxiliary variables."
            )
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all()):
            raise MaskoptError("Auxiliary variables of a formulation need finite bounds.")

    @property
    def matrix(self) -> csr_array:
        """A, shape (constraints, entries + auxiliary variables)."""
        return self.constraints.A

    @property
    def entries(self) -> int:
        """Number of entries of the mask."""
        return int(self.matrix.shape[1]) - self.auxiliary

    @property
    def bounds(self) -> Bounds:
        """Lower and upper bounds of all variables, the mask's entries first."""
        return Bounds(
            np.concatenate((np.zeros(self.entries), np.asarray(self.lower))),
            np.concatenate((np.ones(self.entries), np.asarray(self.upper))),
        )

    @property
    def extras(self) -> list[tuple[bool, float, float]]:
        """For each auxiliary variable: whether it is an integer, its lower bound and its upper bound."""
        parts = (np.asarray(part).tolist() for part in (self.integrality, self.lower, self.upper))
        return [(bool(whole), low, high) for whole, low, high in zip(*parts, strict=True)]

    def solve(self, cost: np.ndarray, *, relaxed: bool = False) -> Any:
        """Minimise a linear cost of the mask's entries with HiGHS (Huangfu and Hall, Math. Prog. Computation 10, 2018).

        Parameters
        ----------
        cost : ndarray
            Finite, shape (entries,). HiGHS works to absolute tolerances of about 1e-6.
        relaxed : bool
            Whether to solve the linear relaxation.

        Returns
        -------
        OptimizeResult
            As of `scipy.optimize.milp`; `x` holds the mask's entries, then the auxiliary variables.
        """
        whole = np.concatenate((np.ones(self.entries), np.asarray(self.integrality)))
        return milp(
            np.concatenate((np.asarray(cost, dtype=float), np.zeros(self.auxiliary))),
            constraints=self.constraints,
            integrality=np.zeros_like(whole) if relaxed else whole,
            bounds=self.bounds,
            options={"mip_rel_gap": 0.0},
        )

    def completed(self, mask: np.ndarray) -> np.ndarray | None:
        """Return values of the auxiliary variables with which a flattened mask is feasible.

        Parameters
        ----------
        mask : ndarray
            Zeros and ones, shape (entries,). Sums of constraints may be off by their rounding error.

        Returns
        -------
        ndarray or None
            Shape (auxiliary variables,); None if the mask does not belong to the set.

        Raises
        ------
        MaskoptError
            If the mask has another number of entries.
        """
        flat = np.asarray(mask, dtype=float).ravel()
        if len(flat) != self.entries:
            raise MaskoptError(f"This is a formulation of {self.entries} entries; got {len(flat)}.")
        if self.auxiliary == 0:
            return np.zeros(0) if bool(self.members(flat[None])[0]) else None
        own, other = self.matrix[:, : self.entries], self.matrix[:, self.entries :]
        sums, slack = own @ flat, 1e-12 * (abs(own) @ flat)
        answer = milp(
            np.zeros(self.auxiliary),
            constraints=LinearConstraint(other, self.constraints.lb - sums - slack, self.constraints.ub - sums + slack),
            integrality=np.asarray(self.integrality),
            bounds=Bounds(np.asarray(self.lower), np.asarray(self.upper)),
        )
        return None if answer.x is None else np.where(self.integrality, np.round(answer.x), answer.x)

    def contains(self, mask: np.ndarray) -> bool:
        """Whether a flattened mask, zeros and ones, belongs to the set."""
        return self.completed(mask) is not None

    def members(self, masks: np.ndarray) -> np.ndarray:
        """Return which of many flattened masks, shape (number, entries), belong to the set, boolean."""
        if self.auxiliary:
            return np.array([self.contains(mask) for mask in masks], dtype=bool)
        flat = np.asarray(masks, dtype=float).T
        sums, slack = self.matrix @ flat, 1e-12 * (abs(self.matrix) @ flat)
        low, high = self.constraints.lb[:, None], self.constraints.ub[:, None]
        return np.asarray(((low <= sums + slack) & (sums - slack <= high)).all(0))

    def cheapest(self, cost: np.ndarray) -> np.ndarray | None:
        """Return a mask of minimal cost, up to HiGHS's tolerances.

        Parameters
        ----------
        cost : ndarray
            Shape (entries,), no NaN; infinite costs outweigh all finite ones together.

        Returns
        -------
        ndarray or None
            Boolean, shape (entries,); None if there is no mask.
        """
        answer = self.solve(_scaled(cost)[0])
        return None if answer.x is None else np.round(answer.x[: self.entries]).astype(bool)

    def lower_bound(self, cost: np.ndarray) -> float:
        """Return a proven lower bound on the cost of any mask, by weak duality of the linear relaxation.

        Any multipliers y >= 0 of A v <= b prove the bound -<y, b> + min_v <c + A^T y, v>, the minimum over the box of
        the variables' bounds (Neumaier and Shcherbina, Safe bounds in linear and mixed-integer linear programming,
        Mathematical Programming 99, 2004). Those of HiGHS are used, and a bound on the rounding error is subtracted.

        Parameters
        ----------
        cost : ndarray
            Finite, shape (entries,).
        """
        scaled, unit = _scaled(cost)
        objective = np.concatenate((scaled, np.zeros(self.auxiliary)))
        low, high = self.constraints.lb, self.constraints.ub
        matrix = vstack((self.matrix[np.isfinite(high)], -self.matrix[np.isfinite(low)])).tocsr()
        right = np.concatenate((high[np.isfinite(high)], -low[np.isfinite(low)]))
        box = self.bounds
        price = np.zeros(len(right))
        if len(right):
            answer = linprog(objective, A_ub=matrix, b_ub=right, bounds=np.stack((box.lb, box.ub), 1))
            if answer.status == 0:
                price = np.maximum(-answer.ineqlin.marginals, 0.0)
        reduced = objective + matrix.T @ price
        bound = math.fsum(np.minimum(reduced * box.lb, reduced * box.ub)) - math.fsum(price * right)
        reach = np.maximum(abs(box.lb), abs(box.ub))
        size = float(abs(price * right).sum() + ((abs(objective) + abs(matrix.T) @ price) * reach).sum())
        return (bound - size * (len(right) + len(objective) + 8) * 2.0**-52) * unit


def _scaled(cost: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the cost, finite, divided by a power of two that brings its largest entry into [1, 2), and that power."""
    flat = np.asarray(cost, dtype=float).ravel()
    finite = np.isfinite(flat)
    largest = float(abs(flat[finite]).max(initial=0.0))
    exponent = math.frexp(largest)[1] - 1 if largest > 0.0 else 0
    scaled = np.ldexp(np.where(finite, flat, 0.0), -exponent)
    scaled[~finite] = np.sign(flat[~finite]) * 2.0 * (len(flat) + 1.0)
    return scaled, math.ldexp(1.0, exponent)
