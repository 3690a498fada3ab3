"""Biases that make up for the mean of what removed units gave, as FLAP has it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from maskopt.models.layers import Layer
from maskopt.problems import LayerReconstruction
from maskopt.shrinking.units import Site
from maskopt.solvers import Result
from maskopt.structured import bias_change

__all__ = ["BiasChanges"]


class BiasChanges:
    """An `Observer` that changes the biases of layers that lose units so that their mean output stays.

    Layers without a bias, and experts, are left as they are: a configuration of transformers cannot give them one.

    Parameters
    ----------
    sites : iterable of Site

    Attributes
    ----------
    changed, without : list of str
        Layers whose bias changed, and those that have none.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._names = {layer.name for site in sites for layer in site.layers}
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self.changed: list[str] = []
        self.without: list[str] = []

    def __call__(self, layer: Layer, problem: LayerReconstruction, result: Result) -> None:
        """Change the bias of a layer that loses units."""
        if layer.name not in self._names:
            return
        bias = getattr(layer.module, "bias", None)
        if problem.mean is None or not isinstance(bias, nn.Parameter) or bias.shape != problem.shape[:1]:
            self.without.append(layer.name)
            return
        weight = problem.weight * result.mask if result.weight is None else result.weight
        self._before.append((bias, bias.detach().to("cpu", copy=True)))
        bias.data.add_(bias_change(problem, weight).to(bias))
        self.changed.append(layer.name)

    def undo(self) -> None:
        """Give all layers their biases back."""
        for bias, before in self._before:
            bias.data.copy_(before)
