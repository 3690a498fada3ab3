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
from maskopt.recovery import clearly_smaller
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
) -> tuple[int, Attempt, list[float]]:
    """Prune a model in several ways and leave it as the best one does.

    A later way has to be better than those before it by more than the standard error of the differences between their
    losses of the sequences.

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
    (int, Attempt, list of float)
        The number of the best one, that one, and the divergence per token of each.
    """
    dense = _copied(model)
    with evaluation_mode(model):
        divergence = Divergence(model, batches)
    losses: list[Tensor] = []
    best: tuple[int, Attempt, dict[str, Tensor]] | None = None
    for number, attempt in enumerate(attempts):
        if number:
            _restore(model, dense)
        done = attempt()
        with evaluation_mode(model):
            losses.append(divergence.each(model))
        if best is None or clearly_smaller(losses[-1], losses[best[0]]):
            best = number, done, _copied(model)
    assert best is not None, "there are attempts"
    if best[0] + 1 < len(losses):
        _restore(model, best[2])
    return best[0], best[1], [float(each.mean()) for each in losses]


def _copied(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def _restore(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
