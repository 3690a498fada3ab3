"""How far a model's predictions are from those of the dense model: the Kullback-Leibler divergence per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch
from maskopt.models.replay import run_model
from maskopt.threads import sized_threads

__all__ = ["KEPT", "Divergence"]

KEPT = 512
"""Likely tokens of a position that are kept apart; the others count as one."""
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class _Predictions:
    """What the dense model predicts on one batch."""

    tokens: Tensor
    """The likely tokens, int32, shape (sequences, positions, kept)."""
    logs: Tensor
    """Logarithms of their probabilities, float32, of that shape."""
    rest: Tensor
    """Probability of all other tokens together, float32, shape (sequences, positions)."""


class Divergence:
    """Measures the divergence of changed models from the dense one on a few batches.

    Of each position the likeliest tokens are compared one by one and the others together, which needs 8 bytes for each
    of them and position instead of the whole vocabulary. Merging tokens can only lower a divergence.

    Parameters
    ----------
    model : PreTrainedModel
        The dense model, in evaluation mode.
    batches : sequence of Batch
        With token ids.
    kept : int
        How many tokens of a position are compared one by one.

    Raises
    ------
    MaskoptError
        If the model predicts no tokens, or something that is no number.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], kept: int = KEPT) -> None:
        self.batches = list(batches)
        self._size = sum(weight.numel() for weight in model.parameters())
        self._dense: list[_Predictions] = []
        for index in range(len(self.batches)):
            logs = self.logits(model, index).float().log_softmax(-1)
            if not bool(logs.isfinite().all()):
                raise MaskoptError(f"The predictions of the dense {type(model).__name__} are not finite.")
            top = logs.topk(min(kept, logs.shape[-1]), dim=-1)
            rest = 1 - top.values.double().exp().sum(-1) if logs.shape[-1] > kept else torch.zeros_like(logs[..., 0])
            self._dense.append(_Predictions(top.indices.int(), top.values, rest.clamp_min(0.0).float()))

    @property
    def tokens(self) -> int:
        """Positions that are measured."""
        return sum(batch.tokens for batch in self.batches)

    def logits(self, model: PreTrainedModel, index: int) -> Tensor:
        """Return a model's logits on a batch, shape (sequences, positions, vocabulary)."""
        with sized_threads(self._size):
            output = run_model(model, f"calibration batch {index}", self.batches[index].inputs)
        return self.scores(model, output)

    @staticmethod
    def scores(model: PreTrainedModel, output: object) -> Tensor:
        """Return the logits in a model's output."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise MaskoptError(
                f"The divergence of predictions needs a language model; this is a {type(model).__name__}."
            )
        return logits

    def of(self, logits: Tensor, index: int) -> Tensor:
        """Return the divergence of predictions, summed over the positions of each sequence that are not padding.

        Parameters
        ----------
        logits : Tensor
            On batch `index`, shape (sequences, positions, vocabulary).
        index : int

        Returns
        -------
        Tensor
            In nats, float32, shape (sequences,); gradients flow.
        """
        dense, real = self._dense[index], self.batches[index].real
        logs = logits.float().log_softmax(-1).gather(-1, dense.tokens.long())
        value = (dense.logs.exp() * (dense.logs - logs)).sum(-1)
        rest = dense.rest
        if bool((rest > 0).any()):
            other = (1 - logs.exp().sum(-1)).clamp_min(_LEAST)
            value = value + torch.where(rest > 0, rest * (rest.clamp_min(_LEAST).log() - other.log()), 0.0)
        return (value if real is None else value * real).sum(-1)

    def each(
        self,
        model: PreTrainedModel,
        run: Callable[[int], Tensor] | None = None,
        indices: Iterable[int] | None = None,
    ) -> Tensor:
        """Return the divergence per token of each sequence, float64, shape (sequences,).

        Parameters
        ----------
        model : PreTrainedModel
            Changed.
        run : callable, optional
            Returns its logits on the batch of an index, where there is a faster way than running it.
        indices : iterable of int, optional
            Of the batches; all of them by default.
        """
        return torch.cat(list(self._each(model, run, range(len(self.batches)) if indices is None else indices)))

    def _each(
        self, model: PreTrainedModel, run: Callable[[int], Tensor] | None, indices: Iterable[int]
    ) -> Iterator[Tensor]:
        for index in indices:
            batch = self.batches[index]
            total = self.of(self.logits(model, index) if run is None else run(index), index).double().cpu()
            counts = batch.shape[1] if batch.real is None else batch.real.sum(1).clamp_min(1).cpu()
            yield total / counts
