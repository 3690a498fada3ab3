"""Memory of the process: what was freed goes back to the system, and the largest amount so far."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["peak_bytes", "trim"]


@cache
def _c_library() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # glibc


def trim() -> None:
    """Give memory that was freed in pieces back to the system, where the C library can; it would stay resident."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


def peak_bytes() -> int | None:
    """Return the most main memory that the process had resident so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
