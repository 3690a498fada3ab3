"""Column subset problems made from inputs, and their errors by regression on those inputs: no Gram, no inverse."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from maskopt.problems import ColumnSubset
from tests.helpers import Layer, layers


@dataclass(frozen=True)
class Case:
    """Target weights, inputs with a ridge's own tokens, and the unit of every column."""

    target: Tensor
    x: Tensor
    units: Tensor

    @property
    def number(self) -> int:
        return int(self.units.max()) + 1

    def problem(self) -> ColumnSubset:
        return ColumnSubset(self.target, self.x @ self.x.T, self.units)

    def error(self, kept: Tensor) -> float:
        """The sum of squares that a regression of the target's outputs on the kept inputs leaves."""
        outputs, some = (self.target @ self.x).T, self.x[kept[self.units]].T
        if some.shape[1]:
            # To inputs of unit length, which change no residual; those that are always zero explain nothing.
            size = torch.linalg.vector_norm(some, dim=0)
            some = some[:, size > 0] / size[size > 0]
            outputs = outputs - some @ torch.linalg.lstsq(some, outputs, driver="gelsd").solution
        return float(outputs.square().sum())

    @property
    def scale(self) -> float:
        return self.error(torch.zeros(self.number, dtype=torch.bool))


def with_ridge(layer: Layer, ridge: float) -> Tensor:
    """The inputs and one more token for each of them, which is that input's part of the ridge."""
    size = torch.linalg.vector_norm(layer.x, dim=1)
    return torch.cat((layer.x, ridge**0.5 * torch.diag(size)), 1)


@st.composite
def cases(draw: st.DrawFn, d: int = 7, ridges: tuple[float, ...] = (0.01, 1e-4, 1.0)) -> Case:
    """Small problems on edge-case layers, with units of one column or of several, not all equally wide."""
    layer = draw(layers(rows=(1, 4), d=(1, d)))
    columns = layer.shape[1]
    units = torch.arange(columns)
    if draw(st.booleans()):
        number = draw(st.integers(1, columns))
        units = torch.tensor([*range(number), *draw(st.lists(st.integers(0, number - 1), max_size=columns))])
        units = torch.cat((units, torch.zeros(columns, dtype=torch.long)))[:columns]
        units = units[torch.randperm(columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))]
    return Case(layer.weight, with_ridge(layer, draw(st.sampled_from(ridges))), units)


def choices(number: int, keep: int | None = None) -> Tensor:
    """All choices of that many units, or of any number, boolean, shape (choices, units)."""
    every = torch.tensor(list(itertools.product([False, True], repeat=number)))
    return every if keep is None else every[every.sum(1) == keep]
