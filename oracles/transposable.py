"""Transposable N:M: tiles that keep a fixed number of entries in each of their rows and columns."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array, vstack
from torch import Tensor

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError
from maskopt.oracles.base import Index, MaskSet, Shape, box_step, face_tolerance
from maskopt.oracles.fixed import fixed_rows, joined, of_rows, refuse_contradiction, respects
from maskopt.oracles.regular import cheapest_regular, count_regular, every_regular, regular_table

__all__ = ["TransposableNM"]


class TransposableNM(MaskSet):
    """Masks that are N:M for the weight and for its transpose, which speeds up both passes of sparse training.

    Every `group` x `group` tile keeps `keep` entries in each of its rows and each of its columns. Minimising a cost
    over a tile is a transportation problem with capacities one, that is, a minimum-cost flow: the hull is a
    transportation polytope, whose faces are given by entries fixed at 0 and 1 and whose vertices are masks. Costs may
    be infinite: the mask then keeps as few entries of cost infinity and as many of cost minus infinity as the set
    allows, net of each other, and is cheapest among those.

    Parameters
    ----------
    keep, group : int
        0 <= keep <= group, 1 <= group. Keywords only, as for `NM`.

    Raises
    ------
    MaskoptError
        If they are no such numbers. Methods raise it where tiles do not divide the weight.

    References
    ----------
    The set and its formulation as a minimum-cost flow: Hubara et al., Accelerated sparse neural training: a provable
    and efficient method to find N:M transposable masks, NeurIPS 2021, section 3. The algorithm (`cheapest_by_cycles`):
    Ahuja, Magnanti and Orlin, Network Flows, 1993, section 9.6.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import TransposableNM
    >>> masks = TransposableNM(keep=1, group=2)
    >>> masks.lmo_mask(torch.tensor([[-5.0, -4.0], [-4.0, 0.0]])).tolist()
    [[False, True], [True, False]]
    >>> TransposableNM(keep=2, group=4).count((4, 4))
    90
    """

    def __init__(self, *, keep: int, group: int) -> None:
        if not all(whole(-(2**53)).fits(number) for number in (keep, group)):
            raise MaskoptError(
                f"TransposableNM counts entries, with whole numbers; got keep={shown(keep)}, group={shown(group)}."
            )
        if group < 1 or not 0 <= keep <= group:
            raise MaskoptError(f"TransposableNM needs 0 <= keep <= group and 1 <= group; got {keep} and {group}.")
        self.keep = keep
        self.group = group

    def __repr__(self) -> str:
        return f"TransposableNM(keep={self.keep}, group={self.group})"

    # Geometry

    def check(self, shape: Shape) -> None:
        if shape[0] % self.group or shape[1] % self.group:
            raise MaskoptError(f"{self} needs rows and columns divisible by {self.group}; this weight has {shape}.")
        for fixed in (self.protected, self.forbidden):
            if fixed is not None and tuple(fixed.shape) != tuple(shape):
                raise MaskoptError(f"{self} fixes entries of shape {tuple(fixed.shape)}; got {tuple(shape)}.")

    def row_block(self, shape: Shape) -> int:
        self.check(shape)
        return self.group

    @property
    def separable(self) -> bool:
        return self.group == 1

    def _tiles(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (tiles, group, group), tiles in row-major order."""
        self.check(matrix.shape)
        tiles = matrix.reshape(matrix.shape[0] // self.group, self.group, -1, self.group)
        return tiles.transpose(1, 2).reshape(-1, self.group, self.group)

    def _untile(self, tiles: Tensor, shape: Shape) -> Tensor:
        blocks = tiles.view(shape[0] // self.group, -1, self.group, self.group)
        return blocks.transpose(1, 2).reshape(shape[0], shape[1])

    def rows(self, index: Index, shape: Shape) -> TransposableNM:
        if self.protected is None and self.forbidden is None:
            return self
        return self._with(*(of_rows(fixed, index) for fixed in (self.protected, self.forbidden)))

    def _with(self, protected: Tensor | None, forbidden: Tensor | None) -> TransposableNM:
        masks = copy.copy(self)
        masks.protected, masks.forbidden = protected, forbidden
        return masks

    # Oracles and membership

    def lmo(self, cost: Tensor) -> Tensor:
        return self._cheapest(cost, self.protected, self.forbidden)

    def _cheapest(self, cost: Tensor, kept: Tensor | None, pruned: Tensor | None) -> Tensor:
        fixed = (None if one is None else self._tiles(one.to(cost.device)) for one in (kept, pruned))
        chosen = cheapest_regular(self._tiles(cost).double(), self.keep, *fixed)
        return self._untile(chosen, cost.shape).to(cost.dtype)

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of minimal cost on the smallest face that contains `x`.

        Parameters
        ----------
        cost, x : Tensor
            Finite, shape (rows, d); `x` in the hull.
        """
        tolerance = face_tolerance(x.dtype)
        return self._cheapest(cost, x >= 1.0 - tolerance, x <= tolerance)

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest step size for which x + step * direction stays in the hull, shape (rows,).

        Parameters
        ----------
        x, direction : Tensor
            Shape (rows, d); `x` in the hull. The direction sums to zero over every row and column of a tile.
        """
        return box_step(x, direction)

    def round(self, x: Tensor) -> Tensor:
        return self.lmo_mask(-x.to(torch.promote_types(x.dtype, torch.float32)))

    def contains(self, mask: Tensor) -> bool:
        tiles = self._tiles(mask)
        right = bool((tiles.sum(1) == self.keep).all()) and bool((tiles.sum(2) == self.keep).all())
        return mask.dtype == torch.bool and right and respects(mask, self.protected, self.forbidden)

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.check(shape)
        if self.protected is None and self.forbidden is None:
            return torch.full((shape[0], shape[1]), self.keep / self.group, dtype=dtype, device=device)
        table = regular_table(self.group, self.keep)
        if table is not None:
            wrong = torch.zeros((shape[0] * shape[1] // self.group**2, len(table)), dtype=torch.float64)
            if self.protected is not None:
                wrong += self._tiles(self.protected).flatten(1).double().cpu() @ (1.0 - table).T
            if self.forbidden is not None:
                wrong += self._tiles(self.forbidden).flatten(1).double().cpu() @ table.T
            fits = (wrong == 0).double()
            return self._untile((fits @ table) / fits.sum(1, keepdim=True), shape).to(device=device, dtype=dtype)
        # A mean of masks in which every entry that is not fixed is kept by some and pruned by others.
        total = torch.zeros((shape[0], shape[1]), dtype=torch.float64, device=device)
        places = torch.arange(self.group, device=device)
        rows, columns = places.repeat(shape[0] // self.group), places.repeat(shape[1] // self.group)
        for row, column, sign in itertools.product(range(self.group), range(self.group), (-1.0, 1.0)):
            total += self.lmo(sign * ((rows == row).unsqueeze(1) & (columns == column)).double())
        return (total / (2 * self.group**2)).to(dtype)

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> TransposableNM:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`.

        Parameters
        ----------
        kept, pruned : Tensor, optional
            Boolean, shape (rows, d).

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """
        kept, pruned = joined(self.protected, kept), joined(self.forbidden, pruned)
        some = kept if kept is not None else pruned
        if some is None:
            return self
        refuse_contradiction(kept, pruned)
        masks = self._with(kept, pruned)
        best = masks.lmo(torch.zeros(some.shape, device=some.device)).bool()
        if not respects(best, kept, pruned):
            wrong = torch.zeros_like(some)
            if kept is not None:
                wrong |= kept & ~best
            if pruned is not None:
                wrong |= pruned & best
            row, column = wrong.nonzero()[0].tolist()
            raise MaskoptError(f"No mask of {self} is fixed so in the tile of entry ({row}, {column}).")
        return masks

    def _fixed_of(self, shape: Shape) -> list[tuple[tuple[int, ...], ...]]:
        """Return the flat indices of the protected and of the forbidden entries of every tile."""
        number = shape[0] * shape[1] // self.group**2
        fixed: list[list[tuple[int, ...]]] = []
        for entries in (self.protected, self.forbidden):
            tiles: list[Tensor] = [] if entries is None else list(self._tiles(entries).flatten(1).cpu())
            fixed.append([tuple(tile.nonzero().flatten().tolist()) for tile in tiles] or [()] * number)
        return list(zip(*fixed, strict=True))

    def count(self, shape: Shape) -> int:
        """Return the number of masks, exactly; tiles with fixed entries are enumerated."""
        self.check(shape)
        return math.prod(
            sum(1 for _ in every_regular(self.group, self.keep, *fixed))
            if any(fixed)
            else count_regular(self.group, self.keep)
            for fixed in self._fixed_of(shape)
        )

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        self.check(shape)
        choices = [list(every_regular(self.group, self.keep, *fixed)) for fixed in self._fixed_of(shape)]
        for chosen in itertools.product(*choices):
            tiles = torch.zeros((len(chosen), self.group**2), dtype=torch.bool)
            for tile, ones in enumerate(chosen):
                tiles[tile, list(ones)] = True
            yield self._untile(tiles, shape)

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        tiles = self._tiles(torch.arange(shape[0] * shape[1]).view(shape[0], shape[1])).numpy()
        sums = np.concatenate((tiles.reshape(-1, self.group), tiles.transpose(0, 2, 1).reshape(-1, self.group)))
        row = np.repeat(np.arange(len(sums)), self.group)
        matrix = csr_array((np.ones(sums.size), (row, sums.ravel())), shape=(len(sums), tiles.size))
        right = np.full(len(sums), float(self.keep))
        if self.protected is not None or self.forbidden is not None:
            fixed, values = fixed_rows(self.protected, self.forbidden)
            matrix, right = vstack((matrix, fixed)), np.concatenate((right, values))
        return LinearConstraint(matrix, right, right)
