"""Decomposition-invariant directions: away vertices from the smallest face, nothing stored."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.oracles import HasFaces
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import DirectionRule, IterationState, SearchDirection

__all__ = ["BlendedInFace", "InFace"]


@dataclass(frozen=True)
class InFace(DirectionRule):
    """DICG: from the worst vertex of the point's smallest face to the oracle's vertex.

    Class attributes
    ----------------
    requires : Requirements
        A set with in-face oracle and maximal steps (`HasFaces`).

    References
    ----------
    Garber and Meshi, "Linear-memory and decomposition-invariant linearly convergent conditional gradient algorithm for
    structured polytopes", NeurIPS 2016.
    """

    requires: ClassVar[Requirements] = Requirements(masks=(HasFaces,))

    def search_direction(self, state: IterationState) -> SearchDirection:
        vector = state.vertex - _inface(state, state.gradient.neg())
        return SearchDirection(vector, _max_step(state, vector))


@dataclass(frozen=True)
class BlendedInFace(DirectionRule):
    """Blended DICG: stay in the face while that promises enough, else go to the oracle's vertex.

    The test of blended pairwise steps (Tsuji, Tanaka and Pokutta, ICML 2022) with in-face vertices for active ones.

    Parameters
    ----------
    patience : float
        Stays while the face promises at least the gap over this; at least 1.
    """

    patience: float = 2.0

    requires: ClassVar[Requirements] = Requirements(masks=(HasFaces,))

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1))

    def search_direction(self, state: IterationState) -> SearchDirection:
        local = _inface(state, state.gradient) - _inface(state, state.gradient.neg())
        stays = -state.dot(state.gradient, local) * self.patience >= state.gap
        max_step = _max_step(state, local)
        return SearchDirection(
            torch.lerp(state.toward, local, stays.to(local.dtype).unsqueeze(1)),
            torch.where(stays, max_step, 1.0),
        )


def _inface(state: IterationState, cost: Tensor) -> Tensor:
    state.counters["inface"] += 1
    return state.faces.inface(cost, state.x)


def _max_step(state: IterationState, vector: Tensor) -> Tensor:
    return state.row_blocks.minimum(state.faces.max_step(state.x, vector))
