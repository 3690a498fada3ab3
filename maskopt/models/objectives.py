"""What recovery minimises: the error of a block's output, and the divergence of the model's predictions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from maskopt.models.divergence import Divergence
from maskopt.models.ranks import Ranks
from maskopt.models.replay import Replay
from maskopt.models.reuse import answering
from maskopt.models.states import first_tensor
from maskopt.models.windows import Data
from maskopt.recovery import Objective

__all__ = ["BlockOutput", "Predictions"]

_SMALLEST = 1e-6  # squared length of a token, at least, relative to the mean


class _OfWindows(Objective):
    """A mean over windows, of which every rank has its own.

    A step takes a micro-batch of every rank. One with fewer of them than others begins again with its first.

    Parameters
    ----------
    data : Data
        Of this rank.
    ranks : Ranks
        That fit together.
    """

    def __init__(self, data: Data, ranks: Ranks) -> None:
        self._data, self._ranks = data, ranks
        self._batches = max(ranks.gathered(len(data.fitted)))

    @property
    def batches(self) -> int:
        return self._batches

    @property
    def spread(self) -> bool:
        return self._ranks.count > 1

    def averaged(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        return self._ranks.averaged(tensors, like)

    def loss(self, index: int) -> Tensor:
        return self._loss(self._data.fitted[index % len(self._data.fitted)])

    def held_out(self) -> Tensor:
        own = [self._losses(index).double().cpu() for index in self._data.held_out]
        return torch.cat(self._ranks.gathered(torch.cat(own) if own else torch.zeros(0, dtype=torch.float64)))

    @abstractmethod
    def _loss(self, number: int) -> Tensor:
        """Return the mean loss on the micro-batch of an index, with gradients."""

    @abstractmethod
    def _losses(self, number: int) -> Tensor:
        """Return the loss of each sequence of the micro-batch of an index."""


class BlockOutput(_OfWindows):
    """Squared error of a block's output, relative to the size of the output to reach, token by token.

    What follows a block norms its output, so an error matters in proportion to its token's size; without that, a few
    tokens with huge activations would decide everything.

    Parameters
    ----------
    replay : Replay
        Of the pruned model.
    position : int
        Of the block.
    targets : callable
        Returns the output to reach on the micro-batch of an index.
    data, ranks
        See `_OfWindows`.
    """

    def __init__(
        self, replay: Replay, position: int, targets: Callable[[int], Tensor], data: Data, ranks: Ranks
    ) -> None:
        super().__init__(data, ranks)
        self._replay, self._position, self._targets = replay, position, targets
        means = [float(self._sizes(targets(index)).mean()) for index in data.fitted]
        means = [mean for each in ranks.gathered(means) for mean in each]
        self._least = max(_SMALLEST * sum(means) / len(means), torch.finfo(torch.float32).tiny)

    def _loss(self, number: int) -> Tensor:
        return self._losses(number).mean()

    def _losses(self, number: int) -> Tensor:
        """Return the mean error over the tokens of each sequence."""
        output = first_tensor(self._replay.output(self._position, number))
        target, batch = self._targets(number), self._data.batches[number]
        errors = self._sizes(output.float() - target.float()) / self._sizes(target).clamp_min(self._least)
        if batch.real is not None and errors.shape[:2] == batch.real.shape:
            real = batch.real.to(errors.device).reshape(*batch.real.shape, *(1 for _ in errors.shape[2:]))
            return (errors * real).flatten(1).sum(1) / real.flatten(1).sum(1).clamp_min(1)
        return errors.reshape(batch.shape[0], -1).mean(1)

    @staticmethod
    def _sizes(states: Tensor) -> Tensor:
        """Return the squared length of each token's vector."""
        return states.float().square().sum(-1)


class Predictions(_OfWindows):
    """Divergence of the model's predictions from the dense model's, per token.

    Parameters
    ----------
    model : PreTrainedModel
    divergence : Divergence
        From the dense model, on the micro-batches.
    data, ranks
        See `_OfWindows`.
    recomputed : sequence of nn.Module
        Parts of the model whose activations are computed again for the gradients, instead of being kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        divergence: Divergence,
        data: Data,
        ranks: Ranks,
        recomputed: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(data, ranks)
        self._model, self._divergence, self._recomputed = model, divergence, recomputed

    def _loss(self, number: int) -> Tensor:
        with _recomputing(self._recomputed):
            logits = self._divergence.logits(self._model, number)
        total = self._divergence.of(logits, number).sum()
        return total / max(1, self._data.batches[number].tokens)

    def _losses(self, number: int) -> Tensor:
        return self._divergence.each(self._model, indices=[number])


@contextmanager
def _recomputing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules keep their inputs alone for gradients, and compute a second time what these need.

    Works with modules that compute the same when they are called again: in evaluation mode, without a cache.
    """
    with ExitStack() as restore:
        for module in modules:
            again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            restore.enter_context(answering(module, again))
        yield
