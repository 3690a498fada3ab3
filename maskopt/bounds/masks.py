"""Bounds on the error of every mask of a set, by the names people type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from maskopt.bounds.sdp import sdp_bound
from maskopt.bounds.shift import layer_shift, shifted_bound
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction

__all__ = ["BoundKind", "check_bound", "mask_bound"]

BoundKind = Literal["shift", "sdp", "cuts"]

_CUTS = 100  # iterations of the multipliers of Z >= 0


def check_bound(masks: MaskSet, kind: str) -> None:
    """Raise MaskoptError, before any work, if there is no such bound for the set."""
    if kind not in get_args(BoundKind):
        raise MaskoptError(f"There is no bound {kind!r}; choose one of {', '.join(get_args(BoundKind))}.")
    if not isinstance(masks, PartitionMatroid) or not masks.separable or masks.at_most:
        raise MaskoptError(f"The {kind} bound needs a fixed number of kept entries in every row; got {masks}.")


def mask_bound(
    problem: LayerReconstruction,
    masks: MaskSet,
    kind: BoundKind = "sdp",
    *,
    memory: int = 2**30,
    stop: Callable[[], bool] | None = None,
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
    check_bound(masks, kind)
    assert isinstance(masks, PartitionMatroid)
    keep = masks.kept_per_group(problem.shape)
    per_row = keep.view(problem.shape[0], -1).sum(1)
    if kind == "shift":
        return shifted_bound(problem, per_row, layer_shift(problem))
    width = masks.tile_of(problem.shape)[1]
    alike = width < problem.shape[1] and bool((keep == keep[0]).all())
    found = sdp_bound(
        problem,
        per_row,
        group=width if alike else None,
        cuts=_CUTS if kind == "cuts" else 0,
        memory=memory,
        stop=stop,
    )
    return torch.clamp_min(found.bound, 0.0)
