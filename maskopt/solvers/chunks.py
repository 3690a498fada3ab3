"""Rows of a solve that are worked on at a time, so that working memory stays within what the caller allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskopt.problems import Problem
from maskopt.solvers.history import Recorder

__all__ = ["Chunk", "row_chunks"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a solve that are worked on at a time.

    Parameters
    ----------
    problem : Problem
        Of these rows.
    masks : MaskSet
        Likewise.
    start : Tensor or None
        As in `Solver.run`.
    span : (float, float)
        Which fraction of all rows they are, from and to.
    recorder : Recorder or None
        Records what is found for them.
    """

    problem: Any  # of the types that the solver requires, as in `Solver.run`
    masks: Any
    start: Tensor | None
    span: tuple[float, float] = (0.0, 1.0)
    recorder: Recorder | None = None


def row_chunks(problem: Problem, arrays: float, memory: int, row_block: int, part: slice) -> Iterator[slice]:
    """Yield consecutive rows that fit into memory.

    Parameters
    ----------
    problem : Problem
    arrays : float
        Working memory in arrays of shape (rows, d).
    memory : int
        Bytes.
    row_block : int
        Rows of a problem that belong together.
    part : slice
        The rows to be divided, with start and stop.
    """
    per_block = arrays * problem.shape[1] * row_block * torch.finfo(problem.dtype).bits / 8
    blocks = (part.stop - part.start) // row_block
    # Equal chunks: a last chunk of a few rows would waste the matrix products' efficiency.
    number = -(-blocks // max(1, int(memory / per_block)))
    edges = [part.start + blocks * edge // number * row_block for edge in range(number + 1)]
    return itertools.starmap(slice, itertools.pairwise(edges))
