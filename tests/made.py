"""Sets of masks that only the tests use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import block_array, csr_array, eye_array
from torch import Tensor

from maskopt.oracles import MaskSet, MilpFormulation


@dataclass(frozen=True)
class FewColumns(MaskSet):
    """Masks that keep at most `entries` entries, in at most `columns` columns."""

    entries: int
    columns: int

    def milp_constraints(self, shape: tuple[int, int]) -> MilpFormulation:
        size, d = shape[0] * shape[1], shape[1]
        column = csr_array((np.ones(size), (np.arange(size), np.arange(size) % d)), shape=(size, d))
        # x_ij <= z_j; the sum of x and the sum of z are limited.
        lines = [[eye_array(size), -column], [np.ones((1, size)), None], [None, np.ones((1, d))]]
        right = np.concatenate((np.zeros(size), [self.entries, self.columns]))
        return MilpFormulation(LinearConstraint(block_array(lines), -np.inf, right), auxiliary=d)

    def contains(self, mask: Tensor) -> bool:
        few = int(mask.sum()) <= self.entries and int(mask.any(0).sum()) <= self.columns
        return mask.dtype == torch.bool and few
