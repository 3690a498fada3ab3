"""How many processor threads small work deserves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["FACTORED", "SMALL", "factor_threads", "sized_threads"]

SMALL = 2**26
"""Multiplications per operation (a layer: rows x d x d; a model: its parameters) up to which one thread is best."""

FACTORED = 1280
"""Size of a matrix up to which it is factorised on one thread: a fraction of a second."""


@contextmanager
def sized_threads(multiplications: int) -> Iterator[None]:
    """Compute on one thread inside the block if the work is small.

    Every operation on several threads waits for the slowest of them. For small ones that gains little on an idle
    machine, and on a busy one it can cost a hundred times the work itself.

    Parameters
    ----------
    multiplications : int
        Of a typical operation, see `SMALL`.
    """
    before = torch.get_num_threads()
    if multiplications > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def factor_threads(size: int) -> Iterator[None]:
    """Compute on one thread inside the block if a matrix of this size is factorised there in little time.

    Products and sums are the same on any number of threads, factorisations and eigenvalues are not: their last digits
    differ, and masks that are chosen from them.

    Parameters
    ----------
    size : int
        Rows of the matrix.
    """
    with sized_threads(0 if size <= FACTORED else SMALL + 1):
        yield
