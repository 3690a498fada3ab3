"""The Trainer of transformers, and loops of one's own: fine-tuning in which pruned weights stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskopt.errors import MaskoptError

__all__ = ["KeepMasks", "keeping_masks"]

_DIVIDED = (
    "Zeros of weights that DeepSpeed or the first version of FSDP divides among processes cannot be kept; train with "
    "DDP or with FSDP of version 2 (fully_shard, or fsdp_config={'version': 2} for the Trainer)."
)


class _Kept:
    """Weights whose zeros stay: gradients there are zero, and so are the weights after every step.

    Of a weight that FSDP divides among processes (a DTensor), each process keeps the zeros of its own part.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
        self._pruned: list[tuple[nn.Parameter, Tensor]] = []
        for module in model.modules():
            if isinstance(module, FullyShardedDataParallel):
                raise MaskoptError(_DIVIDED)
            if isinstance(module, FSDPModule):
                module.reshard()  # after a pass some weights are still whole
        for name, (parameter, mask) in (_masks_of(model) if masks is None else _checked(model, masks)).items():
            if not isinstance(parameter, DTensor) and parameter.numel() == 0:
                raise MaskoptError(f"The weight of {name} is empty in this process. {_DIVIDED}")
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
            _local(parameter).masked_fill_(pruned, 0.0)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _clear_gradient(pruned: Tensor) -> Any:
    def clear(parameter: Tensor) -> None:
        # Norms by which gradients are clipped, and moments of the optimizer, are then those of the weights that train.
        if parameter.grad is not None:
            _local(parameter.grad).masked_fill_(pruned, 0.0)

    return clear


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory; the tensor itself unless it is divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _masks_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return all weights of at least two dimensions that have zeros, and where their own part is not zero."""
    found, divided = {}, None
    for name, parameter in model.named_parameters():
        divided = parameter.device if isinstance(parameter, DTensor) else divided
        if parameter.ndim >= 2 and not bool((mask := _local(parameter.detach()) != 0).all()):
            found[name] = parameter, mask
    count = len(found)
    if divided is not None:  # zeros may all be in the parts of other processes
        total = torch.tensor(count, device=divided)
        torch.distributed.all_reduce(total)
        count = int(total)
    if not count:
        raise MaskoptError("No weight of the model is zero, so there is nothing to keep; load a pruned model.")
    return found


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return the weights that masks belong to, by the names of modules or parameters, and their parts of the masks."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, mask in masks.items():
        parameter = parameters.get(f"{name}.weight", parameters.get(name))
        if parameter is None:
            raise MaskoptError(f"The model has no weight named {name}, for which there is a mask.")
        if parameter.numel() and parameter.shape != mask.shape:
            raise MaskoptError(
                f"The mask of {name} has shape {tuple(mask.shape)}, but its weight {tuple(parameter.shape)}."
            )
        found[name] = parameter, _part(name, mask.bool(), parameter)
    return found


def _part(name: str, mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return what a whole mask says of this process's part of a weight."""
    if not isinstance(parameter, DTensor):
        return mask
    if any(type(placement) not in (Shard, Replicate) for placement in parameter.placements):
        raise MaskoptError(
            f"The weight of {name} is divided among processes in a way ({parameter.placements}) in which masks cannot "
            f"be; leave masks out, and what is zero is kept."
        )
    mesh = parameter.device_mesh
    # Every process has the whole mask, so that none waits for another one's.
    return distribute_tensor(mask.to(parameter.device), mesh, parameter.placements, src_data_rank=None).to_local()


class KeepMasks(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Callback of the Trainer of transformers that keeps pruned weights zero.

    Full fine-tuning in float32, bfloat16 or with autocast, with accumulated gradients, on one device, or under torchrun
    with DDP or FSDP of version 2 (``fully_shard``). For adapters of peft see `maskopt.plugins.masked_lora`.

    Parameters
    ----------
    masks : mapping of str to Tensor, optional
        By module or parameter name, boolean, True = kept, as the weights are stored; by default what is zero in the
        model's matrices when the training begins.

    Raises
    ------
    MaskoptError
        When the training begins: if nothing is zero, a mask does not fit, or weights are divided among processes by
        DeepSpeed or the first version of FSDP.

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
        if args.deepspeed or (args.fsdp and int((args.fsdp_config or {}).get("version", 2)) == 1):
            raise MaskoptError(_DIVIDED)
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
        On one device, in DDP, or after ``fully_shard``.
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
