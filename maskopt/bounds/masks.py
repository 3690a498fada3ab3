"""Bounds on the error of every mask of a set, by the names people type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from maskopt.bounds.sdp import sdp_bound
from maskopt.bounds.shift import layer_shift, shifted_bound
from maskopt.bounds.work import Progress, Stop, Stopper, within
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.threads import sized_threads

__all__ = ["BoundKind", "MaskBounds", "check_bound", "mask_bound", "mask_bounds"]

BoundKind = Literal["shift", "sdp", "cuts"]

_CUTS = 100  # iterations of the multipliers of Z >= 0
_FIRST = 0.02  # of the time goes to the plain relaxation where it comes first, for the estimate of what is left


def check_bound(masks: MaskSet, kind: str) -> None:
    """Raise MaskoptError, before any work, if there is no such bound for the set."""
    if kind not in get_args(BoundKind):
        raise MaskoptError(f"There is no bound {kind!r}; choose one of {', '.join(get_args(BoundKind))}.")
    if not isinstance(masks, PartitionMatroid) or not masks.separable or masks.at_most:
        raise MaskoptError(f"The {kind} bound needs a fixed number of kept entries in every row; got {masks}.")


@dataclass(frozen=True)
class MaskBounds:
    """What is proven of each row.

    Attributes
    ----------
    bound : Tensor
        No mask of the set has a smaller error, float64, shape (rows,).
    finished : Tensor
        Whether the work on a row ended by itself, boolean, shape (rows,). Where it was stopped the bound holds, too,
        but more time would have raised it.
    """

    bound: Tensor
    finished: Tensor


def mask_bound(
    problem: LayerReconstruction,
    masks: MaskSet,
    kind: BoundKind = "sdp",
    *,
    memory: int = 2**30,
    stop: Stop | None = None,
) -> Tensor:
    """Return a proven lower bound on the error of every mask of the set, row by row, float64, shape (rows,).

    Parameters
    ----------
    problem : LayerReconstruction
    masks : MaskSet
        Keeps fixed numbers of each row's entries: per row, N:M; what it fixes besides is not made use of.
    kind : {"shift", "sdp", "cuts"}
        One diagonal for the layer, the best diagonal for each row (the semidefinite bound), and that with Z >= 0: each
        stronger and costlier than the one before.
    memory : int
        Bytes the work may take.
    stop : callable, optional
        Asked now and then; True ends the work with what is proven until then.

    Raises
    ------
    MaskoptError
        If rows of the set are coupled or may keep fewer, or there is no such kind.
    """
    return mask_bounds(problem, masks, kind, memory=memory, stop=stop).bound


def mask_bounds(
    problem: LayerReconstruction,
    masks: MaskSet,
    kind: BoundKind = "sdp",
    *,
    memory: int = 2**30,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> MaskBounds:
    """Return what `mask_bound` proves, and of which rows it could have proven more.

    Where the work may be stopped, the bound of the plain convex relaxation, which is cheap, comes first: rows that are
    not reached have it.

    Parameters
    ----------
    problem, masks, kind, memory, stop
        As for `mask_bound`.
    progress : callable, optional
        Called about once per iteration with the fraction of the work that is done, an estimate.

    Raises
    ------
    MaskoptError
        As for `mask_bound`.
    """
    check_bound(masks, kind)
    assert isinstance(masks, PartitionMatroid)
    keep = masks.kept_per_group(problem.shape)
    rows, d = problem.shape
    per_row = keep.view(rows, -1).sum(1)
    stopper = Stopper(stop)
    with sized_threads(d**3):
        first = 0.0 if stop is None else _FIRST
        plain = torch.zeros(d, dtype=torch.float64, device=problem.device)
        floor = None if stop is None else shifted_bound(problem, per_row, plain, stop=stopper)
        rest = within(progress, first, 1.0)
        if kind == "shift":
            diagonal = layer_shift(problem, stop=stopper, progress=within(rest, 0.0, 0.5))
            bound = shifted_bound(problem, per_row, diagonal, stop=stopper, progress=within(rest, 0.5, 1.0))
            finished = torch.full_like(bound, not stopper.stopped, dtype=torch.bool)
        else:
            width = masks.tile_of(problem.shape)[1]
            alike = width < d and bool((keep == keep[0]).all())
            found = sdp_bound(
                problem,
                per_row,
                group=width if alike else None,
                cuts=_CUTS if kind == "cuts" else 0,
                memory=memory,
                stop=stopper,
                progress=rest,
            )
            bound, finished = torch.clamp_min(found.bound, 0.0), found.finished
    return MaskBounds(bound if floor is None else torch.maximum(bound, floor), finished)
