"""How this process was started: alone, or as one of several by torchrun. Imports nothing heavy."""

from __future__ import annotations

import os

__all__ = ["first_rank", "launched"]


def launched() -> int:
    """Return the number of ranks that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def first_rank() -> bool:
    """Return whether this process is the only one, or the first of those that torchrun has started."""
    return launched() == 1 or os.environ["RANK"] == "0"
