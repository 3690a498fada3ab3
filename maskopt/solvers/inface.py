"""Decomposition-invariant directions: away vertices from the smallest face, nothing stored."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.oracles import HasFaces
from maskopt.solvers.rules import Direction, View, Way

__all__ = ["BlendedInFace", "InFace"]


@dataclass(frozen=True)
class InFace(Direction):
    """DICG: from the worst vertex of the point's smallest face to the oracle's (Garber and Meshi, NeurIPS 2016)."""

    asks: ClassVar[tuple[str, ...]] = ("inface", "max_step")

    def way(self, view: View) -> Way:
        return _limited(view, view.vertex - _inface(view, view.gradient.neg()))


@dataclass(frozen=True)
class BlendedInFace(Direction):
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

    def way(self, view: View) -> Way:
        local = _inface(view, view.gradient) - _inface(view, view.gradient.neg())
        stays = -view.dot(view.gradient, local) * self.patience >= view.gap
        way = _limited(view, local)
        assert way.limit is not None
        return Way(
            torch.lerp(view.toward, local, stays.to(local.dtype).unsqueeze(1)),
            torch.where(stays, way.limit, 1.0),
        )


def _inface(view: View, cost: Tensor) -> Tensor:
    assert isinstance(view.masks, HasFaces)
    view.counters["inface"] += 1
    return view.masks.inface(cost, view.x)


def _limited(view: View, way: Tensor) -> Way:
    assert isinstance(view.masks, HasFaces)
    return Way(way, view.pool.least(view.masks.max_step(view.x, way)))
