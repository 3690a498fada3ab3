"""Progress reports and early stops of the methods that prove bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "Stop", "Stopper", "TimeShares", "steps", "stop_after", "within"]

Progress = Callable[[float], object]
"""Called with the estimated fraction of the work that is done, in [0, 1]."""

Stop = Callable[[], bool]
"""Called between iterations; True ends the method with the bounds proven so far."""


def stop_after(seconds: float | None) -> Stop | None:
    """Return a condition that is true once some time has passed from now on.

    Parameters
    ----------
    seconds : float or None
        None for no limit.

    Returns
    -------
    callable or None
        None without a limit.
    """
    if seconds is None:
        return None
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


class TimeShares:
    """A time limit for several works, of which each gets its part of what is left, in proportion to its cost.

    Parameters
    ----------
    seconds : float or None
        None for no limit.
    cost : float
        Of all works together, in any unit.
    """

    def __init__(self, seconds: float | None, cost: float) -> None:
        self._left, self._cost = seconds, cost

    @contextmanager
    def share(self, cost: float) -> Iterator[float | None]:
        """Count the time inside the block, for a work of some cost; yield its limit in seconds, None without one."""
        began = time.perf_counter()
        fraction = min(1.0, cost / self._cost) if self._cost > 0.0 else 1.0
        self._cost -= cost
        yield None if self._left is None else self._left * fraction
        if self._left is not None:
            self._left = max(0.0, self._left - (time.perf_counter() - began))


class Stopper:
    """A stop condition that stays true once it was.

    Parameters
    ----------
    stop : callable, optional
        Called until it returns True; without it the condition is never true.

    Attributes
    ----------
    stopped : bool
        Whether it has returned True.
    """

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self.stopped = False

    def __call__(self) -> bool:
        if not self.stopped and self._stop is not None:
            self.stopped = self._stop()
        return self.stopped


def steps(number: int, stop: Stop | None, progress: Progress | None) -> Iterator[int]:
    """Yield 0, 1, ... until `number` steps are done or `stop` says so, and report progress before each.

    Parameters
    ----------
    number : int
    stop, progress : callable, optional
    """
    for step in range(number):
        if stop is not None and stop():
            return
        if progress is not None:
            progress(step / number)
        yield step


def within(progress: Progress | None, start: float, end: float) -> Progress | None:
    """Return a callable for the progress of a part of the work, which reports the progress of the whole.

    Parameters
    ----------
    progress : callable, optional
        For the whole; None gives None.
    start, end : float
        Fractions of the whole that are done before and after the part.
    """
    if progress is None:
        return None
    return lambda fraction: progress(start + (end - start) * fraction)
