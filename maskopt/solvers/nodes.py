"""What branch and bound works on: a batch of nodes, and their relaxations as one problem."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.bounds import sdp_bound
from maskopt.oracles import PartitionMatroid
from maskopt.problems import Direction, LayerReconstruction, Point, Quadratic
from maskopt.problems.base import shift_convexity_error
from maskopt.problems.convexity import eigenvalue_floor

__all__ = ["Nodes", "Relaxation", "always_kept"]


@dataclass
class Nodes:
    """Nodes of a search tree, of row blocks of shape (rows, d).

    Attributes
    ----------
    kept, pruned : Tensor
        Entries that are decided, boolean, shape (nodes, rows, d).
    x : Tensor
        Where the relaxation starts, float64, shape (nodes, rows, d); projected onto the hull when the node is solved.
    bound : Tensor
        Proven lower bound so far, float64, shape (nodes,).
    """

    kept: Tensor
    pruned: Tensor
    x: Tensor
    bound: Tensor

    @staticmethod
    def root(masks: PartitionMatroid, problem: LayerReconstruction, kept: Tensor, known: float) -> Nodes:
        """Return the one node in which only what the set fixes and `kept` are decided; `known` bounds it."""
        pruned = torch.zeros_like(kept) if masks.forbidden is None else masks.forbidden.to(problem.device).clone()
        x = masks.center(problem.shape, torch.float64, problem.device)
        bound = torch.full((1,), known, dtype=torch.float64, device=problem.device)
        return Nodes(kept.clone().unsqueeze(0), pruned.unsqueeze(0), x.unsqueeze(0), bound)

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, where: Tensor) -> Nodes:
        """Return some nodes, by a boolean mask or numbers."""
        return Nodes(self.kept[where], self.pruned[where], self.x[where], self.bound[where])

    def pop(self, number: int) -> Nodes:
        """Remove and return the nodes of smallest bound."""
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


def always_kept(problem: LayerReconstruction, kept: Tensor, incumbent: Tensor, error: float) -> Tensor:
    """Return which entries every mask of a row block keeps that is better than the incumbent, shape (rows, d).

    `kept` are among them, and the incumbent, whose error is given in full, keeps all of them.

    With Q = Diag(w) G Diag(w), pruning entry i costs at least Q_ii less what others can make up for, 2 sum |Q_ij| over
    negative Q_ij: what all pruned entries but i lose together is not negative. Entries that are kept for certain make
    up for nothing, so that others may follow. Without such entries the rest of a row is of ordinary size, and so is
    the rounding of its bounds. Where the target is not W, what it lacks counts as an entry that is always pruned, so
    that 2 w_i ((T - W) G)_i is added.
    """
    weight, offset = _weight_and_offset(problem)
    gram, sizes = problem.symmetric_gram(), problem.entry_sizes()
    forms = weight.unsqueeze(2) * gram * weight.unsqueeze(1)
    alone = forms.diagonal(dim1=1, dim2=2) + 2.0 * weight * (offset @ gram)
    forms.diagonal(dim1=1, dim2=2).zero_()
    helping = forms.clamp_max_(0.0).neg_()
    missing = problem.indefiniteness() + (problem.shape[1] + 8) * 2.0**-50
    bar = error / problem.unit * (1 + 2.0**-40)
    apart = offset.abs() * sizes
    while True:
        spread = weight.abs() * sizes * ~kept
        # A Gram may be indefinite by rounding, in all rows.
        lost = missing * ((spread + apart).square().sum() + spread * (spread + apart).sum(1, keepdim=True))
        help_ = torch.einsum("rij,rj->ri", helping, (~kept).double())
        more = incumbent & ~kept & (alone - 2.0 * help_ - lost > bar)
        if not bool(more.any()):
            return kept
        kept = kept | more


class Relaxation(Quadratic):
    """The shifted error of one row block, for any number of copies of it one above the other.

    With p = 1 - x and Q = Diag(w) G Diag(w) of each row: p^T (Q - Diag(D)) p + <D, p>, convex among the masks' hull.
    With b = T - W the error of a mask has the linear part 2 <w * (G b), p>, which is added to the diagonal of Q and to
    D, as p^2 = p for masks, and the constant b^T G b. Entries that every mask in question keeps have no part in it.
    Objectives are in the unit `problem.unit` * 4^`power`, in which the entries that are left are near one.

    Parameters
    ----------
    forms : Tensor
        Q of each row of the row block, with the linear part, float64, shape (rows, d, d).
    shift : Tensor
        D, with the linear part, shape (rows, d).
    constant : Tensor
        Shape (rows,).
    copies : int
    lost : float
        How far the sum over the row block may lie below its linear models within the hull, rounding included.
    power : int
    """

    def __init__(
        self, forms: Tensor, shift: Tensor, constant: Tensor, copies: int, lost: float, power: int = 0
    ) -> None:
        self.forms, self.shift, self.constant, self.copies = forms, shift, constant, copies
        self.lost, self.power = lost, power
        self.known = 0.0
        self._shifted = forms - torch.diag_embed(shift)

    @staticmethod
    def of(problem: LayerReconstruction, masks: PartitionMatroid, incumbent: Tensor, kept: Tensor) -> Relaxation:
        """Return the relaxation of a row block, with the diagonal shifted as far as convexity allows.

        Parameters
        ----------
        problem, masks
            The row block.
        incumbent : Tensor
            Its best mask so far, shape (rows, d).
        kept : Tensor
            Entries that every better mask keeps, shape (rows, d).
        """
        weight, offset = _weight_and_offset(problem)
        weight, gram = weight.masked_fill(kept, 0.0), problem.symmetric_gram()
        largest = (weight.abs() * gram.diagonal().clamp_min(0.0).sqrt()).amax()
        power = int(torch.frexp(largest).exponent)
        by = torch.tensor(-power, device=weight.device)
        weight, offset = torch.ldexp(weight, by), torch.ldexp(offset, by)
        forms = weight.unsqueeze(2) * gram * weight.unsqueeze(1)
        full, bounds = _shifts(problem, masks, incumbent, kept)
        shift = _in_unit(full, problem.unit, power)
        lost = 0.0
        for row, form in enumerate(forms):
            basis = _directions(masks, problem.shape, kept[row]).to(forms)
            if basis.shape[1] == 0:  # one mask
                shift[row] = 0.0
                continue
            shift[row], missing = _convex_shift(form, shift[row].masked_fill(kept[row], 0.0), basis, kept[row])
            size = float((form - torch.diag(shift[row])).abs().sum() + shift[row].abs().sum())
            # A step between masks has at most d entries of size one.
            lost += missing * len(form) + (len(form) + 8) * 2.0**-49 * size
        constant = torch.zeros_like(shift[:, 0])
        if problem.aims_elsewhere:
            product = offset @ gram
            linear, constant = 2.0 * weight * product, (offset * product).sum(1)
            forms.diagonal(dim1=1, dim2=2).add_(linear)
            shift += linear
            sizes = problem.entry_sizes()
            reach = ((weight.abs() + offset.abs()) * sizes).sum(1)
            lost += float((len(sizes) + 8) * 2.0**-48 * reach.square().sum())
        relaxation = Relaxation(forms, shift, constant, 1, lost, power)
        if masks.separable and not masks.at_most and not problem.aims_elsewhere:
            # Where every mask keeps as many entries of each row as the incumbent, the bound is one for all of them.
            relaxation.known = max(0.0, float(_in_unit(bounds, problem.unit, power).sum()) * (1 - 2.0**-50))
        return relaxation

    def in_unit(self, error: float, problem: LayerReconstruction) -> float:
        """Return an error given in full in the unit of this object."""
        return float(_in_unit(torch.tensor(error, dtype=torch.float64), problem.unit, self.power))

    def in_full(self, error: float, problem: LayerReconstruction) -> float:
        """Undo `in_unit`."""
        return math.ldexp(math.ldexp(error * problem.unit, self.power), self.power)

    def repeated(self, copies: int) -> Relaxation:
        """Return the relaxation of many nodes."""
        many = copy.copy(self)
        many.copies = copies
        return many

    def error(self, masks: Tensor) -> Tensor:
        """Return the error of masks of the row block, shape (number, rows, d) -> (number,)."""
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
            return x @ self._shifted[0]
        stacked = x.view(-1, rows, d).transpose(0, 1)
        return torch.bmm(stacked, self._shifted).transpose(0, 1).reshape(x.shape)

    def evaluate(self, x: Tensor) -> Point:
        product = self._times(1.0 - x).mul_(-2.0)
        return Point(x, product.view(-1, *self.shift.shape).sub_(self.shift).view(x.shape))

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, self._times(x).mul_(2.0))

    def value(self, point: Point) -> Tensor:
        # f = p^T B p + <D, p> and gradient = -(2 B p + D).
        half = (self.shift - point.gradient.view(-1, *self.shift.shape)).view(point.x.shape)
        return half.mul_(1.0 - point.x).sum(1).mul_(0.5).add_(self.constant.repeat(self.copies))

    def diagonal(self) -> Tensor:
        return self._shifted.diagonal(dim1=1, dim2=2).repeat(self.copies, 1)

    def smoothness(self) -> Tensor:
        return self._shifted.abs().sum(2).amax(1).mul(2.0).repeat(self.copies)

    def rows(self, index: slice | Tensor) -> Relaxation:
        number = len(range(self.shape[0])[index]) if isinstance(index, slice) else len(index)
        return self.repeated(number // self.forms.shape[0])

    def objective(self, mask: Tensor) -> Tensor:
        pruned = (~mask).double().view(-1, *self.shift.shape)
        return ((torch.einsum("nrd,rde->nre", pruned, self.forms) * pruned).sum(2) + self.constant).view(-1)

    def scale(self) -> Tensor:
        return (self.forms.sum((1, 2)) + self.constant).repeat(self.copies)

    def double(self) -> Relaxation:
        return self

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        # What is known of a row block as a whole, spread over its rows.
        row_block = len(self.shift)
        return shift_convexity_error(point, shift) + self.lost / row_block


def _weight_and_offset(problem: LayerReconstruction) -> tuple[Tensor, Tensor]:
    """Return W and T - W in scaled units, float64, shape (rows, d)."""
    wide = problem.double()
    return wide.scaled_weight, wide.scaled_target - wide.scaled_weight


def _in_unit(value: Tensor, unit: float, power: int) -> Tensor:
    by = torch.tensor(-power, device=value.device)
    return torch.ldexp(torch.ldexp(value / unit, by), by)


def _shifts(
    problem: LayerReconstruction, masks: PartitionMatroid, incumbent: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the diagonals of the semidefinite bounds of a row block's rows without `kept`, and the bounds in full.

    They are those of the layer that aims at its own weights' output: the same diagonals leave the error convex.
    """
    if problem.aims_elsewhere:
        problem = LayerReconstruction(problem.weight, problem.gram, check=False)
    if not bool(kept.any()):
        width = masks.tile_of(problem.shape)[1]
        alike = masks.separable and not masks.at_most and not isinstance(masks.keep, Tensor)
        group = width if alike and width < problem.shape[1] else None
        proven = sdp_bound(problem, incumbent.sum(1), group=group, accuracy=1e-4)
        return proven.shift, proven.bound
    shift = torch.zeros(problem.shape, dtype=torch.float64, device=problem.device)
    bounds = shift.new_zeros(problem.shape[0])
    for row in range(problem.shape[0]):
        free = (~kept[row]).nonzero().flatten()
        if len(free):
            part = problem.weight[row : row + 1, free], problem.gram[free][:, free]
            few = LayerReconstruction(*part, check=False)
            proven = sdp_bound(few, incumbent[row, free].sum().view(1), accuracy=1e-4)
            shift[row, free], bounds[row] = proven.shift[0], proven.bound[0]
    return shift, bounds


def _convex_shift(form: Tensor, aim: Tensor, basis: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """Return a diagonal near `aim` that leaves a form convex on a basis, and how far it may still be from convex."""
    size = float(form.diagonal().sum())
    # Whatever a shift claims, it is taken back as far as convexity lacks; should little be left, what all
    # sets have is better: none at all, brought up to the smallest eigenvalue.
    candidates: list[Tensor] = []
    for start in (aim, torch.zeros_like(aim)):
        # The basis is orthonormal to rounding, and products with it are rounded too.
        rounding = len(form) * 2.0**-50 * (size + float(start.abs().sum()))
        lowest = float(torch.linalg.eigvalsh(basis.T @ (form - torch.diag(start)) @ basis)[0])
        back = (lowest if candidates else min(0.0, lowest)) - 1e-12 * size - 2.0 * rounding
        candidates.append((start + back).masked_fill(kept, 0.0))
    shift = max(candidates, key=lambda one: float(one.sum()))
    within = basis.T @ (form - torch.diag(shift)) @ basis
    rounding = len(form) * 2.0**-50 * (size + float(shift.abs().sum()))
    within = (within + within.T) / 2
    within.diagonal().sub_(rounding)
    floor = eigenvalue_floor(within)
    return shift, float(torch.linalg.matrix_norm(within)) if floor is None else -floor


def _directions(masks: PartitionMatroid, shape: tuple[int, int], kept: Tensor) -> Tensor:
    """Return an orthonormal basis of what differences of two masks that keep some entries span in a row.

    Float64, shape (d, dimensions).
    """
    columns = shape[1]
    free = (~kept).cpu()
    identity = torch.eye(columns, dtype=torch.float64)
    if masks.at_most or not masks.separable:
        return identity[:, free]
    width = masks.tile_of(shape)[1]
    found = []
    # Every group of the row has a fixed sum.
    for group in torch.arange(columns).view(-1, width):
        some = group[free[group]]
        if len(some) > 1:
            ones = torch.ones((len(some), 1), dtype=torch.float64)
            found.append(identity[:, some] @ torch.linalg.qr(ones, mode="complete").Q[:, 1:])
    return torch.cat(found, 1) if found else identity[:, :0]
