"""Memory of the process: what was freed goes back to the system, and the largest amount so far."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

__all__ = ["peak_bytes", "resident_bytes", "trim"]


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


def peak_bytes(device: str = "cpu") -> int | None:
    """Return the most memory that the process has had so far; None where the system does not say.

    Parameters
    ----------
    device : str
        Of a CUDA device what torch has allocated; else what was resident of the main memory.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def resident_bytes() -> int:
    """Return the main memory that the process has now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
