"""Columns by units: every unit padded to the width of the widest, every column scaled to about unit size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems.convexity import entry_sizes

__all__ = ["UnitBlocks"]

_REGULAR = 1e-13  # of the diagonal, times the number of columns: the least eigenvalue a definite Gram is left with


class UnitBlocks:
    """Target and Gram of a column subset problem with columns in the order of their units, in float64.

    Scales are powers of two, so that they change no digit. Padding columns, and those of inputs that are always zero,
    have a Gram of one, no coupling and no target: keeping or removing them changes nothing.

    Parameters
    ----------
    target : Tensor
        Float64, shape (rows, d).
    gram : Tensor
        Float64, symmetric, shape (d, d).
    units : Tensor
        Unit of every column, int64, each of 0 ... n - 1 at least once, shape (d,).

    Attributes
    ----------
    number, width : int
        Units n and columns w of each.
    target : Tensor
        Scaled and padded, shape (rows, n w); unit u has columns u w ... (u + 1) w - 1.
    gram : Tensor
        Likewise, shape (n w, n w).
    product : Tensor
        target @ gram.
    sizes : Tensor
        r with |gram_ij| <= r_i r_j, shape (n w,).
    unit : float
        Errors of the scaled data are to be multiplied by it.
    dead : Tensor
        Which inputs are always zero, boolean, shape (d,).
    """

    def __init__(self, target: Tensor, gram: Tensor, units: Tensor) -> None:
        counts = torch.bincount(units)
        self.number, self.width = len(counts), int(counts.max())
        order = torch.argsort(units, stable=True)
        within = torch.arange(len(units), device=units.device) - (counts.cumsum(0) - counts)[units[order]]
        self._places = torch.empty_like(order)
        self._places[order] = units[order] * self.width + within
        diagonal = gram.diagonal().clamp_min(0.0)
        self.dead = diagonal == 0
        target = target.masked_fill(self.dead, 0.0)
        exponent = torch.frexp(diagonal).exponent
        # About the root of the diagonal; of inputs that are always zero, one.
        self._powers = torch.where(diagonal > 0, (exponent / 2).round(), 0.0).long()
        columns = self.number * self.width
        full = torch.zeros((columns, columns), dtype=torch.float64, device=gram.device)
        full.diagonal().fill_(1.0)
        scaled = torch.ldexp(torch.ldexp(gram, -self._powers), -self._powers.unsqueeze(1))
        scaled.diagonal().masked_fill_(self.dead, 1.0)
        full[self._places.unsqueeze(1), self._places] = scaled
        wide = target.new_zeros((len(target), columns))
        # In two steps, so that no product of two powers leaves the range of floats.
        largest = torch.frexp(target.abs().amax(0)).exponent + self._powers
        power = int(largest[target.abs().amax(0) > 0].max()) if bool((target != 0).any()) else 0
        if 2 * power + 2 * math.frexp(len(units))[1] > 1020:
            raise MaskoptError("Target and Gram are so large that the error exceeds float64; scale them down.")
        power = max(power, -500)
        self._power = power
        wide[:, self._places] = torch.ldexp(target, self._powers - power)
        self.unit = math.ldexp(1.0, 2 * power)
        self.target, self.gram = wide, full
        self._refresh()

    def _refresh(self) -> None:
        self.product, self.sizes = self.target @ self.gram, entry_sizes(self.gram)

    def definite(self, gram: Tensor) -> Tensor:
        """Make the scaled Gram definite and return the unscaled one, shape (d, d), with what that adds to its diagonal.

        Raises
        ------
        MaskoptError
            If the Gram is not positive semidefinite up to rounding.
        """
        least = _REGULAR * len(self.gram)
        added = 0.0
        while not self._factorises(added - least):
            added = max(10.0 * added, 2.0 * least)
            if added > 1e-3:
                raise MaskoptError("The Gram of a column subset problem must be positive semidefinite; is it X X^T?")
        if added == 0.0:
            return gram
        before = self.gram.diagonal().clone()
        self.gram.diagonal().mul_(1.0 + added)
        self._refresh()
        return gram + torch.diag(self.unscaled(self.gram.diagonal() - before).masked_fill(self.dead, 0.0))

    def _factorises(self, shift: float) -> bool:
        trial = self.gram.clone()
        trial.diagonal().mul_(1.0 + shift)
        factor, info = torch.linalg.cholesky_ex(trial)
        return int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all())

    def columns(self, units: Tensor) -> Tensor:
        """Return the columns of some units, in their order, shape (units * width,)."""
        return (units.unsqueeze(1) * self.width + torch.arange(self.width, device=units.device)).flatten()

    def unpadded(self, weight: Tensor) -> Tensor:
        """Return scaled and padded weights, shape (rows, n w), as weights of the target's scale, shape (rows, d)."""
        return torch.ldexp(weight[:, self._places], self._power - self._powers)

    def scaled_diagonal(self, diagonal: Tensor) -> Tensor:
        """Return a diagonal in the Gram's units, shape (d,), scaled and padded, shape (n w,)."""
        full = self.gram.new_full((len(self.gram),), 0.5)
        full[self._places] = torch.ldexp(diagonal, -2 * self._powers)
        return full

    def unscaled(self, diagonal: Tensor) -> Tensor:
        """Undo `scaled_diagonal`."""
        return torch.ldexp(diagonal[self._places], 2 * self._powers)
