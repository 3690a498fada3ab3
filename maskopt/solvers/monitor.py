"""Clock, callback, counters and recorder of one solve."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Point, Problem
from maskopt.solvers.history import Recorder
from maskopt.solvers.outcome import Outcome, Status

__all__ = ["Callback", "Monitor", "State", "Stop"]


class Stop(Enum):
    """What a callback returns to end the solve; None continues.

    Attributes
    ----------
    STOP
        The only member.
    """

    STOP = "stop"


@dataclass(frozen=True)
class State:
    """What a callback sees; read only.

    Attributes
    ----------
    solver : str
        Name of the solver.
    iteration, iterations : int
        Work done and planned (an upper estimate for descent methods) in the current chunk of rows.
    fraction : float
        Fraction of the whole solve that is done, in [0, 1]; an estimate.
    seconds : float
        Since the start.
    problem, masks
        What is being solved (the current chunk of rows).
    """

    solver: str
    iteration: int
    iterations: int
    fraction: float
    seconds: float
    problem: Problem
    masks: MaskSet
    _point: Callable[[], Point] | None

    @property
    def point(self) -> Point | None:
        """The relaxed mask; `problem.value(point)` is its objective. None for methods without one.

        It changes after the callback returns.
        """
        return None if self._point is None else self._point()


Callback = Callable[[State], Stop | None]


class Monitor:
    """Clock, callback, counters and recorder of one solve, handed to the solver.

    Parameters
    ----------
    solver : str
        Name of the solver, for callbacks.
    callback : callable or None
        Called with a `State` by every `stops`.
    time_limit : float or None
        Seconds after which `stops` is true.
    memory : int
        Bytes of working memory.

    Attributes
    ----------
    counters : Counter of str
        Matrix products, oracle calls, swaps ...; solvers add to it.
    ended : Status or None
        Why `stops` became true.
    """

    def __init__(self, solver: str, callback: Callback | None, time_limit: float | None, memory: int = 2**30) -> None:
        self.memory = memory
        self.counters: Counter[str] = Counter()
        self.ended: Status | None = None
        self._solver, self._callback, self._limit = solver, callback, time_limit
        self._began = time.perf_counter()
        self._paused = 0.0
        self._window = (0.0, 1.0)
        self._fraction = 0.0
        self.recorder: Recorder | None = None

    @property
    def seconds(self) -> float:
        """Since the start, without the time that recording took."""
        return time.perf_counter() - self._began - self._paused

    @property
    def left(self) -> float:
        """Seconds until the time limit, infinite without one."""
        return math.inf if self._limit is None else max(0.0, self._limit - self.seconds)

    def chunk(self, start: float, end: float, recorder: Recorder | None) -> None:
        """Say which fraction of the whole solve the coming chunk of rows is, and what records it."""
        self._window = (start, end)
        self.recorder = recorder
        self._chunk_began = self.seconds

    def stops(
        self,
        problem: Problem,
        masks: MaskSet,
        iteration: int,
        iterations: int,
        point: Callable[[], Point] | None = None,
        mask: Tensor | None = None,
    ) -> bool:
        """Report an iteration, with the relaxed point or the mask it has; True if the solver has to return."""
        if self.recorder is not None and self.recorder.due():
            self._record(self.recorder, problem, point, mask)
        if self.ended is None and self._limit is not None and self.seconds > self._limit:
            self.ended = Status.TIME_LIMIT
        if self.ended is None and self._callback is not None:
            start, end = self._window
            fraction = start + (end - start) * min(1.0, iteration / max(1, iterations))
            # A later stage of a method may know better how much is left, but progress does not go back.
            self._fraction = fraction = max(self._fraction, fraction)
            state = State(self._solver, iteration, iterations, fraction, self.seconds, problem, masks, point)
            if self._callback(state) is not None:
                self.ended = Status.STOPPED
        return self.ended is not None

    def _record(
        self,
        recorder: Recorder,
        problem: Problem,
        point: Callable[[], Point] | None,
        mask: Tensor | None,
    ) -> None:
        since, now = self.seconds - self._chunk_began, time.perf_counter()
        if point is not None:
            recorder.relaxed(problem, point().x, since)
        elif mask is not None:
            recorder.whole(mask, since, "swap")
        self._paused += time.perf_counter() - now

    def last(self, problem: Problem, point: Point) -> None:
        """Record where a method ended, whether or not it is that iteration's turn."""
        if self.recorder is not None:
            self._record(self.recorder, problem, lambda: point, None)

    def finish(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the best mask and bound that were seen in its chunk of rows."""
        recorder = self.recorder
        if recorder is None or outcome.weight is not None:  # masks are compared with their weights as they were
            return outcome
        recorder.whole(outcome.mask, self.seconds - self._chunk_began, outcome.source)
        bound = outcome.lower_bound
        if recorder.bound is not None:
            bound = recorder.bound if bound is None else torch.maximum(bound, recorder.bound)
        return replace(outcome, mask=recorder.mask, lower_bound=bound)
