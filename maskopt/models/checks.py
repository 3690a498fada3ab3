"""Checks of models, tokenizers and counts, common to all functions on whole models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError, is_memory_failure
from maskopt.files import first_line

__all__ = [
    "Offloaded",
    "check_causal",
    "check_finite",
    "check_model",
    "check_tokenizer",
    "is_causal",
    "move_model",
    "require_positive",
]

_PIECE = 2**20  # entries
_MOST = 2**63 - 1  # what torch can count


class Offloaded(nn.Parameter):
    """Stands, on the meta device, for a parameter whose values lie on disk until its block runs (`Offload`)."""


def check_model(model: Any) -> PreTrainedModel:
    """Return a model of transformers after a check that all its tensors have data and finite entries.

    Parameters
    ----------
    model : PreTrainedModel
        Its parameters, and the buffers that are saved with them, are checked.

    Returns
    -------
    PreTrainedModel

    Raises
    ------
    MaskoptError
        If it is no such model, or with the name of the first tensor without data or with NaN or infinite entries.
    """
    if not isinstance(model, PreTrainedModel):
        raise MaskoptError(
            f"The model must be a transformers PreTrainedModel, such as maskopt.models.load_model returns; got "
            f"{shown(model)}."
        )
    for name, tensor in _saved(model):  # buffers of one number are bounds, which may be infinite
        if isinstance(tensor, Offloaded):
            continue  # checked when it is read
        if tensor.is_meta:
            raise MaskoptError(
                f"The model's {name} holds no data (it is on the meta device, or offloaded); load it first."
            )
        check_finite(name, tensor)
    return model


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that all entries of a tensor of a model are finite.

    Parameters
    ----------
    name : str
    tensor : Tensor

    Raises
    ------
    MaskoptError
        If not, with its name.
    """
    if not _is_finite(tensor, bound=tensor.numel() == 1 and not isinstance(tensor, nn.Parameter)):
        raise MaskoptError(f"The model's {name} has NaN or infinite entries; repair the checkpoint first.")


def move_model(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move a model to a device and return it.

    Parameters
    ----------
    model : PreTrainedModel
    device : str or torch.device

    Returns
    -------
    PreTrainedModel
        The same object.

    Raises
    ------
    MaskoptError
        If torch cannot compute there.
    """
    if any(isinstance(parameter, Offloaded) for parameter in model.parameters()):
        if torch.device(device) != model.device:
            raise MaskoptError(f"An offloaded model stays on its device; load it with device={str(device)!r}.")
        return model
    try:
        torch.zeros((), device=device).item()  # a meta device fails here, too
        return model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts
        if is_memory_failure(error):
            raise
        raise MaskoptError(f"The model cannot be moved to the device {device!r}: {first_line(error)}.") from error


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a model reads a prompt and goes on from there, without an encoder.

    Parameters
    ----------
    model : PreTrainedModel
    """
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def check_causal(what: str, model: Any) -> None:
    """Check that a model is a causal language model of transformers, as `check_model` does and further.

    Parameters
    ----------
    what : str
        What needs one, with its verb, as a message begins.
    model : PreTrainedModel

    Raises
    ------
    MaskoptError
        If it is not.
    """
    network = check_model(model)
    if not is_causal(network):
        raise MaskoptError(f"{what} a causal language model; this is a {type(network).__name__}.")


def check_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer after a check of its type.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    PreTrainedTokenizerBase

    Raises
    ------
    MaskoptError
        If it is no tokenizer of transformers.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MaskoptError(f"The tokenizer must be one of transformers; got {shown(tokenizer)}.")
    return tokenizer


def require_positive(**numbers: Any) -> None:
    """Check that arguments are positive integers.

    Parameters
    ----------
    **numbers
        By name.

    Raises
    ------
    MaskoptError
        With the name of the first that is not.
    """
    for name, number in numbers.items():
        if not isinstance(number, int) or not whole(1, _MOST).fits(number):
            raise MaskoptError(f"{name} must be an integer of at least 1; got {shown(number)}.")


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _is_finite(tensor: Tensor, *, bound: bool) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # In pieces: embeddings are large, and every step of the test takes memory of its own.
    for part in torch.split(tensor.detach().reshape(-1), _PIECE):
        if part.element_size() == 1:
            part = part.float()  # float8 has few functions
        if not (bool(torch.isfinite(part).all()) or (bound and not bool(torch.isnan(part).any()))):
            return False
    return True
