"""Weights fitted to some units of a layer, and what removing, adding and swapping units changes, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.problems.checks import ridged_factor
from maskopt.problems.unit_blocks import UnitBlocks

__all__ = ["Additions", "Refit", "traces"]

_PASS = 2**16  # entries that stay in the cache for several passes
_CHUNK = 2**22  # entries of the arrays of pairs that are computed at a time


def traces(matrices: Tensor, forms: Tensor) -> Tensor:
    """Return tr(A^-1 M) of many small matrices, float64, shape (...).

    Parameters
    ----------
    matrices : Tensor
        A, symmetric positive definite, shape (..., w, w).
    forms : Tensor
        M, symmetric positive semidefinite, shape (..., w, w).
    """
    if matrices.shape[-1] == 1:
        return (forms / matrices)[..., 0, 0]
    factor, _ = torch.linalg.cholesky_ex(matrices)
    return torch.cholesky_solve(forms, factor).diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True)
class Additions:
    """Units that are not kept, and what they would add.

    Attributes
    ----------
    units : Tensor
        Int64, shape (c,).
    reach : Tensor
        t = K_SS^-1 K_Sj, shape (k w, c, w).
    schur : Tensor
        K_jj - K_jS t_j, shape (c, w, w).
    rest : Tensor
        r = B_j - V K_Sj, shape (rows, c, w).
    gains : Tensor
        tr(r schur^-1 r^T), shape (c,).
    """

    units: Tensor
    reach: Tensor
    schur: Tensor
    rest: Tensor
    gains: Tensor


class Refit:
    """The weights of least error on the columns of the kept units, with the inverse Gram there.

    With S the columns kept, P = K_SS^-1 and V = B_S P, B = T K: removing unit u costs tr(V_u P_uu^-1 V_u^T); adding
    unit j gains tr(r_j s_j^-1 r_j^T) with t_j = P K_Sj, s_j = K_jj - K_jS t_j, r_j = B_j - V K_Sj; and a swap is a
    removal after an addition, which changes P by t_j s_j^-1 t_j^T and V by -r_j s_j^-1 t_j^T.

    Parameters
    ----------
    blocks : UnitBlocks
    kept : Tensor
        Units, int64, shape (k,).

    Attributes
    ----------
    kept : Tensor
        Units in the order of the columns of `inverse` and `weight`.
    inverse : Tensor
        P, float64, shape (k w, k w).
    weight : Tensor
        V, float64, shape (rows, k w).
    """

    def __init__(self, blocks: UnitBlocks, kept: Tensor) -> None:
        self.blocks, self.kept = blocks, kept
        self.refresh()

    def refresh(self) -> None:
        """Compute inverse and weights anew, by one factorisation."""
        index = self.blocks.columns(self.kept)
        factor = ridged_factor(self.blocks.gram[index.unsqueeze(1), index])
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = torch.cholesky_solve(self.blocks.product[:, index].T, factor).T.contiguous()

    def spread(self) -> Tensor:
        """Return the weights on all columns, zero where nothing is kept, shape (rows, n w)."""
        full = torch.zeros_like(self.blocks.target)
        full[:, self.blocks.columns(self.kept)] = self.weight
        return full

    def loss(self) -> Tensor:
        """Return the error tr((T - V) K (T - V)^T), one number in the unit of the blocks.

        The form is quadratic in what is left, so that an error of V enters in second order only.
        """
        rest = self.blocks.target - self.spread()
        return (rest * (rest @ self.blocks.gram)).sum().clamp_min(0.0)

    def diagonal_blocks(self) -> tuple[Tensor, Tensor]:
        """Return P_uu and V_u^T V_u of all kept units, each of shape (k, w, w)."""
        number, width = len(self.kept), self.blocks.width
        place = torch.arange(number, device=self.kept.device)
        own = self.inverse.view(number, width, number, width)[place, :, place]
        units = self.weight.view(len(self.weight), number, width)
        if width == 1:
            return own, units.square().sum(0).unsqueeze(2)
        units = units.transpose(0, 1)
        return own, units.mT @ units

    def removal_costs(self) -> Tensor:
        """Return what removing each kept unit alone adds to the error, shape (k,)."""
        own, forms = self.diagonal_blocks()
        return traces(own, forms).clamp_min(0.0)

    def cheapest(self, must: Tensor) -> Tensor:
        """Return the places of the kept units, those whose removal costs least first and those that must stay last.

        Parameters
        ----------
        must : Tensor
            Boolean, shape (units,).
        """
        return torch.argsort(self.removal_costs().masked_fill_(must[self.kept], torch.inf), stable=True)

    def missing(self, may: Tensor | None = None) -> Tensor:
        """Return the units that are not kept, of those that may be: boolean, shape (units,); by default all."""
        if may is None:
            may = torch.ones(self.blocks.number, dtype=torch.bool, device=self.kept.device)
        return may.clone().index_fill_(0, self.kept, False).nonzero().flatten()

    def most_gaining(self, others: Tensor, number: int) -> Tensor:
        """Return those of some other units that each alone would gain most."""
        return others[torch.argsort(self.additions(others).gains, descending=True, stable=True)[:number]]

    def additions(self, units: Tensor) -> Additions:
        """Return what each of some other units would add, for (c,) of them."""
        blocks, width = self.blocks, self.blocks.width
        old, new = blocks.columns(self.kept), blocks.columns(units)
        cross = blocks.gram[old.unsqueeze(1), new]
        reach = self.inverse @ cross
        own = blocks.gram.view(blocks.number, width, blocks.number, width)[units, :, units]
        coupled, answer = (part.view(len(old), len(units), width).transpose(0, 1) for part in (cross, reach))
        schur = own - ((coupled * answer).sum(1, keepdim=True) if width == 1 else coupled.mT @ answer)
        # Positive definite but for rounding; what is left of an input that the kept ones explain is noise.
        floor = len(blocks.gram) * 2.0**-50 * own.diagonal(dim1=1, dim2=2)
        diagonal = schur.diagonal(dim1=1, dim2=2)
        diagonal.copy_(torch.maximum(diagonal, floor))
        rest = (blocks.product[:, new] - self.weight @ cross).view(len(blocks.target), len(units), width)
        return Additions(units, reach.view(len(old), len(units), width), schur, rest, traces(schur, _forms(rest)))

    def swap_changes(self, additions: Additions) -> Tensor:
        """Return how swaps change the error, shape (k, c): a kept unit against one of the additions."""
        own, forms = self.diagonal_blocks()
        number, width = len(self.kept), self.blocks.width
        if width == 1:
            return self._single_changes(own.view(-1, 1), forms.view(-1, 1), additions)
        changes = self.weight.new_empty((number, len(additions.units)))
        chunk = max(1, _CHUNK // max(1, number * width * width))
        for start in range(0, len(additions.units), chunk):
            some = slice(start, start + chunk)
            reach, schur, rest = additions.reach[:, some], additions.schur[some], additions.rest[:, some]
            count = len(schur)
            cross = (
                (self.weight.T @ rest.reshape(len(rest), count * width))
                .view(number, width, count, width)
                .transpose(1, 2)
            )
            reach = reach.reshape(number, width, count, width).transpose(1, 2)  # (k, c, w, w)
            part = _divided(reach, schur)  # t s^-1
            inverse = own.unsqueeze(1) + _times(part, reach.mT)
            mixed = _times(cross, part.mT)
            form = forms.unsqueeze(1) - mixed - mixed.mT + _times(_times(part, _forms(rest)), part.mT)
            changes[:, some] = traces(inverse, form).clamp_min(0.0) - additions.gains[some]
        return changes

    def _single_changes(self, own: Tensor, forms: Tensor, additions: Additions) -> Tensor:
        """Return `swap_changes` for units of one column, in passes over few entries at a time."""
        reach, schur = additions.reach[:, :, 0], additions.schur[:, 0, 0]
        changes = self.weight.T @ additions.rest[:, :, 0]  # V_i^T r_j
        square = additions.rest[:, :, 0].square().sum(0)
        rows = max(1, _PASS // max(1, len(schur)))
        for start in range(0, len(changes), rows):
            some = slice(start, start + rows)
            part = reach[some] / schur
            form = (part * square).sub_(changes[some], alpha=2.0).mul_(part).add_(forms[some])
            inverse = part.mul_(reach[some]).add_(own[some])
            changes[some] = form.div_(inverse).clamp_min_(0.0).sub_(additions.gains)
        return changes

    def joined(self, places: Tensor, additions: Additions) -> UnitBlocks:
        """Return the problem of which of some units to keep, the rest of the kept ones being kept.

        With the additions J kept too, removing the units D costs tr(V_D P_DD^-1 V_D^T). So for choices among C, some of
        the kept ones and J, the error is, up to a constant, that of a smaller problem with target V_C and Gram
        P_CC^-1.

        Parameters
        ----------
        places : Tensor
            Of kept units in `kept`, shape (m,).
        additions : Additions
            Of (c,) units.

        Returns
        -------
        UnitBlocks
            Of m + c units: the kept ones, then the additions.
        """
        blocks, number = self.blocks, len(places) + len(additions.units)
        new, some = blocks.columns(additions.units), blocks.columns(places)
        reach = additions.reach.reshape(len(self.inverse), len(new))
        schur = blocks.gram[new.unsqueeze(1), new] - blocks.gram[new.unsqueeze(1), blocks.columns(self.kept)] @ reach
        rest = additions.rest.reshape(len(self.weight), len(new))
        factor = ridged_factor(schur)
        own, gained = torch.cholesky_inverse(factor), torch.cholesky_solve(rest.T, factor).T
        part = reach[some] @ own
        inverse = torch.cat(
            (
                torch.cat((self.inverse[some.unsqueeze(1), some] + part @ reach[some].T, -part), 1),
                torch.cat((-part.T, own), 1),
            )
        )
        weight = torch.cat((self.weight[:, some] - gained @ reach[some].T, gained), 1)
        if len(weight) > weight.shape[1]:
            weight = torch.linalg.qr(weight, mode="r").R  # of the same products of columns
        root = inverse.diagonal().rsqrt()
        gram = torch.cholesky_inverse(ridged_factor(inverse * root * root.unsqueeze(1))) * root * root.unsqueeze(1)
        units = torch.arange(number, device=new.device).repeat_interleave(blocks.width)
        return UnitBlocks(weight, (gram + gram.T).mul_(0.5), units)

    def exchange(self, place: int, addition: Additions) -> None:
        """Put the one unit of `addition` in the place of a kept one, by updates of low rank."""
        width = self.blocks.width
        mine = slice(place * width, (place + 1) * width)
        reach, schur, rest = addition.reach[:, 0], addition.schur[0], addition.rest[:, 0]
        factor = ridged_factor(schur)
        part = torch.cholesky_solve(reach.T, factor).T  # t s^-1
        # With the unit added: the inverse of its own block, and the columns that couple it.
        inverse, weight = self.inverse.addmm_(part, reach.T), self.weight.addmm_(rest, part.T, alpha=-1.0)
        new, gained = torch.cholesky_inverse(factor), torch.cholesky_solve(rest.T, factor).T
        gone, ahead = inverse[:, mine].clone(), -part[mine].T.clone()  # columns of the unit that leaves
        own = ridged_factor(gone[mine])
        half = torch.linalg.solve_triangular(own, gone.T, upper=False).T
        half_new = torch.linalg.solve_triangular(own, ahead.T, upper=False).T
        lost = torch.linalg.solve_triangular(own, weight[:, mine].clone().T, upper=False).T
        inverse.addmm_(half, half.T, alpha=-1.0)
        weight.addmm_(lost, half.T, alpha=-1.0)
        column = -part - half @ half_new.T
        inverse[:, mine], inverse[mine] = column, column.T
        inverse[mine, mine] = new - half_new @ half_new.T
        weight[:, mine] = gained - lost @ half_new.T
        self.kept = self.kept.clone()
        self.kept[place] = addition.units[0]


def _forms(rest: Tensor) -> Tensor:
    """Return r_j^T r_j for r of shape (rows, c, w), shape (c, w, w)."""
    if rest.shape[2] == 1:
        return rest.square().sum(0).unsqueeze(2)
    by_unit = rest.transpose(0, 1)
    return by_unit.mT @ by_unit


def _times(one: Tensor, two: Tensor) -> Tensor:
    """Return products of small matrices; of numbers, without the cost of a batched product."""
    return one * two if one.shape[-1] == 1 else one @ two


def _divided(matrices: Tensor, divisors: Tensor) -> Tensor:
    """Return A s^-1 for A of shape (k, c, w, w) and symmetric positive definite s of shape (c, w, w)."""
    if matrices.shape[-1] == 1:
        return matrices / divisors
    factor, _ = torch.linalg.cholesky_ex(divisors)
    return matrices @ torch.cholesky_inverse(factor)
