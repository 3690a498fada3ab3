"""Saving a pruned model: a Hugging Face folder, its masks bit-packed beside the weights, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, require_absent
from maskopt.models.quiet import without_bars
from maskopt.models.report import PruneReport

__all__ = ["check_output", "load_masks", "save_masks", "save_pruned"]

check_output = require_absent
_KEY = "maskopt.masks"
_VERSION = 1


def save_pruned(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: PruneReport,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, with ``masks.safetensors`` and ``report.json``.

    Everything is written aside and renamed at the end, so that a full disk or an interrupt leaves nothing behind.

    Parameters
    ----------
    path : path-like
        The folder to make; must not exist (`check_output` tells before the work starts).
    model : PreTrainedModel
        The pruned model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    report : PruneReport
        What `prune` returned.
    extra : mapping, optional
        More entries for ``report.json``, such as perplexities.

    Raises
    ------
    MaskoptError
        If `path` exists or cannot be written.
    """
    with atomic_path(path) as aside:
        try:
            aside.mkdir()
            with without_bars():
                model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            save_masks(aside / "masks.safetensors", report.masks)
            text = json.dumps({**report.to_json(), **(extra or {})}, indent=2)
            (aside / "report.json").write_text(text + "\n", encoding="utf-8")
        except (SafetensorError, ValueError) as error:
            # ValueError: transformers refuses generation settings that contradict each other.
            reason = " ".join(str(error).split()).rstrip(".")
            raise MaskoptError(f"The output {path} could not be written: {reason}.") from error


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write masks at one bit per weight, with a JSON manifest (shape, kept count) in the file's metadata.

    Parameters
    ----------
    path : path-like
        A safetensors file.
    masks : mapping of str to Tensor
        Boolean, True = kept.
    """
    arrays = {name: mask.cpu().numpy() for name, mask in masks.items()}
    layers = {name: {"shape": list(array.shape), "kept": int(array.sum())} for name, array in arrays.items()}
    manifest = json.dumps({"version": _VERSION, "bits": "numpy.packbits, big-endian, row-major", "layers": layers})
    save_file({name: np.packbits(array) for name, array in arrays.items()}, path, metadata={_KEY: manifest})


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_masks` wrote.

    Parameters
    ----------
    path : path-like
        The file, or the folder of a pruned model.

    Returns
    -------
    dict of str to Tensor
        Boolean, True = kept, oriented as the weight of the layer of that name.

    Raises
    ------
    MaskoptError
        If there is no such file, it is damaged, or it holds something else.
    """
    path = Path(path)
    file = path / "masks.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise MaskoptError(f"There is no mask file {file}.")
    try:
        with safe_open(file, framework="np") as content:
            manifest = json.loads((content.metadata() or {}).get(_KEY, "null"))
            if manifest is None or manifest["version"] != _VERSION:
                raise MaskoptError(f"The file {file} holds no masks that this version of maskopt can read.")
            return {
                name: _unpack(file, name, content.get_tensor(name), **entry)
                for name, entry in manifest["layers"].items()
            }
    except SafetensorError as error:
        raise MaskoptError(f"The mask file {file} is damaged: {error}.") from error


def _unpack(file: Path, name: str, bits: np.ndarray[Any, np.dtype[np.uint8]], shape: list[int], kept: int) -> Tensor:
    size = int(np.prod(shape))
    if bits.size != (size + 7) // 8:
        raise MaskoptError(f"The mask file {file} is damaged: {name} has {bits.size} bytes for {size} weights.")
    mask = np.unpackbits(bits, count=size).astype(bool).reshape(shape)
    if int(mask.sum()) != kept:
        raise MaskoptError(f"The mask file {file} is damaged: {name} keeps {int(mask.sum())} weights, not {kept}.")
    return torch.from_numpy(mask)
