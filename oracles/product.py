"""Products of sets: masks of several weights side by side, each in a set of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import block_diag, csr_array, hstack
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.exact import floor_of_sum
from maskopt.oracles.base import MaskSet, Shape
from maskopt.oracles.fixed import refuse_contradiction
from maskopt.oracles.milp import MilpFormulation
from maskopt.oracles.protocols import CanProject, CanRestrict, HasFaces

__all__ = ["Product"]


class Product(MaskSet):
    """Masks of several weights at once, for objectives that depend on all of them.

    A mask of the product is one matrix, usually of one row: the parts' masks one after the other, each in row-major
    order. `split` and `join` translate.

    Parameters
    ----------
    parts : sequence of (MaskSet, (int, int))
        The set of each weight and the weight's shape (rows, d). The sets need oracles of faces, projections and
        restrictions, as partition matroids, `Units` and `TransposableNM` have.

    Raises
    ------
    MaskoptError
        If there is no part, a set lacks one of these methods or does not fit its shape. Methods raise it for matrices
        of another number of entries.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import NM, PerRow
    >>> masks = Product([(PerRow(1), (2, 2)), (NM(keep=2, group=4), (1, 4))])
    >>> masks.lmo_mask(torch.tensor([[0.0, -1.0, -3.0, 2.0, 4.0, 1.0, 2.0, 3.0]])).int().tolist()
    [[0, 1, 1, 0, 0, 1, 1, 0]]
    >>> masks.count((1, 8))
    24
    """

    def __init__(self, parts: Sequence[tuple[MaskSet, Shape]]) -> None:
        if not parts:
            raise MaskoptError("A product needs at least one set.")
        for masks, shape in parts:
            for protocol, what in ((HasFaces, "faces"), (CanProject, "a projection"), (CanRestrict, "restrictions")):
                if not isinstance(masks, protocol):
                    raise MaskoptError(f"A product needs sets with {what}; {masks} has none.")
            masks.check(shape)
        self.parts = [(masks, (shape[0], shape[1])) for masks, shape in parts]
        self._sizes = [rows * columns for _, (rows, columns) in self.parts]
        self.exact = all(masks.exact for masks, _ in parts)  # of an instance: it depends on the parts
        self.protected = self._fixed("protected")
        self.forbidden = self._fixed("forbidden")

    def __repr__(self) -> str:
        return f"Product({', '.join(f'{masks} of {rows} x {columns}' for masks, (rows, columns) in self.parts)})"

    def _fixed(self, kind: str) -> Tensor | None:
        own = [getattr(masks, kind) for masks, _ in self.parts]
        if all(entries is None for entries in own):
            return None
        whole = [
            torch.zeros(shape, dtype=torch.bool) if entries is None else entries.cpu()
            for entries, (_, shape) in zip(own, self.parts, strict=True)
        ]
        return torch.cat([entries.flatten() for entries in whole]).unsqueeze(0)

    @property
    def size(self) -> int:
        """Number of entries of all weights together."""
        return sum(self._sizes)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Return the part of a matrix for each weight, in the weight's shape; views where that is possible.

        Parameters
        ----------
        matrix : Tensor
            Any shape of `size` entries.
        """
        if matrix.numel() != self.size:
            raise MaskoptError(f"{self} has {self.size} entries; got a matrix of shape {tuple(matrix.shape)}.")
        pieces = torch.split(matrix.reshape(-1), self._sizes)
        return [piece.view(shape) for piece, (_, shape) in zip(pieces, self.parts, strict=True)]

    def join(self, matrices: Sequence[Tensor], shape: Shape | None = None) -> Tensor:
        """Undo `split`; by default into one row."""
        whole = torch.cat([matrix.reshape(-1) for matrix in matrices])
        return whole.view(1, -1) if shape is None else whole.view(tuple(shape))

    def _each(self, call: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        """Apply a function of a set and matrices part by part, and join what it returns."""
        pieces = zip(*(self.split(matrix) for matrix in matrices), strict=True)
        found = [call(masks, *own) for (masks, _), own in zip(self.parts, pieces, strict=True)]
        return self.join(found, matrices[0].shape)

    def check(self, shape: Shape) -> None:
        if shape[0] * shape[1] != self.size:
            raise MaskoptError(f"{self} has {self.size} entries; a weight of shape {tuple(shape)} has another number.")

    def lmo(self, cost: Tensor) -> Tensor:
        return self._each(lambda masks, own: masks.lmo(own), cost)

    def lmo_bound(self, cost: Tensor) -> Tensor:
        pieces = zip(self.parts, self.split(cost), strict=True)
        bounds = torch.cat([masks.lmo_bound(own).double() for (masks, _), own in pieces])
        return torch.tensor([floor_of_sum(bounds)], dtype=torch.float64, device=cost.device)

    def contains(self, mask: Tensor) -> bool:
        return mask.numel() == self.size and all(
            masks.contains(own) for (masks, _), own in zip(self.parts, self.split(mask), strict=True)
        )

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.check(shape)
        return self.join([masks.center(own, dtype, device) for masks, own in self.parts], shape)

    def round(self, x: Tensor) -> Tensor:
        return self._each(lambda masks, own: masks.round(own), x)

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of minimal cost on the smallest face that contains `x`.

        Parameters
        ----------
        cost, x : Tensor
            Finite, of `size` entries; `x` in the hull.
        """
        return self._each(lambda masks, *own: masks.inface(*own), cost, x)

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest step size for which x + step * direction stays in the hull, shape (rows,).

        Parameters
        ----------
        x, direction : Tensor
            Of `size` entries; `x` in the hull, `direction` in its span.
        """
        pieces = zip(self.parts, self.split(x), self.split(direction), strict=True)
        steps = [masks.max_step(*own).min() for (masks, _), *own in pieces if isinstance(masks, HasFaces)]
        return torch.stack(steps).min().expand(len(x)).clone()

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the hull nearest to `x`, in the shape of `x`."""
        return self._each(lambda masks, own: masks.project(own), x)

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> Product:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`.

        Parameters
        ----------
        kept, pruned : Tensor, optional
            Boolean, of `size` entries.

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """
        refuse_contradiction(kept, pruned)
        none: list[Tensor | None] = [None] * len(self.parts)
        own = [none if entries is None else self.split(entries) for entries in (kept, pruned)]
        parts: list[tuple[MaskSet, Shape]] = []
        for (masks, shape), keep, prune in zip(self.parts, *own, strict=True):
            assert isinstance(masks, CanRestrict), "checked in the constructor"
            parts.append((masks.restrict(keep, prune), shape))
        return Product(parts)

    def count(self, shape: Shape) -> int:
        self.check(shape)
        return math.prod(masks.count(own) for masks, own in self.parts)

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        self.check(shape)
        every = [list(masks.enumerate(own)) for masks, own in self.parts]
        return (self.join(combination, shape) for combination in itertools.product(*every))

    def milp_constraints(self, shape: Shape) -> MilpFormulation:
        self.check(shape)
        formulations = [masks.formulation(own) for masks, own in self.parts]
        # The masks' entries of all parts come first, then the auxiliary variables of all parts.
        entries = block_diag([part.matrix[:, : part.entries] for part in formulations], format="csr")
        auxiliary = block_diag([part.matrix[:, part.entries :] for part in formulations], format="csr")
        return MilpFormulation(
            LinearConstraint(
                csr_array(hstack((entries, auxiliary))),
                np.concatenate([part.constraints.lb for part in formulations]),
                np.concatenate([part.constraints.ub for part in formulations]),
            ),
            sum(part.auxiliary for part in formulations),
            *(
                np.concatenate([np.asarray(getattr(part, name), dtype=float) for part in formulations]).tolist() or 0
                for name in ("integrality", "lower", "upper")
            ),
        )
