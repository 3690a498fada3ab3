"""Column subset selection with refit: which input units of a layer to keep when the weights on them are fitted anew."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from maskopt.checks import matrix
from maskopt.errors import MaskoptError
from maskopt.problems.base import GradientOnly, Point, shift_convexity_error
from maskopt.problems.checks import check_finite, check_symmetric, ridged_factor, symmetrised
from maskopt.problems.layer import LayerReconstruction
from maskopt.problems.refit import Refit
from maskopt.problems.split import cheap_split, proven_split
from maskopt.problems.unit_blocks import UnitBlocks

__all__ = ["ColumnSubset"]

_ROUNDING = 2.0**-52
_FLOOR = 1e-6  # of the cheap diagonal, that every entry of a given one has at least


class _Solution(NamedTuple):
    """What the relaxation's inner problem has at one x; all of shape (rows, columns), padded and scaled."""

    rest: Tensor  # Z = T - V
    back: Tensor  # Z K
    ratio: Tensor  # v_j / sqrt(x_j)
    slope: Tensor  # (Z K)_j + D_j v_j


class ColumnSubset(GradientOnly):
    """The least error of a layer as a function of the input units that it keeps, one indicator for each unit.

    A consumer layer with target weights T (rows x d) and K = X X^T plus a ridge keeps the columns of some units; the
    weights V on them are those of least error:

        f(S) = min over V supported on the columns of S of tr((T - V) K (T - V)^T)

    The relaxation is the perspective one. With a diagonal D > 0 for which K - D is positive semidefinite,

        f(x) = min over V of tr((T - V) K (T - V)^T) + sum_j D_j (1 / x_u(j) - 1) |v_j|^2

    is convex in x and equal to f(S) at the indicator of S. Its gradient is -sum_j |(Z K)_j + D_j v_j|^2 / D_j over the
    columns j of a unit, Z = T - V.

    Parameters
    ----------
    target : Tensor
        T, shape (rows, d).
    gram : Tensor
        K, shape (d, d), symmetric, positive semidefinite. Where it is singular, the smallest tried multiple of its
        diagonal that makes it definite is added; the attribute `gram` has it.
    units : Tensor, optional
        Unit of every column, integers 0 ... n - 1, shape (d,); by default each column is one.
    diagonal : Tensor, optional
        D, shape (d,). By default the conditional variances 1 / (K^-1)_jj times the largest factor found for which
        K - D is proven positive semidefinite. A given one is raised to a millionth of that.

    Attributes
    ----------
    units : Tensor
        Int64, shape (d,).
    blocks : UnitBlocks
        The data by units, in float64 and scaled: what `Refit` works on.

    Raises
    ------
    MaskoptError
        If shapes disagree, an entry is not finite, K is not positive semidefinite, or K - D is not.

    References
    ----------
    The perspective relaxation: A. Frangioni and C. Gentile, "Perspective cuts for a class of convex 0-1 mixed integer
    programs", Mathematical Programming 106, 2006; with a diagonal split off: the same, "SDP diagonalizations and
    perspective cuts", Operations Research Letters 35, 2007.

    Examples
    --------
    Two inputs that are nearly equal and a third one: one of the two stands for both.

    >>> import torch
    >>> from maskopt.problems import ColumnSubset
    >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> problem = ColumnSubset(torch.tensor([[1.0, 1.0, 1.0]]), gram)
    >>> problem.shape
    (1, 3)
    >>> problem.objective(torch.tensor([[True, False, True]])).round(decimals=4)
    tensor([0.1900], dtype=torch.float64)
    >>> problem.removal_costs(torch.tensor([True, True, True])).round(decimals=4)
    tensor([0.1900, 0.1900, 1.0000], dtype=torch.float64)
    """

    lowest = 0.0

    def __init__(
        self,
        target: Tensor,
        gram: Tensor,
        units: Tensor | None = None,
        *,
        diagonal: Tensor | None = None,
    ) -> None:
        target, gram = matrix("target", target), matrix("Gram", gram)
        if target.ndim != 2 or 0 in target.shape or gram.shape != (target.shape[1], target.shape[1]):
            raise MaskoptError(
                f"A column subset problem needs a non-empty target (rows, d) and a Gram (d, d); got shapes "
                f"{tuple(target.shape)} and {tuple(gram.shape)}."
            )
        if gram.device != target.device:
            raise MaskoptError(f"Target lies on {target.device} and Gram on {gram.device}; put both on one device.")
        check_finite("target", target)
        check_finite("Gram", gram)
        check_symmetric(gram)
        self.target, wide = target.double(), symmetrised(gram.double())
        self.units = _units(units, target)
        self.blocks = UnitBlocks(self.target, wide, self.units)
        self.gram = self.blocks.definite(wide)
        self.unit = self.blocks.unit
        self._copies = 1
        self._diagonal: Tensor | None = None
        self._solved: tuple[Tensor, _Solution] | None = None
        if diagonal is not None:
            self._diagonal = self._checked(matrix("diagonal", diagonal))

    @classmethod
    def of(
        cls,
        layer: LayerReconstruction,
        units: Tensor | None = None,
        *,
        ridge: float = 0.01,
        diagonal: Tensor | None = None,
    ) -> ColumnSubset:
        """Return the problem of a layer: its target, and its Gram with a ridge.

        Parameters
        ----------
        layer : LayerReconstruction
        units, diagonal
            As for the class.
        ridge : float
            Fraction of each input's second moment that is added to it. It draws the fitted weights towards the target.

        Returns
        -------
        ColumnSubset
        """
        gram = layer.gram.double()
        return cls(layer.target, gram + ridge * torch.diag(gram.diagonal().clamp_min(0.0)), units, diagonal=diagonal)

    # What every problem has

    @property
    def shape(self) -> tuple[int, int]:
        return self._copies, self.blocks.number

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.target.device

    def evaluate(self, x: Tensor) -> Point:
        gradient = torch.stack([-self._steepness(self._solution(row)).sum(1) for row in x.double()])
        return Point(x, gradient.to(x.dtype))

    def value(self, point: Point) -> Tensor:
        return torch.stack([self._relaxed(row, self._solution(row)) for row in point.x.double()])

    def rows(self, index: slice | Tensor) -> ColumnSubset:
        # There is one set of units; several rows are copies of the problem.
        part = object.__new__(ColumnSubset)
        part.__dict__.update(self.__dict__)
        part._copies = len(torch.arange(self._copies)[index.cpu() if isinstance(index, Tensor) else index])
        return part

    def objective(self, mask: Tensor) -> Tensor:
        return torch.stack([Refit(self.blocks, row.nonzero().flatten()).loss() for row in mask]) * self.unit

    def scale(self) -> Tensor:
        return self.objective(torch.zeros(self.shape, dtype=torch.bool, device=self.device))

    def double(self) -> ColumnSubset:
        return self

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        """Return the bound of `Problem.convexity_error`, shape (rows,).

        For any V and the Z = T - V there, f(y) >= tr(Z K Z^T) - sum_j |a_j|^2 / D_j + sum_u (1 - y_u) h_u with
        a = Z K and h_u = sum_j |a_j + D_j v_j|^2 / D_j over the columns of unit u, because
        D |v|^2 / y >= 2 <z, v> - y |z|^2 / D for every z. Only products are rounded in it, no factorisation is.
        """
        errors = []
        for x, gradient in zip(point.x.double(), point.gradient.double(), strict=True):
            solution = self._solution(x)
            start, slopes, rounding = self._lower(solution)
            value, total = self._relaxed(x, solution), slopes.sum()
            linear = (gradient * x).sum()
            size = value.abs() + (gradient * x).abs().sum() + total + start.abs()
            error = (value - linear - total - start) + (gradient + slopes).abs().sum()
            errors.append(error.clamp_min(0.0) + rounding + (len(x) + 8) * _ROUNDING * size)
        return torch.stack(errors) + shift_convexity_error(point, shift)

    # Exact changes of the error

    def removal_costs(self, kept: Tensor) -> Tensor:
        """Return what removing each unit alone adds to the error, shape (units,); zero for units that are not kept.

        Parameters
        ----------
        kept : Tensor
            Boolean, shape (units,).
        """
        state = Refit(self.blocks, kept.nonzero().flatten())
        return self._spread(state.kept, state.removal_costs())

    def addition_gains(self, kept: Tensor) -> Tensor:
        """Return what adding each unit alone takes from the error, shape (units,); zero for units that are kept.

        Parameters
        ----------
        kept : Tensor
            Boolean, shape (units,).
        """
        state, others = Refit(self.blocks, kept.nonzero().flatten()), (~kept).nonzero().flatten()
        return self._spread(others, state.additions(others).gains)

    def swap_changes(self, kept: Tensor) -> Tensor:
        """Return how each swap changes the error, shape (units, units): entry (i, j) for i leaving and j entering.

        Parameters
        ----------
        kept : Tensor
            Boolean, shape (units,).

        Returns
        -------
        Tensor
            Infinite where i is not kept or j is.
        """
        state, others = Refit(self.blocks, kept.nonzero().flatten()), (~kept).nonzero().flatten()
        changes = self.target.new_full((self.blocks.number, self.blocks.number), math.inf)
        found = state.swap_changes(state.additions(others)) * self.unit
        changes[state.kept.unsqueeze(1), others] = found
        return changes

    def refit(self, kept: Tensor) -> Tensor:
        """Return the weights of least error on the columns of the units kept, zero elsewhere, float64, shape (rows, d).

        Where an input is always zero, any weight is; a kept one is the target's.

        Parameters
        ----------
        kept : Tensor
            Boolean, shape (units,).
        """
        state = Refit(self.blocks, kept.nonzero().flatten())
        return torch.where(self.blocks.dead & kept[self.units], self.target, self.blocks.unpadded(state.spread()))

    def bound_from(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a start and slopes h >= 0 that bound every choice: f(S) >= start + sum of h over units outside S.

        They are the linear model of the relaxation at `x` with its rounding errors subtracted unit by unit, so that
        large units that are kept anyway do not loosen the bound of the others.

        Parameters
        ----------
        x : Tensor
            In [0, 1], shape (units,).

        Returns
        -------
        start : Tensor
            One number, in `unit`.
        slopes : Tensor
            In `unit`, shape (units,).
        """
        solution = self._solution(x.double())
        start, slopes, rounding = self._lower(solution, apart=True)
        return start - rounding, slopes

    # The relaxation

    @property
    def diagonal(self) -> Tensor:
        """D in the units of `gram`, shape (d,)."""
        return self.blocks.unscaled(self._split())

    def with_diagonal(self, diagonal: Tensor) -> ColumnSubset:
        """Return the problem with another D, shape (d,), in the units of `gram`."""
        other = self.rows(slice(None))
        other._solved, other._diagonal = None, None
        other._diagonal = self._checked(matrix("diagonal", diagonal))
        return other

    def _spread(self, index: Tensor, values: Tensor) -> Tensor:
        return self.target.new_zeros(self.blocks.number).index_copy(0, index, values * self.unit)

    def _split(self) -> Tensor:
        """Return D of the scaled and padded columns."""
        if self._diagonal is None:
            self._diagonal = cheap_split(self.blocks.gram)
        return self._diagonal

    def _checked(self, diagonal: Tensor) -> Tensor:
        if diagonal.shape != (self.target.shape[1],) or not bool((diagonal >= 0).all()):
            raise MaskoptError(f"A diagonal needs {self.target.shape[1]} numbers >= 0, one for each column.")
        cheap = cheap_split(self.blocks.gram)
        scaled = self.blocks.scaled_diagonal(diagonal.double().to(self.device))
        proven = proven_split(self.blocks.gram, torch.lerp(scaled, cheap, _FLOOR), steps=6)
        if proven is None:
            raise MaskoptError("The Gram less the diagonal must be positive semidefinite; take a smaller diagonal.")
        return proven

    def _solution(self, x: Tensor) -> _Solution:
        if self._solved is not None and torch.equal(self._solved[0], x):
            return self._solved[1]
        blocks, split = self.blocks, self._split()
        root = x.clamp_min(0.0).sqrt().repeat_interleave(blocks.width)
        some = (root > 0).nonzero().flatten()
        weight = root[some]
        inner = (blocks.gram[some.unsqueeze(1), some] - torch.diag(split[some])) * weight * weight.unsqueeze(1)
        inner.diagonal().add_(split[some])
        ratio = torch.zeros_like(blocks.target)
        if len(some):
            right = (blocks.product[:, some] * weight).T
            ratio[:, some] = torch.cholesky_solve(right, ridged_factor(inner)).T
        rest = blocks.target - ratio * root
        back = rest @ blocks.gram
        solution = _Solution(rest, back, ratio, back + split * (blocks.target - rest))
        self._solved = x.clone(), solution
        return solution

    def _relaxed(self, x: Tensor, solution: _Solution) -> Tensor:
        wide = x.repeat_interleave(self.blocks.width)
        spread = self._split() * (1.0 - wide) * solution.ratio.square().sum(0)
        return (solution.rest * solution.back).sum() + spread.sum()

    def _steepness(self, solution: _Solution) -> Tensor:
        """Return |(Z K)_j + D_j v_j|^2 / D_j, shape (units, width)."""
        return (solution.slope.square().sum(0) / self._split()).view(self.blocks.number, -1)

    def _lower(self, solution: _Solution, apart: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return start, slopes and rounding of the bound in `convexity_error`.

        With `apart` the rounding of slopes is subtracted from each of them instead, which leaves none below zero.
        """
        split, sizes, columns = self._split(), self.blocks.sizes, len(self.blocks.gram)
        reach = solution.rest.abs() @ sizes  # |(Z K)_ij| <= reach_i sizes_j
        start = (solution.rest * solution.back).sum() - (solution.back.square().sum(0) / split).sum()
        product = (columns + 4) * _ROUNDING * reach.unsqueeze(1) * sizes
        own = (2.0 * solution.back.abs() + product) * product + 8 * _ROUNDING * solution.back.square()
        rounding = (2 * columns + 8) * _ROUNDING * reach.square().sum() + (own.sum(0) / split).sum()
        # D_j v_j is a difference and a product, each rounded once.
        off = product + 4 * _ROUNDING * (solution.slope.abs() + split * (self.blocks.target - solution.rest).abs())
        off = (2.0 * solution.slope.abs() + off) * off + 8 * _ROUNDING * solution.slope.square()
        terms = len(split) + len(solution.rest) + 8
        rounding = rounding + terms * _ROUNDING * ((solution.back.square().sum(0) / split).sum() + start.abs())
        steepness = self._steepness(solution)
        wrong = (off.sum(0) / split).view_as(steepness) + terms * _ROUNDING * steepness
        if apart:
            return start, (steepness - wrong).sum(1).clamp_min(0.0), rounding
        return start, steepness.sum(1), rounding + wrong.sum()


def _units(units: Tensor | None, target: Tensor) -> Tensor:
    """Return the unit of every column as int64 on the target's device."""
    columns = target.shape[1]
    if units is None:
        return torch.arange(columns, device=target.device)
    if units.shape != (columns,) or units.is_floating_point() or units.dtype == torch.bool or int(units.min()) < 0:
        raise MaskoptError(
            f"Units need one whole number >= 0 for each of {columns} columns; got a {units.dtype} tensor of shape "
            f"{tuple(units.shape)}."
        )
    units = units.long().to(target.device)
    missing = (torch.bincount(units) == 0).nonzero().flatten()
    if len(missing):
        raise MaskoptError(f"Units must be numbered without gaps from 0, but no column is of unit {int(missing[0])}.")
    return units
