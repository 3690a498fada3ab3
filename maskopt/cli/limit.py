"""Time limits of commands."""

import time
from collections.abc import Callable

from maskopt.errors import MaskoptError

__all__ = ["check_time_limit", "stop_after"]


def check_time_limit(seconds: float | None) -> float | None:
    """Return a time limit, None where there is none.

    Raises
    ------
    MaskoptError
        If it is not positive.
    """
    if seconds is not None and not seconds > 0:
        raise MaskoptError(f"The time limit must be positive; got {seconds:g}.")
    return seconds


def stop_after(seconds: float | None) -> Callable[[], bool] | None:
    """Return what says whether so many seconds from now have passed, None without a limit."""
    if seconds is None:
        return None
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end
