"""What a model loses when one of its layers is pruned, level by level: measured, or expanded to second order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.models.blocks import Block
from maskopt.models.database import Database
from maskopt.models.divergence import Divergence
from maskopt.models.layers import Layer
from maskopt.models.replay import Replay

DRAWS = 32
"""Of labels, at least: the relative error of a loss is sqrt(2 / 32) for changes that move all predictions alike."""
_STEEPEST = 3.0  # power of the error with which a loss grows: about 1 where both are small, and noise beyond this

__all__ = ["DRAWS", "Curves", "expanded_losses", "extended_losses", "measured_losses"]

Curves = dict[Layer, dict[int, float]]
"""Loss by layer and by the count of a level."""


def measured_losses(
    model: PreTrainedModel,
    blocks: Mapping[Block, Sequence[Layer]],
    outside: Sequence[Layer],
    database: Database,
    divergence: Divergence,
    progress: Callable[[float], object] | None = None,
    levels: Mapping[Layer, Sequence[int]] | None = None,
) -> Curves:
    """Measure the divergence of the model with one layer pruned and all others dense, for each layer and level.

    Blocks before a layer's own do not run again, so that the work is a forward of half the model for each layer and
    level: it grows with the square of the depth.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, in evaluation mode.
    blocks : mapping of Block to sequence of Layer
    outside : sequence of Layer
    database : Database
        Holds the levels.
    divergence : Divergence
        From this model.
    progress : callable, optional
        Called with the fraction done.
    levels : mapping of Layer to sequence of int, optional
        Counts to measure; by default all that are stored.
    """
    replay = Replay(model, list(blocks), divergence.batches)
    total = sum(map(len, blocks.values())) + len(outside)
    curves: Curves = {}

    def measure(layers: Sequence[Layer], run: Callable[[int], Tensor]) -> None:
        for layer in layers:
            curves[layer] = {}
            for count in database.measured(layer) if levels is None else levels[layer]:
                with database.composed({layer: count}):
                    curves[layer][count] = float(divergence.each(model, run).mean())
            if progress is not None:
                progress(len(curves) / total)

    for position, block in enumerate(replay.order):

        def rest(index: int, position: int = position) -> Tensor:
            return divergence.scores(model, replay.output(position, index, whole=True))

        measure(blocks[block], rest)
        replay.run(position, store=True)
    measure(outside, lambda index: divergence.logits(model, index))
    return curves


def expanded_losses(
    model: PreTrainedModel,
    database: Database,
    divergence: Divergence,
    *,
    first_order: bool,
    seed: int,
    memory: int,
    levels: Mapping[Layer, Sequence[int]] | None = None,
    draws: int = DRAWS,
    progress: Callable[[float], object] | None = None,
) -> Curves:
    """Expand the divergence from the dense model to second order in the change of each layer to each level.

    With g the gradient of the divergence and F the Fisher information of the model's predictions, a change D of a
    weight loses <g, D> + <D, F D> / 2. F is the mean of u u^T over labels drawn from the predictions, with u the
    gradient of their log-likelihood: as many draws as are asked for at least, and one for each sequence. The work is a
    few gradients of the model for each sequence, whatever the number of layers and levels, as long as `memory` holds
    the changes; otherwise layers are taken in several parts.

    Parameters
    ----------
    model : PreTrainedModel
        Dense or pruned, in evaluation mode.
    database : Database
        Holds the levels.
    divergence : Divergence
        On batches of one sequence each.
    first_order : bool
        Whether to include <g, D>, which is zero where the model is the dense one.
    seed : int
        Of the labels.
    memory : int
        Bytes for the changes of all levels.
    levels : mapping of Layer to sequence of int, optional
        Counts to expand; by default all that are stored.
    draws : int
        Of labels, at least. The standard error of a loss is sqrt(2 / draws) of it.
    progress : callable, optional
        Called with the fraction done.

    References
    ----------
    S. Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998: the divergence to second
    order.
    """
    curves: Curves = {}
    if levels is None:
        levels = {layer: database.measured(layer) for layer in database.counts}
    repeats = math.ceil(draws / len(divergence.batches))
    parts = list(_parts(levels, memory))
    for number, part in enumerate(parts):
        changes = {
            layer: torch.stack(
                [(database.weight(layer, level) - layer.weight.data).flatten() for level in levels[layer]]
            )
            for layer in part
        }
        sums = {layer: torch.zeros(len(change), dtype=torch.float64) for layer, change in changes.items()}
        generator = torch.Generator().manual_seed(seed)
        with _gradients(model, part) as weights:
            for index in range(len(divergence.batches)):
                logits = divergence.logits(model, index)
                logs = logits[0].float().log_softmax(-1)
                drawn = torch.multinomial(logs.detach().exp().cpu(), repeats, True, generator=generator).to(logs.device)
                likelihoods = logs.gather(1, drawn)
                real = divergence.batches[index].real
                likelihoods = (likelihoods if real is None else likelihoods * real[0].unsqueeze(1)).sum(0)
                if first_order:
                    own = divergence.of(logits, index).sum()
                    for layer, along in _products(own, weights, changes, keep=True):
                        sums[layer] += along
                for draw, likelihood in enumerate(likelihoods):
                    for layer, along in _products(likelihood, weights, changes, keep=draw + 1 < repeats):
                        sums[layer] += 0.5 / repeats * along.square()
                if progress is not None:
                    progress((number + (index + 1) / len(divergence.batches)) / len(parts))
        for layer in part:
            values = (sums[layer] / max(1, divergence.tokens)).tolist()
            curves[layer] = dict(zip(levels[layer], values, strict=True))
    return curves


def extended_losses(curves: Mapping[Layer, Mapping[int, float]], database: Database) -> Curves:
    """Carry losses that are known at one or two levels of each layer over to all levels, by the layer's error there.

    Near the dense model the divergence is quadratic in the change of a layer's output, as the layer's error is. The
    loss is taken for a multiple of a power of the error; two levels determine both, with one the power is 1.

    Parameters
    ----------
    curves : mapping of Layer to mapping of int to float
        Losses by count; of more than two levels, the lowest and the highest count.
    database : Database
        Holds the errors of all levels.

    Returns
    -------
    dict
        Losses at all levels of the database. A layer without a positive loss or error loses nothing at any level.
    """
    extended: Curves = {}
    for layer, known in curves.items():
        ends = [count for count in dict.fromkeys((min(known), max(known))) if known[count] > 0]
        errors = database.errors[layer]
        ends = [count for count in ends if errors[count] > 0]
        if not ends:
            extended[layer] = dict.fromkeys(database.measured(layer), 0.0)
            continue
        logs = [(math.log(errors[count]), math.log(known[count])) for count in ends]
        width = logs[0][0] - logs[-1][0]
        power = 1.0 if width <= 0 else min(_STEEPEST, max(0.0, (logs[0][1] - logs[-1][1]) / width))
        # Where the power is bounded, the curve passes between both.
        offset = sum(loss - power * error for error, loss in logs) / len(logs)
        extended[layer] = {
            count: math.exp(offset + power * math.log(errors[count])) if errors[count] > 0 else 0.0
            for count in database.measured(layer)
        }
    return extended


def _parts(levels: Mapping[Layer, Sequence[int]], memory: int) -> Iterator[list[Layer]]:
    """Cut layers into runs whose changes fit the memory."""
    part: list[Layer] = []
    used = 0
    for layer, counts in levels.items():
        size = len(counts) * layer.weight.numel() * layer.weight.element_size()
        if part and used + size > memory:
            yield part
            part, used = [], 0
        part.append(layer)
        used += size
    if part:
        yield part


@contextmanager
def _gradients(model: PreTrainedModel, layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """Record gradients with respect to the parameters that hold some layers, and no others."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        weights = {id(layer.parameter): layer.parameter for layer in layers}
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield list(weights.values())
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _products(
    value: Tensor, weights: Sequence[Tensor], changes: Mapping[Layer, Tensor], *, keep: bool
) -> Iterator[tuple[Layer, Tensor]]:
    """Yield each layer's products of its changes and the gradient of a value, float64 on the CPU."""
    found = torch.autograd.grad(value, weights, retain_graph=keep, allow_unused=True)
    gradients = {id(weight): gradient for weight, gradient in zip(weights, found, strict=True)}
    for layer, change in changes.items():
        gradient = gradients[id(layer.parameter)]
        if gradient is not None:
            yield layer, (change.float() @ layer.part(gradient.detach()).float().flatten()).double().cpu()
