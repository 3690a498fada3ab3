"""What all methods for whole units share: from a layer to a column subset problem and back to mask and weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, truth
from maskopt.errors import MaskoptError
from maskopt.oracles import Units
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.problems.refit import Refit
from maskopt.solvers.base import Monitor, Outcome, Status, run_each
from maskopt.solvers.chunks import Chunk
from maskopt.solvers.requirements import Requirements
from maskopt.structured.backward import remove_cheapest
from maskopt.threads import factor_threads
from maskopt.weights.base import Joint

__all__ = ["Selection", "Structured", "bias_change"]


class Shared:
    """What choices of different numbers of units from one layer have in common, as long as the units are the same."""

    def __init__(self) -> None:
        self._problem: tuple[LayerReconstruction, int, ColumnSubset] | None = None
        self._path: tuple[Tensor, Tensor, Refit] | None = None

    def problem(self, layer: LayerReconstruction, width: int, ridge: float) -> ColumnSubset:
        """Return the column subset problem of a layer with units of some columns each."""
        known = self._problem
        if known is None or known[0] is not layer or known[1] != width:
            numbers = torch.arange(layer.shape[1], device=layer.device) // width
            known = self._problem = layer, width, ColumnSubset.of(layer, numbers, ridge=ridge)
            self._path = None
        return known[2]

    def removed(self, selection: Selection, stops: Callable[[int], bool]) -> tuple[Refit, int]:
        """Return what greedy removal leaves, fitted anew, and how many units it took now.

        It goes on from where it ended before, if that was with more units and the same ones fixed.
        """
        must, may = selection.must, selection.may
        path = self._path
        if (
            path is None
            or len(path[2].kept) < selection.keep
            or not (torch.equal(path[0], must) and torch.equal(path[1], may))
        ):
            path = self._path = must, may, Refit(selection.subset.blocks, may.nonzero().flatten())
        state = path[2]
        number = len(state.kept) - selection.keep
        remove_cheapest(state, number, must, stops)
        return Refit(state.blocks, state.kept), number


@dataclass(frozen=True)
class Selection:
    """Which units are to be chosen, of which layer.

    Attributes
    ----------
    layer : LayerReconstruction
    masks : Units
    subset : ColumnSubset
        The layer with a ridge.
    keep : int
        Number of units to keep, neither none nor all.
    must, may : Tensor
        Units that have to be kept, and that can be, boolean, shape (units,).
    monitor : Monitor
    shared : Shared
    """

    layer: LayerReconstruction
    masks: Units
    subset: ColumnSubset
    keep: int
    must: Tensor
    may: Tensor
    monitor: Monitor
    shared: Shared

    def stops(self, iteration: int, iterations: int) -> bool:
        """Report an iteration; True if the method has to return what it has."""
        return self.monitor.stops(self.layer, self.masks, iteration, iterations)

    def largest(self, scores: Tensor, keep: int | None = None) -> Tensor:
        """Return the units of the largest scores that may be kept, with those that must be, boolean, shape (units,).

        Parameters
        ----------
        scores : Tensor
            Shape (units,); of equal ones the first is kept.
        keep : int, optional
            How many, if not the number to keep in the end.
        """
        # Ranks keep scores of any size apart from what is fixed.
        order = torch.argsort(scores, descending=True, stable=True)
        level = torch.where(self.must, 0, torch.where(self.may, 1, 2))[order]
        chosen = order[torch.argsort(level, stable=True)[: self.keep if keep is None else keep]]
        return self.chosen(chosen)

    def chosen(self, units: Tensor) -> Tensor:
        """Return units that are given by their numbers as a boolean tensor, shape (units,)."""
        return torch.zeros_like(self.must).index_fill_(0, units, True)

    def per_unit(self, columns: Tensor) -> Tensor:
        """Return the sums of numbers for the columns, shape (d,), over units, float64, shape (units,)."""
        return columns.double().view(len(self.must), -1).sum(1)


@dataclass(frozen=True)
class Structured(Joint):
    """Base of the methods that keep whole units of input columns and fit the weights on them anew.

    Parameters
    ----------
    ridge : float
        Fraction of each input's second moment that is added to it: a choice does not depend on the scales of inputs.
        Proofs of a method are about the error with it, ||(T - V) X||^2 + ridge * sum_j ||X_j||^2 |T_j - V_j|^2.
    refit : bool
        Whether the kept columns get the weights of least error, or stay as they are.

    Raises
    ------
    MaskoptError
        In `solve`, if units of the set are not whole columns, or it has more than one count of kept units.
    """

    refit: bool = True

    requires: ClassVar[Requirements] = Requirements((LayerReconstruction,), (Units,))
    corrects: ClassVar[bool] = True
    row_wise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self, ridge=real(0), refit=truth())

    @property
    def draft(self) -> Structured:
        """A faster method whose errors are nearly the same, for models that are only compared; itself by default."""
        return self

    @abstractmethod
    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        """Return which units to keep, boolean, shape (units,), and what is claimed about them."""

    def run(self, problem: LayerReconstruction, masks: Units, start: Tensor | None, monitor: Monitor) -> Outcome:
        return self._run(problem, masks, start, monitor, Shared())

    def run_chunks(self, chunks: Sequence[Chunk], monitor: Monitor) -> list[Outcome]:
        return run_each(chunks, monitor, partial(self._run, shared=Shared()))

    def _run(
        self, problem: LayerReconstruction, masks: Units, start: Tensor | None, monitor: Monitor, shared: Shared
    ) -> Outcome:
        width, keep = _counted(self.name, problem, masks)
        units = problem.shape[1] // width
        must, may = _fixed(masks.protected, width, units, problem), ~_fixed(masks.forbidden, width, units, problem)
        keep = min(keep, int(may.sum()))
        if keep == units:
            everything = torch.ones(problem.shape, dtype=torch.bool, device=problem.device)
            return Outcome(everything, Status.OPTIMAL, 0, weight=problem.target.clone())
        if keep == 0:
            nothing = torch.zeros_like(problem.weight)
            return Outcome(nothing.bool(), Status.OPTIMAL, 0, weight=nothing)
        with factor_threads(problem.shape[1]):
            subset = shared.problem(problem, width, self.ridge)
            kept, status = self.choose(Selection(problem, masks, subset, keep, must, may, monitor, shared))
            mask = kept.repeat_interleave(width).expand(problem.shape).contiguous()
            if not self.refit:
                return Outcome(mask, status, 1)
            weight = subset.refit(kept).to(problem.dtype)
        return Outcome(mask, status, 1, weight=weight.masked_fill(~mask, 0.0))


def bias_change(problem: LayerReconstruction, weight: Tensor) -> Tensor:
    """Return what to add to a layer's bias so that its mean output stays the target's, shape (rows,).

    With V = W on the columns kept it is W[:, removed] mean[removed], the bias of FLAP.

    Parameters
    ----------
    problem : LayerReconstruction
        With `mean`.
    weight : Tensor
        V, the weights chosen, zero on removed columns, shape (rows, d).

    Raises
    ------
    MaskoptError
        If the means of the inputs are not known.

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import LayerReconstruction
    >>> weight = torch.tensor([[1.0, 2.0]])
    >>> layer = LayerReconstruction(weight, torch.eye(2), 4, mean=torch.tensor([0.5, 0.25]))
    >>> bias_change(layer, torch.tensor([[1.0, 0.0]]))
    tensor([0.5000])
    """
    if problem.mean is None:
        raise MaskoptError("A change of the bias needs the means of the inputs: give the problem mean=.")
    return ((problem.target.double() - weight.double()) @ problem.mean.double()).to(problem.dtype)


def _counted(name: str, problem: LayerReconstruction, masks: Units) -> tuple[int, int]:
    """Return the width of a unit and how many are kept."""
    height, width = masks.unit_of(problem.shape)
    if height != problem.shape[0]:
        raise MaskoptError(f"{name} keeps whole columns; {masks} has units of {height} of {problem.shape[0]} rows.")
    counts = masks.base.kept_per_group((1, problem.shape[1] // width))
    if counts.numel() != 1:
        raise MaskoptError(f"{name} needs one count for all columns; {masks} has {counts.numel()}.")
    return width, int(counts)


def _fixed(entries: Tensor | None, width: int, units: int, problem: LayerReconstruction) -> Tensor:
    """Return which units hold fixed entries, boolean, shape (units,)."""
    if entries is None:
        return torch.zeros(units, dtype=torch.bool, device=problem.device)
    return entries.to(problem.device).any(0).view(units, width).any(1)
