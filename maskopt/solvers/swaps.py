"""What a swap changes: the one place where its formula stands in floating point."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from maskopt.oracles import CanSwap, MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers.blocks import random_per_block
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import row_block_of

__all__ = ["SwapState", "pair_change", "single_changes"]

_REFRESH = 64  # changes of a row after which its carried product is computed anew


def single_changes(weight: Tensor, carried: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the change of a row's error by keeping a pruned entry, by pruning a kept one, and the size of both.

    With c = G (t - w * m), the residual's product with the Gram, keeping j alone changes the error by
    A_j = -2 w_j c_j + w_j^2 G_jj, and pruning i alone by B_i = 2 w_i c_i + w_i^2 G_ii.

    Parameters
    ----------
    weight, carried, own : Tensor
        w, c and w^2 diag(G), of one shape.
    """
    change = 2.0 * weight * carried
    return own - change, own + change, change.abs() + own


def pair_change(
    gram: Tensor, weights: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor], out: Tensor | None = None
) -> Tensor:
    """Return the change of a row's error by keeping j and pruning i at once: A_j + B_i - 2 w_j w_i G_ij.

    (SparseSwaps, arXiv 2512.10922, section 3.) Arguments broadcast.

    Parameters
    ----------
    gram : Tensor
        G_ij of each pair.
    weights : (Tensor, Tensor)
        w_j of what is kept and w_i of what is pruned.
    alone : (Tensor, Tensor)
        A_j and B_i: the changes by either alone (`single_changes`).
    out : Tensor, optional
        Where to write the result.
    """
    change = torch.mul(gram, weights[0] * -2.0, out=out)
    return change.mul_(weights[1]).add_(alone[0]).add_(alone[1])


class SwapState:
    """A mask of a layer that is changed by swaps, with what makes the change of any swap cheap to know.

    Carries the residual's product with the Gram, so that one swap's change costs O(1) and doing it O(d). In float64
    unless told otherwise: matrix products round by their shape, so that in float32 a swap may look good or bad
    depending on how many rows are solved together.

    Parameters
    ----------
    problem : LayerReconstruction
        The layer, or some of its rows.
    masks : MaskSet
        The set of masks.
    mask : Tensor
        Where to start, a member, boolean, shape (rows, d); it is copied.
    double : bool
        Whether to compute in float64 rather than in the problem's type.

    Attributes
    ----------
    mask : Tensor
        The present mask.
    carried : Tensor
        (T - W * mask) G in the problem's scaled units, shape (rows, d).

    Examples
    --------
    >>> import torch
    >>> import maskopt
    >>> layer = maskopt.synthetic(rows=2, d=6).problem()
    >>> masks = maskopt.PerRow(3)
    >>> state = SwapState(layer, masks, masks.lmo_mask(-layer.weight.abs()))
    >>> swaps = state.random(torch.Generator().manual_seed(0))  # one for each row
    >>> before, change = layer.objective(state.mask), state.change(*swaps)
    >>> state.swap(*swaps)
    >>> bool(torch.allclose(layer.objective(state.mask) - before, change, rtol=1e-9))
    True
    """

    def __init__(self, problem: LayerReconstruction, masks: MaskSet, mask: Tensor, *, double: bool = True) -> None:
        self.problem, self.masks, self.mask = problem.double() if double else problem, masks, mask.clone()
        problem = self.problem
        self.carried = problem.product(self.mask.to(problem.dtype))
        self._own = problem.diagonal()
        self._groups: Tensor | None = None  # filled on demand
        self._changes = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)

    def change(self, rows: Tensor, keep: Tensor, prune_rows: Tensor, prune: Tensor) -> Tensor:
        """Return how much each of some swaps, done alone, would change the layer's error.

        Swap n keeps the pruned entry (rows[n], keep[n]) and prunes the kept entry (prune_rows[n], prune[n]).

        Parameters
        ----------
        rows, keep, prune_rows, prune : Tensor
            Indices, int64, shape (number,).

        Returns
        -------
        Tensor
            In units of `problem.objective`, float64, shape (number,).
        """
        weight, gram = self.problem.scaled_weight, self.problem.scaled_gram
        add, drop = (rows, keep), (prune_rows, prune)
        added = single_changes(weight[add], self.carried[add], self._own[add])[0]
        dropped = single_changes(weight[drop], self.carried[drop], self._own[drop])[1]
        together = gram[keep, prune] * (rows == prune_rows)
        return pair_change(together, (weight[add], weight[drop]), (added, dropped)).double() * self.problem.unit

    def swap(self, rows: Tensor, keep: Tensor, prune_rows: Tensor, prune: Tensor) -> None:
        """Do some swaps at once; what they change together is what they change alone if no two are in one row.

        Parameters
        ----------
        rows, keep, prune_rows, prune : Tensor
            As for `change`; entries must be pruned and kept as it says.
        """
        self.mask[rows, keep] = True
        self.mask[prune_rows, prune] = False
        weight, gram = self.problem.scaled_weight, self.problem.scaled_gram
        self.carried.index_add_(0, rows, gram[keep] * weight[rows, keep].unsqueeze(1), alpha=-1)
        self.carried.index_add_(0, prune_rows, gram[prune] * weight[prune_rows, prune].unsqueeze(1))
        # Rounding adds up. Each row has its own count, so that no row's numbers depend on which others are there.
        self._changes += torch.bincount(torch.cat((rows, prune_rows)), minlength=len(self._changes))
        worn = (self._changes >= _REFRESH).nonzero().flatten()
        if len(worn):
            self.carried[worn] = self.problem.rows(worn).product(self.mask[worn].to(self.problem.dtype))
            self._changes[worn] = 0

    def random(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Propose a random swap in each row block that has one: of a pruned entry and a kept one of its group.

        All blocks get the same random numbers, so that no block's proposal depends on which others are there.

        Parameters
        ----------
        generator : torch.Generator
            On the CPU.

        Returns
        -------
        rows, keep, prune_rows, prune : Tensor
            As for `change`, in the order of the row blocks.

        Raises
        ------
        MaskoptError
            If the set has no `swap_groups`.
        """
        if self._groups is None:
            Requirements(masks=(CanSwap,)).check_set(self.masks, "SwapState")
            self._groups = cast(CanSwap, self.masks).swap_groups(self.problem.shape).to(self.mask.device)
        order = random_per_block(self.problem, self.masks, generator)
        blocks = len(self.mask) // row_block_of(self.problem, self.masks)
        kept, group, order = (part.reshape(blocks, -1) for part in (self.mask, self._groups, order))
        keep = order.masked_fill(kept | (group < 0), -1.0).argmax(1, keepdim=True)
        own = group.gather(1, keep)
        partners = kept & (group == own) & (own >= 0)
        prune = order.masked_fill(~partners, -1.0).argmax(1, keepdim=True)
        able = (partners.gather(1, prune) & ~kept.gather(1, keep)).squeeze(1)
        first = torch.arange(blocks, device=order.device).unsqueeze(1) * kept.shape[1]
        keep, prune = ((first + entry)[able].flatten() for entry in (keep, prune))
        columns = self.mask.shape[1]
        return keep // columns, keep % columns, prune // columns, prune % columns
