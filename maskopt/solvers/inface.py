"""Decomposition-invariant directions: away vertices from the smallest face, nothing stored."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.oracles import HasFaces
from maskopt.solvers.rules import DirectionRule, IterationState, SearchDirection

__all__ = ["BlendedInFace", "InFace"]


@dataclass(frozen=True)
class InFace(DirectionRule):
    """DICG: from the worst vertex of the point's smallest face to the oracle's (Garber and Meshi, NeurIPS 2016)."""

    asks: ClassVar[tuple[str, ...]] = ("inface", "max_step")

    def search_direction(self, state: IterationState) -> SearchDirection:
        return _limited(state, state.vertex - _inface(state, state.gradient.neg()))


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

    asks: ClassVar[tuple[str, ...]] = ("inface", "max_step")

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1))

    def search_direction(self, state: IterationState) -> SearchDirection:
        local = _inface(state, state.gradient) - _inface(state, state.gradient.neg())
        stays = -state.dot(state.gradient, local) * self.patience >= state.gap
        search = _limited(state, local)
        assert search.max_step is not None
        return SearchDirection(
            torch.lerp(state.toward, local, stays.to(local.dtype).unsqueeze(1)),
            torch.where(stays, search.max_step, 1.0),
        )


def _inface(state: IterationState, cost: Tensor) -> Tensor:
    assert isinstance(state.masks, HasFaces)
    state.counters["inface"] += 1
    return state.masks.inface(cost, state.x)


def _limited(state: IterationState, search: Tensor) -> SearchDirection:
    assert isinstance(state.masks, HasFaces)
    return SearchDirection(search, state.row_blocks.minimum(state.masks.max_step(state.x, search)))
