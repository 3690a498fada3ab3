"""Saving a pruned model: a Hugging Face folder, its masks bit-packed beside the weights, and the report."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, open_tensors, reason, require_absent
from maskopt.models.quiet import without_bars
from maskopt.models.report import PruneReport, RecoveryReport

__all__ = ["check_output", "load_masks", "save_masks", "save_pruned"]

check_output = require_absent
_KEY = "maskopt.masks"
_VERSION = 1
_NAME = re.compile(r"[^./\\\s\x00-\x1f]+(\.[^./\\\s\x00-\x1f]+)*")  # of a module, which no path can be


def save_pruned(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: PruneReport | RecoveryReport,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, with ``masks.safetensors`` and ``report.json``.

    The folder is written under a temporary name and renamed at the end, so that a full disk or an interrupt leaves no
    partial output.

    Parameters
    ----------
    path : path-like
        The folder to make; must not exist (`check_output` checks that before the work starts).
    model : PreTrainedModel
        The pruned model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    report : PruneReport or RecoveryReport
        What `prune` or `recover` returned.
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
            raise MaskoptError(f"The output {path} could not be written: {reason(error)}.") from error


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write masks with one bit per weight, and a JSON manifest (shape, kept count) in the file's metadata.

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
    if not os.path.isfile(file):
        raise MaskoptError(f"There is no mask file {file}.")
    with open_tensors("mask file", file, "np") as content:
        layers = _layers(file, (content.metadata() or {}).get(_KEY, "null"))
        stored = set(content.keys())
        if stored != set(layers):
            wrong = sorted(stored ^ set(layers))[0]
            raise _damaged(file, f"{shown(wrong)} is {'not stored' if wrong in layers else 'not in its manifest'}")
        return {name: _unpack(file, name, content.get_tensor(name), entry) for name, entry in layers.items()}


def _layers(file: Path, text: str) -> dict[str, Any]:
    """Return the manifest's entries by layer name."""
    try:
        manifest = json.loads(text, object_pairs_hook=_without_repetitions)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its manifest is no JSON ({reason(error)})") from error
    if not isinstance(manifest, dict) or manifest.get("version") != _VERSION or manifest["version"] is True:
        raise MaskoptError(f"The file {file} holds no masks that this version of maskopt can read.")
    layers = manifest.get("layers")
    if not isinstance(layers, dict):
        raise _damaged(file, "its manifest has no table of layers")
    for name in layers:
        if not _NAME.fullmatch(name):
            raise _damaged(file, f"{shown(name)} is not the name of a layer")
        if any(name.startswith(f"{other}.") for other in layers):
            raise _damaged(file, f"{shown(name)} lies within another of its layers")
    return layers


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _damaged(file: Path, what: str) -> MaskoptError:
    return MaskoptError(f"The mask file {file} is damaged: {what}.")


def _unpack(file: Path, name: str, bits: np.ndarray[Any, Any], entry: Any) -> Tensor:
    """Return the mask of a layer from its bits after a check against its entry in the manifest."""
    if not isinstance(entry, dict) or set(entry) != {"shape", "kept"}:
        raise _damaged(file, f"the manifest must say shape and kept of {name}, and nothing else; got {shown(entry)}")
    shape, kept = entry["shape"], entry["kept"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(whole(1, 2**31).fits(side) for side in shape):
        raise _damaged(file, f"the shape of {name} must be two positive whole numbers; got {shown(shape)}")
    size = math.prod(shape)
    if bits.dtype != np.uint8 or bits.ndim != 1:
        raise _damaged(file, f"the bits of {name} must be a vector of bytes; got {bits.dtype} of shape {bits.shape}")
    if bits.size != (size + 7) // 8:
        raise _damaged(file, f"{name} has {bits.size} bytes for {size} weights")
    if np.unpackbits(bits[-1:])[(size - 1) % 8 + 1 :].any():
        raise _damaged(file, f"{name} has bits beyond its last weight")
    mask = np.unpackbits(bits, count=size).astype(bool).reshape(shape)
    if not whole(0).fits(kept) or int(mask.sum()) != kept:
        raise _damaged(file, f"{name} keeps {int(mask.sum())} weights, not {shown(kept)}")
    return torch.from_numpy(mask)
