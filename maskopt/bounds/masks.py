"""Bounds on the error of every mask of a set, selected by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

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

_CUTS = 100  # iterations for the multipliers of Z >= 0
_FIRST = 0.02  # fraction of the time spent on the plain relaxation, for the estimate of progress


def check_bound(masks: MaskSet, kind: str) -> None:
    """Check, before any work, that there is such a bound for the set.

    Parameters
    ----------
    masks : MaskSet
    kind : {"shift", "sdp", "cuts"}

    Raises
    ------
    MaskoptError
        If rows of the set are coupled or may keep fewer entries, or there is no such kind.
    """
    if kind not in get_args(BoundKind):
        raise MaskoptError(f"There is no bound {kind!r}; choose one of {', '.join(get_args(BoundKind))}.")
    if not isinstance(masks, PartitionMatroid) or not masks.separable or masks.at_most:
        raise MaskoptError(f"The {kind} bound needs a fixed number of kept entries in every row; got {masks}.")


@dataclass(frozen=True)
class MaskBounds:
    """Bounds of a layer's rows.

    Attributes
    ----------
    bound : Tensor
        Proven lower bound on the error of every mask of the set, float64, shape (rows,).
    finished : Tensor
        Whether the method converged on a row, boolean, shape (rows,). Where it was stopped before, the bound is valid
        but more time could have raised it.
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
    """Return a proven lower bound on the error of every mask of the set, row by row.

    Parameters
    ----------
    problem : LayerReconstruction
    masks : MaskSet
        Must keep a fixed number of entries of every row, such as per-row and N:M sets. Fixed entries are ignored: the
        bound is valid but does not use them.
    kind : {"shift", "sdp", "cuts"}
        One diagonal shift for the layer (`shifted_bound`); the best diagonal shift for each row, which is the
        semidefinite bound (`sdp_bound`); or that with the cuts Z >= 0 (`pair_multipliers`). Each is stronger and
        costlier than the one before.
    memory : int
        Bytes that may be allocated.
    stop : callable, optional
        Called between iterations; True ends the method with the bounds proven so far.

    Returns
    -------
    Tensor
        In units of `problem.objective`, float64, shape (rows,).

    Raises
    ------
    MaskoptError
        If rows of the set are coupled or may keep fewer entries, or there is no such kind.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.bounds import mask_bound
    >>> layer, masks = maskopt.synthetic(rows=2, d=8).problem(), maskopt.PerRow(0.5)
    >>> bound, magnitude = mask_bound(layer, masks), masks.lmo_mask(-layer.weight.abs())
    >>> bool((bound <= layer.objective(magnitude)).all())
    True
    >>> bool((bound >= mask_bound(layer, masks, "shift")).all())
    True
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
    """Return the bounds of `mask_bound`, and for which rows the method converged.

    If `stop` is given, the bound of the plain convex relaxation, which is cheap, is computed first, so that every row
    has a bound.

    Parameters
    ----------
    problem, masks, kind, memory, stop
        As for `mask_bound`.
    progress : callable, optional
        Called about once per iteration with the estimated fraction of the work that is done.

    Returns
    -------
    MaskBounds

    Raises
    ------
    MaskoptError
        As for `mask_bound`.
    """
    check_bound(masks, kind)
    matroid = cast(PartitionMatroid, masks)  # `check_bound` refuses others
    keep = matroid.kept_per_group(problem.shape)
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
            width = matroid.tile_of(problem.shape)[1]
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
            bound, finished = found.bound, found.finished
    return MaskBounds(bound if floor is None else torch.maximum(bound, floor), finished)
