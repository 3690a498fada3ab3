"""A baseline of recovery: EBFT's recipe (arXiv 2402.12419), block-wise reconstruction with one learning rate for all.

Each block's pruned matrices are fitted, masks fixed, to the output of the dense block on the dense model's states by
Adam on the mean squared error, with a fixed learning rate and without a look at held-out windows; then the next block
sees the states behind it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from maskopt.models.batches import prepare_all
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.selection import select_layers
from maskopt.models.states import first_tensor
from maskopt.models.windows import divided

__all__ = ["ebft"]


def ebft(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Any],
    held_out: Iterable[Any] | None,
    masks: Mapping[str, Tensor],
    rate: float,
    passes: int = 4,
    seed: int = 0,
) -> None:
    """Fit the pruned weights of a model to the dense one, in place, on the micro-batches that `maskopt.recover` has.

    Parameters
    ----------
    model, dense : PreTrainedModel
        The pruned model, and what it was made of.
    batches, held_out : iterable of dict or Tensor
        Windows; those held out are not used, so that the tokens are those of `maskopt.recover`.
    masks : mapping of str to Tensor
        By layer name.
    rate : float
        Learning rate of all blocks.
    passes : int
        Over the windows.
    seed : int
        Of their order.
    """
    data = divided(prepare_all(model, batches, held_out))
    selection = select_layers(model, (), ())
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model), evaluation_mode(dense):
        replay = Replay(model, list(selection.blocks), data.batches)
        beside = Replay(dense, list(select_layers(dense, (), ()).blocks), data.batches)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for position, block in enumerate(replay.order):
            beside.run(position, store=True)
            layers = [layer for layer in selection.blocks[block] if layer.name in masks]
            weights = [layer.weight.requires_grad_(True) for layer in layers]
            optimizer = torch.optim.Adam(weights, lr=rate)
            for _ in range(passes):
                for index in torch.randperm(len(data.fitted), generator=generator).tolist():
                    number = data.fitted[index]
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        output = first_tensor(replay.output(position, number))
                        mse_loss(output, beside.state(position, number)).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    for layer, weight in zip(layers, weights, strict=True):
                        weight.masked_fill_(~masks[layer.name].to(weight.device), 0.0)
            for weight in weights:
                weight.requires_grad_(False)
            replay.run(position, store=True)
