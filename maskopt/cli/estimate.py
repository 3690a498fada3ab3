"""An estimate of the time left in a run with several kinds of work."""

import time
from collections.abc import Callable, Mapping

__all__ = ["Estimate"]

_TRUST = 0.02  # weight of the guessed speed: as if measured on this fraction of the planned work of a kind


class Estimate:
    """Measures the time per unit of each kind of work and estimates the time left and the fraction done.

    Parameters
    ----------
    planned : mapping of str to float
        Units of each kind in the whole run; `plan` corrects them.
    guess : mapping of str to float
        Seconds per unit of each kind before any measurement.
    clock : callable
        Returns seconds since a fixed time.
    """

    def __init__(
        self,
        planned: Mapping[str, float],
        guess: Mapping[str, float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._planned, self._guess, self._clock = dict(planned), dict(guess), clock
        self._done = dict.fromkeys(planned, 0.0)
        self._spent = dict.fromkeys(planned, 0.0)
        self._current: str | None = None
        self._since = self._began = clock()
        self._fraction = 0.0

    def plan(self, kind: str, units: float) -> None:
        """Correct the number of units of a kind in the whole run."""
        self._planned[kind] = max(units, self._done[kind])

    def reach(self, kind: str, done: float) -> None:
        """Set the kind of work from now on and its units done; time since the last call counts for the last kind."""
        now = self._clock()
        if self._current is not None:
            self._spent[self._current] += now - self._since
        self._current, self._since = kind, now
        self._done[kind] = max(self._done[kind], done)
        self.plan(kind, self._planned[kind])

    @property
    def left(self) -> float:
        """Estimated seconds until the end."""
        return sum((self._planned[kind] - self._done[kind]) * self._seconds(kind) for kind in self._planned)

    @property
    def fraction(self) -> float:
        """Estimated fraction of the run that is done, in [0, 1]; it never decreases."""
        spent = self._since - self._began
        whole = spent + self.left
        self._fraction = max(self._fraction, min(1.0, spent / whole if whole > 0.0 else 0.0))
        return self._fraction

    def _seconds(self, kind: str) -> float:
        """Return the seconds per unit."""
        trust = _TRUST * self._planned[kind]
        units = self._done[kind] + trust
        return (self._spent[kind] + trust * self._guess[kind]) / units if units > 0.0 else 0.0
