"""Lower bounds on the errors of a model's layers, layer by layer, within one time limit for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from maskopt.bounds import BoundKind, MaskBounds, check_bound, mask_bounds, stop_after
from maskopt.bounds.work import TimeShares
from maskopt.checks import check_time_limit
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction

__all__ = ["Prover"]


class Prover:
    """Proves lower bounds for the layers of a model; divides the time left in proportion to the layers' cost.

    Parameters
    ----------
    masks : iterable of MaskSet
        Those of the layers, to be checked before any work.
    kind : {"shift", "sdp", "cuts"}
        See `maskopt.bounds.mask_bound`.
    seconds : float, optional
        For all layers together.
    memory : int
        Bytes of working memory.

    Raises
    ------
    MaskoptError
        If there is no such bound for a set, or the time is not positive.
    """

    def __init__(self, masks: Iterable[MaskSet], kind: BoundKind, seconds: float | None, memory: int) -> None:
        for one in masks:
            check_bound(one, kind)
        check_time_limit(seconds, "time for certify")
        self._kind, self._memory, self._seconds = kind, memory, seconds
        self._time = TimeShares(seconds, 0.0)

    def plan(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Set the shapes of the layers for which `prove` will be called."""
        self._time = TimeShares(self._seconds, sum(_cost(shape) for shape in shapes))

    def prove(
        self, problem: LayerReconstruction, masks: MaskSet, progress: Callable[[float], object] | None = None
    ) -> MaskBounds:
        """Return lower bounds on the error of every mask of a layer (or of several with one input), row by row."""
        began = time.perf_counter()
        with self._time.share(_cost(problem.shape)) as limit:

            def tell(done: float) -> None:
                assert progress is not None
                passed = time.perf_counter() - began
                progress(done if limit is None or passed >= limit else max(done, passed / limit))

            stop = stop_after(limit)
            return mask_bounds(problem, masks, self._kind, memory=self._memory, stop=stop, progress=progress and tell)


def _cost(shape: tuple[int, int]) -> float:
    return float(shape[0]) * float(shape[1]) ** 3
