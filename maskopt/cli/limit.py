"""Time limits of commands."""

import time
from collections.abc import Callable

__all__ = ["stop_after"]


def stop_after(seconds: float | None) -> Callable[[], bool] | None:
    """Return what says whether so many seconds from now have passed, None without a limit."""
    if seconds is None:
        return None
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end
