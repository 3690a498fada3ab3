"""Layers with one input as jobs for one or several processes: rows of them that are solved at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from torch import Tensor

from maskopt.models.layers import Layer
from maskopt.solvers import Result

__all__ = ["Job", "Solved", "jobs_of"]

_LEAST, _MOST = 2**33, 8
"""Multiplications (rows x d x d) of layers that are cut, at least, and jobs of one group at most."""

_FACTORS = 0.1
"""Time of a solve that does not depend on the rows (factorisations), measured: that of so many times d rows."""


@dataclass(frozen=True, eq=False)
class Job:
    """Rows of layers that have one input.

    Parameters
    ----------
    layers : tuple of Layer
        Their weights lie one below the other.
    rows : slice
        Of all their rows.
    whole : bool
        Whether these are all rows.
    """

    layers: tuple[Layer, ...]
    rows: slice
    whole: bool

    @property
    def cost(self) -> float:
        """What its solve costs, compared to others: products of its rows, and factorisations."""
        columns = self.layers[0].shape[1]
        return float(self.rows.stop - self.rows.start + _FACTORS * columns) * columns**2


def jobs_of(layers: Sequence[Layer], apart: bool) -> list[Job]:
    """Return the jobs of layers that are solved together.

    What a row becomes may depend, in its last bits, on how many others are multiplied with it. So rows are cut by the
    layers' size alone, the same for one process as for several. Each process that solves some of them repeats the
    factorisations: with half as many rows as inputs in a job, or more, that takes a few per cent of the time.

    Parameters
    ----------
    layers : sequence of Layer
    apart : bool
        Whether rows may be solved apart.
    """
    rows, columns = sum(layer.shape[0] for layer in layers), layers[0].shape[1]
    number = min(_MOST, max(1, 2 * rows // columns)) if apart and rows * columns**2 >= _LEAST else 1
    edges = [rows * edge // number for edge in range(number + 1)]
    return [Job(tuple(layers), slice(first, last), number == 1) for first, last in pairwise(edges)]


@dataclass(frozen=True)
class Solved:
    """What became of a job.

    Parameters
    ----------
    result : Result
    apart : Tensor or None
        Errors on held-out inputs, and those of pruning everything, shape (2, rows).
    unfinished : Tensor or None
        Whether each row's proof was cut short.
    tokens : int
        As of `Gram`.
    pooled : bool
        As of `Gram`.
    """

    result: Result
    apart: Tensor | None
    unfinished: Tensor | None
    tokens: int
    pooled: bool

    @property
    def content(self) -> tuple[Any, ...]:
        """All of it as tuples, dicts, tensors and plain values, which go to other processes."""
        values = {each.name: getattr(self.result, each.name) for each in fields(Result)}
        return values, self.apart, self.unfinished, self.tokens, self.pooled

    @classmethod
    def received(cls, content: tuple[Any, ...]) -> Solved:
        """Return what another process sent as its `content`."""
        values, *others = content
        return cls(Result(**values), *others)
