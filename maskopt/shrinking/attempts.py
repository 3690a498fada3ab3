"""Several ways to prune one model, of which the best one stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.models.batches import Batch
from maskopt.models.divergence import Divergence
from maskopt.models.replay import evaluation_mode
from maskopt.models.report import PruneReport
from maskopt.shrinking.biases import BiasChanges
from maskopt.shrinking.proofs import UnitProver
from maskopt.shrinking.units import Site

__all__ = ["Attempt", "better_of"]


@dataclass(frozen=True, eq=False)
class Attempt:
    """What was chosen in a model whose units have not been cut yet.

    Attributes
    ----------
    counts : mapping of Site to int
        Units that stay.
    report : PruneReport
    prover : UnitProver or None
    biases : BiasChanges
    """

    counts: Mapping[Site, int]
    report: PruneReport
    prover: UnitProver | None
    biases: BiasChanges


def better_of(
    model: PreTrainedModel, batches: Sequence[Batch], attempts: Sequence[Callable[[], Attempt]]
) -> tuple[Attempt, list[float]]:
    """Prune a model in several ways and leave it as the best one does.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; each attempt begins with its weights.
    batches : sequence of Batch
        On which the divergence of the predictions from the dense model's is measured.
    attempts : sequence of callable
        Each prunes the model, and undoes what it did where it fails.

    Returns
    -------
    (Attempt, list of float)
        The best one, and the divergence per token of each; of equal ones the first.
    """
    dense = _copied(model)
    with evaluation_mode(model):
        divergence = Divergence(model, batches)
    losses: list[float] = []
    best: tuple[Attempt, dict[str, Tensor]] | None = None
    for number, attempt in enumerate(attempts):
        if number:
            _restore(model, dense)
        done = attempt()
        with evaluation_mode(model):
            loss = float(divergence.each(model).mean())
        if best is None or loss < min(losses):
            best = done, _copied(model)
        losses.append(loss)
    assert best is not None, "there are attempts"
    if losses[-1] > min(losses):
        _restore(model, best[1])
    return best[0], losses


def _copied(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def _restore(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
