"""Fitting the blocks of a pruned model to those of the dense one, and the whole model to its predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.models.blocks import Block
from maskopt.models.divergence import KEPT, Divergence
from maskopt.models.experts import StackedLayer
from maskopt.models.gram import GramCollector
from maskopt.models.layers import Layer
from maskopt.models.masked import masked_weights
from maskopt.models.objectives import BlockOutput, Predictions
from maskopt.models.ranks import Ranks
from maskopt.models.replay import Replay
from maskopt.models.report import RecoveryRecord
from maskopt.models.windows import Data
from maskopt.oracles import MaskSet
from maskopt.recovery import Level, Masked, Objective, Recovery, fit
from maskopt.threads import sized_threads
from maskopt.weights import conditional_deviations

__all__ = ["Recoverer", "predictions"]

_LEAST, _BYTES = 32, 8  # likely tokens of a position that are told apart, at least, and bytes for each
_LARGEST: dict[Level, float] = {"block": 0.5, "model": 0.24}  # step sizes that are tried


class Recoverer:
    """Fits the blocks of a pruned model and the model itself, and records what that changed.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    replay : Replay
        Of the model on the micro-batches.
    data : Data
        To fit in this process.
    recovery : Recovery
    sets : mapping of Layer to MaskSet
        The sets in which masks may move.
    masks : mapping of str to Tensor
        Masks by the name of the layer, as in ``PruneReport.masks``; replaced where they move.
    progress : callable, optional
        Called with what is fitted and the fraction done.
    ranks : Ranks, optional
        Processes that fit together, each with data of its own; this one alone by default.

    Raises
    ------
    MaskoptError
        If a set lacks what the rule for masks needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        replay: Replay,
        data: Data,
        recovery: Recovery,
        sets: Mapping[Layer, MaskSet],
        masks: MutableMapping[str, Tensor],
        progress: Callable[[str, float], object] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._replay, self._data, self._recovery = model, replay, data, recovery
        self._sets, self._masks, self._progress = sets, masks, progress
        self._ranks = Ranks() if ranks is None else ranks
        self._tokens = sum(self._ranks.gathered(data.tokens))
        self._size = sum(parameter.numel() for parameter in model.parameters())
        for level in ("block", "model") if recovery.level == "model" else ("block",):
            rule = recovery.rule_for(level)
            for layer, masks_of in sets.items():
                rule.check([masks_of] if isinstance(layer, StackedLayer) else masks_of)
        self._inside, self._twice = _uses(model, replay.order)

    @property
    def _pruned(self) -> set[int]:
        """Identities of the pruned layers' parameters; those of blocks on disk are others whenever a block is read."""
        return {id(layer.parameter) for layer in self._sets}

    def parameters(self, block: Block) -> list[nn.Parameter]:
        """Return what is fitted of a block: parameters that no other block and nothing outside the blocks has."""
        own = [p for p in block.module.parameters() if id(p) not in self._twice and p.is_floating_point()]
        pruned = self._pruned
        return [parameter for parameter in own if self._wanted(parameter, pruned)]

    def all_parameters(self) -> list[nn.Parameter]:
        """Return what is fitted of the model: the blocks' parameters, and vectors outside."""
        pruned = self._pruned
        return [
            parameter
            for parameter in self._model.parameters()
            if parameter.is_floating_point()
            and (id(parameter) in self._inside or parameter.ndim == 1)
            and self._wanted(parameter, pruned)
        ]

    def trained(self, parameter: nn.Parameter) -> int:
        """Return how many numbers the optimizer changes for a parameter."""
        rank = self._recovery.rank_of(id(parameter) in self._pruned)
        if rank is None:
            return parameter.numel()
        *stack, rows, inputs = parameter.shape
        return math.prod(stack) * min(rank, rows, inputs) * (rows + inputs)

    def fit_block(
        self, position: int, layers: Sequence[Layer], targets: Callable[[int], Tensor]
    ) -> list[RecoveryRecord]:
        """Fit a block, whose inputs are stored, to outputs.

        Parameters
        ----------
        position : int
            Of the block in the order of execution.
        layers : sequence of Layer
            Its pruned layers.
        targets : callable
            Returns the output to reach on the micro-batch of an index.

        Returns
        -------
        list of RecoveryRecord
            Empty where there is nothing to fit.
        """
        block = self._replay.order[position]
        parameters = self.parameters(block)
        if not parameters:
            return []
        deviations = self._deviations(position, layers) if self._recovery.rule_for("block").moves else {}
        masked = masked_weights(layers, parameters, self._masks, self._sets, deviations)
        objective = BlockOutput(self._replay, position, targets, self._data, self._ranks)
        return [self._fit("block", block.name, objective, masked, parameters)]

    def fit_model(self, divergence: Divergence) -> list[RecoveryRecord]:
        """Fit the whole model to the dense model's predictions.

        Parameters
        ----------
        divergence : Divergence
            From the dense model, see `predictions`.

        Returns
        -------
        list of RecoveryRecord
        """
        parameters = self.all_parameters()
        if not parameters:
            return []
        layers = [layer for layer in self._sets if layer.name in self._masks]
        deviations: dict[Layer, Tensor] = {}
        if self._recovery.rule_for("model").moves:
            for position, block in enumerate(self._replay.order):
                # One block's Gram matrices at a time.
                inner = [layer for layer in layers if layer.name.startswith(f"{block.name}.")]
                deviations |= self._deviations(position, inner)
                self._replay.run(position, store=True, indices=self._data.fitted)
        masked = masked_weights(layers, parameters, self._masks, self._sets, deviations)
        blocks = [block.module for block in self._replay.order] if self._recovery.checkpoint else []
        objective = Predictions(self._model, divergence, self._data.alone, self._ranks, blocks)
        return [self._fit("model", "model", objective, masked, parameters)]

    def _wanted(self, parameter: nn.Parameter, those: set[int]) -> bool:
        pruned, vector = id(parameter) in those, parameter.ndim == 1
        return {"all": True, "pruned": pruned, "vectors": vector, "lora": pruned or vector}[self._recovery.parameters]

    def _deviations(self, position: int, layers: Sequence[Layer]) -> dict[Layer, Tensor]:
        """Return the deviations of a block's inputs given each other, from the data of all ranks."""
        parts = [self._data.batches[index].part for index in self._data.fitted]
        with GramCollector(layers, parts=range(min(parts), max(parts) + 1)) as grams:
            self._replay.run(position, before=grams.begin, indices=self._data.fitted)
        grams.agree(self._ranks)
        leaders = {layer: grams.leader(layer) for layer in layers}
        several = list(dict.fromkeys(leaders.values()))
        places = self._ranks.spread([float(leader.shape[1]) ** 3 for leader in several])  # each is factorised
        grams.gather(self._ranks, {leader: [place] for leader, place in zip(several, places, strict=True)})
        found: dict[Layer, Tensor] = {}
        for leader, place in zip(several, places, strict=True):
            own = conditional_deviations(grams[leader].matrix) if place == self._ranks.number else torch.empty(0)
            found[leader] = self._ranks.spoken(own, place).to(leader.weight.device)
        return {layer: found[leader] for layer, leader in leaders.items()}

    def _fit(
        self,
        level: Level,
        name: str,
        objective: Objective,
        masked: Mapping[Layer, Masked],
        parameters: Sequence[nn.Parameter],
    ) -> RecoveryRecord:
        began = time.perf_counter()
        weights = list(dict.fromkeys(masked.values()))  # that of a stack is several layers'
        pruned = {id(weight.parameter) for weight in weights}
        others = [parameter for parameter in parameters if id(parameter) not in pruned]
        settings = self._recovery

        def tell(fraction: float) -> None:
            if self._progress is not None:
                self._progress(name, fraction)

        tell(0.0)
        try:
            with sized_threads(self._size):
                fitted = fit(
                    objective,
                    weights,
                    others,
                    settings.rule_for(level),
                    settings.steps(level, objective.batches, self._tokens),
                    step_size=settings.step_size,
                    largest=_LARGEST[level],
                    seed=settings.seed,
                    rank=settings.rank_of(True),
                    progress=tell,
                )
        finally:
            # Where a fit is interrupted, the model has the best state so far.
            for layer, weight in masked.items():
                self._masks[layer.name] = layer.part(weight.mask).cpu()
        return RecoveryRecord(
            name=name,
            level=level,
            before=float(fitted.before.mean()),
            after=float(fitted.after.mean()),
            accepted=fitted.accepted,
            changed=fitted.changed,
            step_size=fitted.step_size,
            steps=fitted.steps,
            parameters=sum(self.trained(parameter) for parameter in parameters),
            seconds=time.perf_counter() - began,
        )


def predictions(model: PreTrainedModel, data: Data, memory: int) -> Divergence:
    """Return the divergence from a model on the micro-batches that are fitted or held out.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, in evaluation mode.
    data : Data
    memory : int
        Bytes for its predictions; what does not fit is merged into one.
    """
    batches = data.alone.batches
    positions = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    return Divergence(model, batches, max(_LEAST, min(KEPT, memory // (_BYTES * positions))))


def _uses(model: nn.Module, order: Sequence[Block]) -> tuple[set[int], set[int]]:
    """Return the identities of parameters inside blocks, and of those that are used in a second place as well."""
    inside: set[int] = set()
    twice: set[int] = set()
    for block in order:
        own = {id(parameter) for parameter in block.module.parameters()}
        twice |= own & inside
        inside |= own
    modules = {module for block in order for module in block.module.modules()}
    outside = {id(p) for module in model.modules() if module not in modules for p in module.parameters(recurse=False)}
    return inside, twice | (inside & outside)
