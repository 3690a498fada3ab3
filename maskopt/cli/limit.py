"""Time limits as stopping functions."""

import time
from collections.abc import Callable

__all__ = ["stop_after"]


def stop_after(seconds: float | None) -> Callable[[], bool] | None:
    """Return a function that is true once so many seconds from now have passed; None without a limit."""
    if seconds is None:
        return None
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end
