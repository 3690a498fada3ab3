"""How long a run of several kinds of work will take, from what it has done so far."""

import time
from collections.abc import Callable, Mapping

__all__ = ["Estimate"]

_TRUST = 0.02  # of the planned work of a kind: what the guess of its speed counts for beside what was measured


class Estimate:
    """Measures what a unit of each kind of work takes; from that, the time left and the fraction done.

    Parameters
    ----------
    planned : mapping of str to float
        Units of each kind in the whole run; `plan` corrects them.
    guess : mapping of str to float
        Seconds per unit, until some were done.
    clock : callable
        Seconds since any time.
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
        """Correct how many units of a kind there are in the whole run."""
        self._planned[kind] = max(units, self._done[kind])

    def reach(self, kind: str, done: float) -> None:
        """Say what is worked on from now on, and how many of its units are done; time since the last call is over."""
        now = self._clock()
        if self._current is not None:
            self._spent[self._current] += now - self._since
        self._current, self._since = kind, now
        self._done[kind] = max(self._done[kind], done)
        self.plan(kind, self._planned[kind])

    @property
    def left(self) -> float:
        """Seconds, an estimate."""
        return sum((self._planned[kind] - self._done[kind]) * self._seconds(kind) for kind in self._planned)

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, an estimate in [0, 1] that never falls."""
        spent = self._since - self._began
        whole = spent + self.left
        self._fraction = max(self._fraction, min(1.0, spent / whole if whole > 0.0 else 0.0))
        return self._fraction

    def _seconds(self, kind: str) -> float:
        """Return what a unit takes."""
        trust = _TRUST * self._planned[kind]
        units = self._done[kind] + trust
        return (self._spent[kind] + trust * self._guess[kind]) / units if units > 0.0 else 0.0
