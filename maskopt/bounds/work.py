"""How far the proof of bounds has come, and whether it has to end."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "Stop", "Stopper", "within"]

Progress = Callable[[float], object]
"""Called with the fraction of the work that is done, an estimate in [0, 1]."""

Stop = Callable[[], bool]
"""Asked between iterations; True ends the work with what is proven until then."""


class Stopper:
    """Asks whether to stop until the answer is yes, and remembers it.

    Parameters
    ----------
    stop : callable, optional
        What to ask; without it nothing stops.
    """

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self.stopped = False

    def __call__(self) -> bool:
        if not self.stopped and self._stop is not None:
            self.stopped = self._stop()
        return self.stopped


def within(progress: Progress | None, start: float, end: float) -> Progress | None:
    """Return what takes the progress of a part of the work, which lies between two fractions of the whole."""
    if progress is None:
        return None
    return lambda fraction: progress(start + (end - start) * fraction)
