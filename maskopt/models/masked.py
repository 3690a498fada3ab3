"""Pruned layers as what recovery fits: weights under masks, one object for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from maskopt.models.experts import Stack, StackedLayer
from maskopt.models.layers import Layer
from maskopt.oracles import MaskSet
from maskopt.recovery import Masked

__all__ = ["masked_weights"]


def masked_weights(
    layers: Iterable[Layer],
    parameters: Iterable[nn.Parameter],
    masks: Mapping[str, Tensor],
    sets: Mapping[Layer, MaskSet],
    deviations: Mapping[Layer, Tensor],
) -> dict[Layer, Masked]:
    """Return the masked weights of layers.

    Parameters
    ----------
    layers : iterable of Layer
    parameters : iterable of nn.Parameter
        Those that are fitted; layers of others are left out.
    masks : mapping of str to Tensor
        By layer name, boolean, as the weight is stored, True = kept.
    sets : mapping of Layer to MaskSet
        In which masks may move.
    deviations : mapping of Layer to Tensor
        Of each input given the others, shape (d,); of all layers or of none.

    Returns
    -------
    dict of Layer to Masked
        Layers of one stack have one in common.
    """
    wanted = {id(parameter) for parameter in parameters}
    found: dict[Layer, Masked] = {}
    stacked: dict[Stack, list[StackedLayer]] = {}
    for layer in layers:
        weight = layer.parameter
        if id(weight) not in wanted:
            continue
        assert isinstance(weight, nn.Parameter)
        if isinstance(layer, StackedLayer):
            stacked.setdefault(layer.stack, []).append(layer)
        else:
            mask = masks[layer.name].to(weight.device)
            found[layer] = Masked(weight, mask, sets[layer], deviations.get(layer), transposed=layer.transposed)
    for stack, matrices in stacked.items():
        found |= dict.fromkeys(matrices, _stack(stack, matrices, masks, sets, deviations))
    return found


def _stack(
    stack: Stack,
    layers: Sequence[StackedLayer],
    masks: Mapping[str, Tensor],
    sets: Mapping[Layer, MaskSet],
    deviations: Mapping[Layer, Tensor],
) -> Masked:
    """Return the parameter of a stack of which some matrices are masked; the others are dense."""
    parameter = stack.parameter
    assert isinstance(parameter, nn.Parameter)
    mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    deviation = torch.ones(stack.number, 1, layers[0].shape[1], device=parameter.device)
    within: list[MaskSet | None] = [None] * stack.number
    for layer in layers:
        layer.part(mask).copy_(masks[layer.name])
        within[layer.index] = sets[layer]
        if deviations:
            deviation[layer.index, 0] = deviations[layer]
    return Masked(parameter, mask, within, deviation if deviations else None, transposed=stack.transposed)
