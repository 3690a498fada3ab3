"""OSSCAR: removal in batches by exact costs, then exchanges of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.problems.refit import Refit
from maskopt.solvers.base import Status
from maskopt.structured.backward import remove_units
from maskopt.structured.base import Selection, Structured

__all__ = ["OSSCAR"]


@dataclass(frozen=True)
class OSSCAR(Structured):
    """Remove units in batches by the cost of removing each alone, then exchange batches while that lowers the error.

    An exchange removes the cheapest units and adds those that then gain most; where it does not lower the error, the
    next one is half as large.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    batch : int
        Units of a batch, and of the first exchange.
    exchanges : int
        At most.

    References
    ----------
    X. Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
    Optimization", ICML 2024, arXiv 2403.12983, algorithm 1.
    """

    batch: int = 10
    exchanges: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, batch=whole(1), exchanges=whole(0))

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        state = Refit(selection.subset.blocks, selection.may.nonzero().flatten())
        planned = (len(state.kept) - selection.keep) // self.batch + self.exchanges
        done = 0
        while len(state.kept) > selection.keep:
            stopped = selection.stops(done, planned)
            batch = len(state.kept) if stopped else self.batch
            remove_units(state, state.cheapest(selection.must)[: min(batch, len(state.kept) - selection.keep)])
            done += 1
        state.refresh()
        kept = self._exchanged(selection, state, done, planned)
        return selection.chosen(kept), Status.COMPLETED

    def _exchanged(self, selection: Selection, state: Refit, done: int, planned: int) -> Tensor:
        kept, least = state.kept, state.loss()
        free = int((~selection.must[kept]).sum())
        size = min(self.batch, free, int(selection.may.sum()) - selection.keep)
        for exchange in range(self.exchanges):
            if size == 0 or selection.stops(done + exchange, planned):
                break
            state = Refit(selection.subset.blocks, kept)
            remove_units(state, state.cheapest(selection.must)[:size])
            added = state.most_gaining(state.missing(selection.may), size)
            trial = Refit(selection.subset.blocks, torch.cat((state.kept, added)))
            loss = trial.loss()
            if bool(loss < least):
                kept, least = trial.kept, loss
            else:
                size //= 2
        return kept
