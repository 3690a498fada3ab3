"""Switching off the progress bars of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

__all__ = ["without_bars"]


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch the progress bars of transformers off inside the block."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
