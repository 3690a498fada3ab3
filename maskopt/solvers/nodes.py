"""What branch and bound works on: a batch of nodes, and their relaxations as one problem."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.bounds import sdp_bound
from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction, Move, Point, Quadratic
from maskopt.problems.base import shift_deficit
from maskopt.problems.convexity import eigenvalue_floor

__all__ = ["Nodes", "Relaxation"]


@dataclass
class Nodes:
    """Nodes of a search tree, of bands of shape (rows, d).

    Attributes
    ----------
    kept, pruned : Tensor
        Entries that are decided, boolean, shape (nodes, rows, d).
    x : Tensor
        Where the relaxation starts, float64, shape (nodes, rows, d); moved into the hull when its turn comes.
    bound : Tensor
        Proven lower bound so far, float64, shape (nodes,).
    """

    kept: Tensor
    pruned: Tensor
    x: Tensor
    bound: Tensor

    @staticmethod
    def root(masks: PartitionMatroid, problem: LayerReconstruction, known: float) -> Nodes:
        """Return the one node in which only what the set fixes is decided; `known` bounds it."""
        nothing = torch.zeros(problem.shape, dtype=torch.bool, device=problem.device)
        fixed = [nothing if one is None else one.to(problem.device) for one in (masks.protected, masks.forbidden)]
        x = masks.center(problem.shape, torch.float64, problem.device)
        bound = torch.full((1,), known, dtype=torch.float64, device=problem.device)
        return Nodes(fixed[0].clone().unsqueeze(0), fixed[1].clone().unsqueeze(0), x.unsqueeze(0), bound)

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, where: Tensor) -> Nodes:
        """Return some nodes, by a boolean mask or numbers."""
        return Nodes(self.kept[where], self.pruned[where], self.x[where], self.bound[where])

    def pop(self, number: int) -> Nodes:
        """Remove and return the nodes of least bound."""
        order = self.bound.argsort(stable=True)
        first, rest = self.take(order[:number]), self.take(order[number:])
        self.kept, self.pruned, self.x, self.bound = rest.kept, rest.pruned, rest.x, rest.bound
        return first

    def joined(self, other: Nodes) -> Nodes:
        """Return these nodes and others."""
        pairs = ((self.kept, other.kept), (self.pruned, other.pruned), (self.x, other.x), (self.bound, other.bound))
        return Nodes(*(torch.cat(pair) for pair in pairs))

    def copied(self) -> Nodes:
        """Return nodes whose decisions can be changed apart from these."""
        return Nodes(self.kept.clone(), self.pruned.clone(), self.x, self.bound)


class Relaxation(Quadratic):
    """The shifted error of one band of rows, for any number of copies of it one above the other.

    With p = 1 - x and Q = Diag(w) G Diag(w) of each row: p^T (Q - Diag(D)) p + <D, p>, convex among the masks' hull.

    Parameters
    ----------
    forms : Tensor
        Q of each row of the band, float64, shape (rows, d, d).
    shift : Tensor
        D, shape (rows, d).
    copies : int
    lost : float
        How far the sum over the band may lie below its tangents within the hull, rounding included.
    """

    def __init__(self, forms: Tensor, shift: Tensor, copies: int, lost: float) -> None:
        self.forms, self.shift, self.copies = forms, shift, copies
        self.lost = lost
        self.known = 0.0
        self._bent = forms - torch.diag_embed(shift)

    @staticmethod
    def of(problem: LayerReconstruction, masks: PartitionMatroid, incumbent: Tensor) -> Relaxation:
        """Return the relaxation of a band, with the diagonal moved as far as convexity allows."""
        weight, gram = problem.scaled_weight.double(), problem.symmetric_gram()
        forms = weight.unsqueeze(2) * gram * weight.unsqueeze(1)
        width = masks.tile_of(problem.shape)[1]
        alike = masks.separable and not masks.at_most and not isinstance(masks.keep, Tensor)
        group = width if alike and width < problem.shape[1] else None
        proven = sdp_bound(problem, incumbent.sum(1), group=group, accuracy=1e-4)
        shift = proven.shift / problem.unit
        basis = _directions(masks, problem.shape).to(forms)
        lost = 0.0
        for row, form in enumerate(forms):
            if basis.shape[1] == 0:  # one mask
                shift[row] = 0.0
                continue
            size = float(form.diagonal().sum())
            # Whatever a shift claims, it is taken back as far as convexity lacks; should little be left, what all
            # sets have is better: none at all, brought up to the least eigenvalue.
            candidates: list[Tensor] = []
            for start in (shift[row], torch.zeros_like(shift[row])):
                lowest = float(torch.linalg.eigvalsh(basis.T @ (form - torch.diag(start)) @ basis)[0])
                candidates.append(start + (lowest if candidates else min(0.0, lowest)) - 1e-12 * size)
            shift[row] = max(candidates, key=lambda one: float(one.sum()))
            within = basis.T @ (form - torch.diag(shift[row])) @ basis
            floor = eigenvalue_floor((within + within.T) / 2)
            assert floor is not None
            # The basis is orthonormal to rounding; a step between masks has at most d entries of size one.
            bent = size + float(shift[row].abs().sum())
            lost += (-floor + len(form) * 2.0**-50 * bent) * len(form)
        relaxation = Relaxation(forms, shift, 1, lost)
        if masks.separable and not masks.at_most:
            # Where every mask keeps as many entries of each row as the incumbent, the bound is one for all of them.
            relaxation.known = max(0.0, float(proven.bound.sum()) / problem.unit)
        return relaxation

    def repeated(self, copies: int) -> Relaxation:
        """Return the relaxation of many nodes."""
        many = copy.copy(self)
        many.copies = copies
        return many

    def error(self, masks: Tensor) -> Tensor:
        """Return the error of masks of the band, shape (number, rows, d) -> (number,)."""
        return self.objective(masks.flatten(0, 1)).view(masks.shape[:2]).sum(1).clamp_min(0.0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.copies * self.forms.shape[0], self.forms.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.forms.device

    def _times(self, x: Tensor) -> Tensor:
        """Return (Q - Diag(D)) x, row by row."""
        rows, d = self.forms.shape[:2]
        if rows == 1:
            return x @ self._bent[0]
        stacked = x.view(-1, rows, d).transpose(0, 1)
        return torch.bmm(stacked, self._bent).transpose(0, 1).reshape(x.shape)

    def at(self, x: Tensor) -> Point:
        bent = self._times(1.0 - x).mul_(-2.0)
        return Point(x, bent.view(-1, *self.shift.shape).sub_(self.shift).view(x.shape))

    def along(self, x: Tensor) -> Move:
        return Move(x, self._times(x).mul_(2.0))

    def value(self, point: Point) -> Tensor:
        # f = p^T B p + <D, p> and gradient = -(2 B p + D).
        half = (self.shift - point.gradient.view(-1, *self.shift.shape)).view(point.x.shape)
        return half.mul_(1.0 - point.x).sum(1).mul_(0.5)

    def diagonal(self) -> Tensor:
        return self._bent.diagonal(dim1=1, dim2=2).repeat(self.copies, 1)

    def smoothness(self) -> Tensor:
        return self._bent.abs().sum(2).amax(1).mul(2.0).repeat(self.copies)

    def rows(self, index: slice | Tensor) -> Relaxation:
        number = len(range(self.shape[0])[index]) if isinstance(index, slice) else len(index)
        return self.repeated(number // self.forms.shape[0])

    def objective(self, mask: Tensor) -> Tensor:
        pruned = (~mask).double().view(-1, *self.shift.shape)
        return (torch.einsum("nrd,rde->nre", pruned, self.forms) * pruned).sum(2).view(-1)

    def scale(self) -> Tensor:
        return self.forms.sum((1, 2)).repeat(self.copies)

    def double(self) -> Relaxation:
        return self

    def deficit(self, point: Point, shift: Tensor | None = None) -> Tensor:
        # What is known of a band as a whole, spread over its rows.
        band = len(self.shift)
        return shift_deficit(point, shift) + self.lost / band


def _directions(masks: PartitionMatroid, shape: tuple[int, int]) -> Tensor:
    """Return an orthonormal basis of what differences of two masks span in a row, float64, shape (d, dimensions)."""
    columns = shape[1]
    if masks.at_most or not masks.separable:
        return torch.eye(columns, dtype=torch.float64)
    width = masks.tile_of(shape)[1]
    # Every group of the row has a fixed sum.
    sums = torch.eye(columns // width, dtype=torch.float64).repeat_interleave(width, 0)
    basis: Tensor = torch.linalg.qr(sums, mode="complete").Q
    return basis[:, columns // width :]
