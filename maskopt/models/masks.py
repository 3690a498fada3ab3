"""Masks: packed in memory and in files, one bit for each weight."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError
from maskopt.files import open_tensors, reason

__all__ = ["PackedMasks", "load_masks", "save_masks"]

_KEY = "maskopt.masks"
_VERSION = 1
_NAME = re.compile(r"[^./\\\s\x00-\x1f]+(\.[^./\\\s\x00-\x1f]+)*")  # of a module, which no path can be


class PackedMasks(MutableMapping[str, Tensor]):
    """Masks by the names of their layers, in memory with one bit for each weight.

    A mask that is looked up is unpacked: boolean, True = kept, on the CPU. Changing it changes nothing here.

    Parameters
    ----------
    masks : mapping of str to Tensor, optional
        To begin with.

    Examples
    --------
    >>> import torch
    >>> masks = PackedMasks({"layer": torch.tensor([[True, False], [True, True]])})
    >>> masks["layer"].tolist()
    [[True, False], [True, True]]
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._packed: dict[str, tuple[np.ndarray[Any, Any], tuple[int, ...]]] = {}
        self.update(masks or {})

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._packed[name]
        return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape))

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._packed[name] = np.packbits(mask.cpu().numpy()), tuple(mask.shape)

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __repr__(self) -> str:
        return f"PackedMasks of {len(self)} layers"

    def bits(self, name: str) -> np.ndarray[Any, Any]:
        """Return the packed bits of a mask: uint8, big-endian, row-major."""
        return self._packed[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a mask."""
        return self._packed[name][1]


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write masks with one bit per weight, and a JSON manifest (shape, kept count) in the file's metadata.

    Parameters
    ----------
    path : path-like
        A safetensors file.
    masks : mapping of str to Tensor
        Boolean, True = kept.
    """
    packed = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
    layers = {
        name: {"shape": list(packed.shape(name)), "kept": int(np.unpackbits(packed.bits(name)).sum())}
        for name in packed
    }
    manifest = json.dumps({"version": _VERSION, "bits": "numpy.packbits, big-endian, row-major", "layers": layers})
    save_file({name: packed.bits(name) for name in packed}, path, metadata={_KEY: manifest})


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
