"""The Trainer of transformers, and loops of one's own: fine-tuning in which pruned weights stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskopt.errors import MaskoptError

__all__ = ["KeepMasks", "keeping_masks"]


class _Kept:
    """Weights whose zeros stay: gradients there are zero, and so are the weights after every step."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
        self._pruned: list[tuple[nn.Parameter, Tensor]] = []
        found = _masks_of(model) if masks is None else _checked(model, masks)
        for name, (parameter, mask) in found.items():
            if hasattr(parameter, "device_mesh") or parameter.numel() == 0:
                raise MaskoptError(
                    f"The weight of {name} is divided among processes (FSDP or DeepSpeed), so that its zeros cannot be "
                    f"kept here; train with DDP, which keeps weights whole."
                )
            if parameter.shape != mask.shape:
                raise MaskoptError(
                    f"The mask of {name} has shape {tuple(mask.shape)}, but its weight {tuple(parameter.shape)}."
                )
            self._pruned.append((parameter, ~mask.to(parameter.device)))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_clear_gradient(pruned))  # type: ignore[no-untyped-call]
            for parameter, pruned in self._pruned
            if parameter.requires_grad
        ]
        self.clear()

    @torch.no_grad()
    def clear(self, *_: object) -> None:
        """Set all pruned weights to zero."""
        for parameter, pruned in self._pruned:
            parameter.masked_fill_(pruned, 0.0)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _clear_gradient(pruned: Tensor) -> Any:
    def clear(parameter: Tensor) -> None:
        # Norms by which gradients are clipped, and moments of the optimizer, are then those of the weights that train.
        if parameter.grad is not None:
            parameter.grad.masked_fill_(pruned, 0.0)

    return clear


def _masks_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return all weights of at least two dimensions that have zeros, and where they are not zero."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and (mask := parameter.detach() != 0).numel() and not bool(mask.all()):
            found[name] = parameter, mask
    if not found:
        raise MaskoptError("No weight of the model is zero, so there is nothing to keep; load a pruned model.")
    return found


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return the weights that masks belong to, by the names of modules or parameters."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, mask in masks.items():
        parameter = parameters.get(f"{name}.weight", parameters.get(name))
        if parameter is None:
            raise MaskoptError(f"The model has no weight named {name}, for which there is a mask.")
        found[name] = parameter, mask.bool()
    return found


class KeepMasks(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Callback of the Trainer of transformers that keeps pruned weights zero.

    Full fine-tuning in float32, bfloat16 or with autocast, with accumulated gradients, on one device or with DDP under
    torchrun. For adapters of peft see `maskopt.plugins.masked_lora`.

    Parameters
    ----------
    masks : mapping of str to Tensor, optional
        By module or parameter name, boolean, True = kept, as the weights are stored; by default what is zero in the
        model's matrices when the training begins.

    Raises
    ------
    MaskoptError
        When the training begins: if nothing is zero, a mask does not fit, or weights are divided among processes.

    Examples
    --------
    >>> callback = KeepMasks()  # Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks = masks
        self._kept: _Kept | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the pruned weights."""
        if args.fsdp or args.deepspeed:
            raise MaskoptError(
                "KeepMasks cannot keep zeros of weights that FSDP or DeepSpeed divides among processes; train with DDP."
            )
        self._kept = _Kept(kwargs["model"], self._masks)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set pruned weights to zero again."""
        if self._kept is not None:
            self._kept.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release the masks."""
        if self._kept is not None:
            self._kept.clear()
            self._kept.end()
            self._kept = None


@contextmanager
def keeping_masks(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Keep pruned weights zero in a loop of one's own, for the duration of the block.

    Parameters
    ----------
    model : nn.Module
    optimizer : Optimizer
        After each of its steps pruned weights are zero.
    masks : mapping of str to Tensor, optional
        As for `KeepMasks`.

    Raises
    ------
    MaskoptError
        As `KeepMasks`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[:, ::2].zero_()
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> with keeping_masks(model, optimizer):
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(8, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> (model[0].weight == 0).tolist()
    [[True, False, True, False], [True, False, True, False]]
    """
    kept = _Kept(model, masks)
    hook = optimizer.register_step_post_hook(kept.clear)
    try:
        yield
    finally:
        hook.remove()
        kept.end()
