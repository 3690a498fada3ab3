"""Masks of single layers on disk: safetensors with a boolean `mask` and JSON metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskopt.cli.options import require_file
from maskopt.errors import MaskoptError
from maskopt.files import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_mask", "mask_bytes"]


def mask_bytes(mask: Tensor, about: Mapping[str, Any], weight: Tensor | None = None) -> bytes:
    """Return the content of a mask file.

    Parameters
    ----------
    mask : Tensor
        Boolean, shape (rows, d).
    about : mapping of str to object
        Metadata, stored as JSON.
    weight : Tensor, optional
        Updated weights, shape (rows, d).

    Returns
    -------
    bytes
    """
    from safetensors.torch import save

    tensors = {"mask": mask} if weight is None else {"mask": mask, "weight": weight}
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return save(contents, metadata={"maskopt": json.dumps(about)})


def load_mask(path: Path) -> Tensor:
    """Return the mask in a file, boolean, shape (rows, d).

    Raises
    ------
    MaskoptError
        If the file is missing, is no safetensors file, or holds no tensor `mask` of zeros and ones.
    """
    import torch

    require_file("mask", path)
    with open_tensors("mask", path) as file:
        if "mask" not in file.keys():  # noqa: SIM118 - not a dictionary
            raise MaskoptError(f"The mask {path} has no tensor named `mask`.")
        mask: Tensor = file.get_tensor("mask")
        if mask.ndim != 2:
            raise MaskoptError(f"The mask {path} must be a matrix; it has shape {tuple(mask.shape)}.")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise MaskoptError(f"The mask {path} must hold zeros and ones only.")
        return mask.bool()
