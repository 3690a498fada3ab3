"""Membership and enumeration by the registered definitions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from maskopt.oracles import MaskSet, PartitionMatroid
from tests.answers import Shape, banned_of, errors_of, held_of
from tests.registry import MEMBERS


def belong(masks: MaskSet, patterns: Tensor) -> Tensor:
    """Return which boolean matrices, shape (number, rows, d), are members, by the definition of the set."""
    flat = patterns.flatten(1)
    member = torch.ones(len(patterns), dtype=torch.bool)
    for index in held_of(masks):
        member &= flat[:, index]
    for index in banned_of(masks):
        member &= ~flat[:, index]
    for kind in type(masks).__mro__:
        if kind in MEMBERS:
            return member & MEMBERS[kind](masks, patterns)
    formulation = masks.formulation((patterns.shape[1], patterns.shape[2]))
    return member & torch.tensor([formulation.contains(pattern) for pattern in flat.numpy()], dtype=torch.bool)


def feasible(masks: MaskSet, mask: Tensor) -> bool:
    return mask.dtype == torch.bool and bool(belong(masks, mask.unsqueeze(0)))


@functools.cache
def _patterns(size: int) -> Tensor:
    return (torch.arange(2**size).unsqueeze(1) >> torch.arange(size)) % 2 == 1


def every_mask(masks: MaskSet, shape: Shape) -> Tensor:
    """Return all members, shape (number, rows, d): those of the 2^(rows d) patterns that belong."""
    patterns = _patterns(shape[0] * shape[1]).view(-1, *shape)
    return patterns[belong(masks, patterns)]


def minimum_errors(weight: Tensor, gram: Tensor, masks: PartitionMatroid) -> Tensor:
    """Return the optimum by enumeration: of each row where rows are independent, else one entry."""
    rows, d = weight.shape
    if masks.tile[0] != 1:
        return errors_of(weight, gram, every_mask(masks, (rows, d))).sum(1).min().view(1)
    best = []
    for row in range(rows):
        one = masks.rows(slice(row, row + 1), (rows, d))
        best.append(errors_of(weight[row : row + 1], gram, every_mask(one, (1, d))).min())
    return torch.stack(best)
