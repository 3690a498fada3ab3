"""Changes to a model: masks and new weights that are chosen, applied and undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from maskopt.models.layers import Layer

__all__ = ["Edits"]


class Edits:
    """Masks and weights chosen for the layers of a model, which layers have them, and the dense weights.

    Parameters
    ----------
    restorable : bool
        Whether to keep the dense weights, in the main memory, for `undo`.

    Attributes
    ----------
    applied : list of Layer
        Layers that are pruned in the model, in order.
    """

    def __init__(self, restorable: bool) -> None:
        self._restorable = restorable
        self._chosen: dict[Layer, tuple[Tensor, Tensor | None]] = {}
        self._dense: dict[Layer, Tensor] = {}
        self._others: dict[nn.Parameter, Tensor] = {}
        self._current: Layer | None = None
        self.applied: list[Layer] = []

    def choose(self, layer: Layer, mask: Tensor, weight: Tensor | None) -> None:
        """Record the mask of a layer, and its new weights if there are any, in the orientation of its parameter."""
        self._chosen[layer] = mask, weight

    def queued(self, layer: Layer) -> Tensor | None:
        """Return the weight that a layer will have, as it is stored; None where its edit is not queued."""
        if layer not in self._chosen:
            return None
        mask, weight = self._chosen[layer]
        value = layer.weight.data if weight is None else weight.to(layer.weight)
        return value.masked_fill(~mask.to(value.device), 0.0)

    def apply(self, layers: Sequence[Layer]) -> None:
        """Prune layers in the model as chosen."""
        for layer in layers:
            if self._restorable:
                self._dense[layer] = layer.weight.detach().to("cpu", copy=True)
            self._current = layer
            self._write(layer)

    def remember(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep further parameters, which are about to change, for `undo`."""
        if self._restorable:
            # The parameter of a stack may hold layers that are not pruned; `undo` restores the pruned ones after it.
            pruned = {layer.identity for layer in self._dense}
            new = (p for p in parameters if p not in self._others and (id(p),) not in pruned)
            self._others.update((parameter, parameter.detach().to("cpu", copy=True)) for parameter in new)

    def settle(self) -> None:
        """Finish a layer that an interrupt left half-written, so that every layer is either dense or pruned."""
        if self._current is not None:
            self._write(self._current)

    def undo(self) -> None:
        """Give all layers their dense weights back."""
        for parameter, before in self._others.items():
            parameter.data.copy_(before)
        for layer, dense in self._dense.items():
            layer.weight.data.copy_(dense)
        self._dense.clear()
        self._others.clear()
        self.applied.clear()
        self._current = None

    def _write(self, layer: Layer) -> None:
        mask, weight = self._chosen[layer]
        layer.apply(mask, weight)
        self.applied.append(layer)
        self._current = None
        del self._chosen[layer]
