"""Tensors that wait for their use: on the device, in main memory, or in files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from maskopt.files import temporary_folder

__all__ = ["SHARE", "Place", "States", "Storage", "copied", "first_tensor", "stays", "tensor_bytes"]

SHARE = 8
"""Tensors that are kept for one purpose stay on the device up to this part of the working memory."""

_FREE_SHARE = 6
"""And up to this part of what is free on an accelerator: half of that for the three purposes that there are."""

_PIECE = 2**26  # bytes; torch rounds page-locked memory up to powers of two

Place = Literal["device", "host", "disk"]


class States:
    """Outputs of modules by keys, in one place.

    Parameters
    ----------
    place : {"device", "host", "disk"}
        "device" keeps tensors as they are; "host" copies them to the main memory, which is page-locked for tensors of
        CUDA devices; "disk" writes a file for each key.
    storage : Storage, optional
        Owns the files of "disk".
    """

    def __init__(self, place: Place = "device", storage: Storage | None = None) -> None:
        self.place = place
        self._storage = storage
        self._kept: dict[Hashable, Any] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def put(self, key: Hashable, value: Any, *, copy: bool = False) -> None:
        """Keep a tensor, or tuples, lists and dicts of tensors and other things.

        Parameters
        ----------
        key : hashable
            A value of the same key is replaced.
        value : object
        copy : bool
            Whether others may still change the value in place.
        """
        if self.place == "device":
            self._kept[key] = copied(value) if copy else value
            return
        leaves, structure = tree_flatten(value)
        places = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        if self.place == "host":
            leaves = [_on_host(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._kept[key] = leaves, structure, places
            return
        tensors = {str(index): leaf.contiguous() for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        before = self._kept.pop(key, None)
        file = self._file() if before is None else before[3]
        save_file(tensors, file)
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._kept[key] = others, structure, places, file

    def get(self, key: Hashable, *, copy: bool = False) -> Any:
        """Return what was kept, on the device where it was; with `copy` it may be changed in place."""
        kept = self._kept[key]
        if self.place == "device":
            return copied(kept) if copy else kept
        leaves, structure, places = kept[:3]
        if self.place == "disk":
            stored = load_file(kept[3])
            leaves = [stored.get(str(index), leaf) for index, leaf in enumerate(leaves)]
        return _placed(leaves, structure, places, copy=copy)

    def pop(self, key: Hashable) -> Any:
        """Return what was kept and keep it no longer."""
        value = self.get(key)
        self.drop(key)
        return value

    def drop(self, key: Hashable) -> None:
        """Keep it no longer; nothing happens where there is nothing."""
        kept = self._kept.pop(key, None)
        if kept is not None and self.place == "disk":
            kept[3].unlink(missing_ok=True)

    def clear(self) -> None:
        """Keep nothing any longer."""
        for key in list(self._kept):
            self.drop(key)

    def _file(self) -> Path:
        assert self._storage is not None, "states on disk belong to a storage"
        return self._storage.file()


@dataclass
class Storage:
    """Decides where tensors wait; a context manager, at whose end all its files are removed.

    What a killed process leaves there is removed by the next one that writes such files.

    Parameters
    ----------
    memory : int
        Bytes of working memory: tensors that are kept for one purpose stay on the device up to an eighth of them, or
        up to a sixth of what is free on an accelerator (`stays`). There are three purposes (states, inputs and outputs
        inside a block), and solvers work beside them.
    place : {"device", "host", "disk"}, optional
        Where they are kept however large they are. By default they move to the main memory, or to files where that is
        the device, if they exceed that.
    folder : Path, optional
        Where the hidden folder of the files is made; the system's temporary folder by default.
    """

    memory: int
    place: Place | None = None
    folder: Path | None = None
    _files: Path | None = field(default=None, init=False, repr=False)
    _opened: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count, init=False, repr=False)

    def states(self, size: int, device: torch.device) -> States:
        """Return an empty place for tensors.

        Parameters
        ----------
        size : int
            Bytes of all of them.
        device : torch.device
            Where they are computed.
        """
        if self.place is not None:
            return States(self.place, self)
        if stays(size, self.memory, device):
            return States()
        return States("disk" if device.type == "cpu" else "host", self)

    def file(self) -> Path:
        """Return a new file name."""
        if self._files is None:
            place = temporary_folder(self.folder or Path(tempfile.gettempdir()), "maskopt-states")
            self._files = self._opened.enter_context(place)
        return self._files / f"{next(self._numbers)}.safetensors"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files = None
        self._opened.close()


def stays(size: int, memory: int, device: torch.device | None = None) -> bool:
    """Return whether tensors stay on the device by default.

    Parameters
    ----------
    size : int
        Bytes of all that are kept for one purpose.
    memory : int
        Bytes of working memory.
    device : torch.device, optional
        Where they are computed; without it only the working memory counts.
    """
    return size * SHARE <= memory or size * _FREE_SHARE <= _free_bytes(device)


def _free_bytes(device: torch.device | None) -> int:
    """Return what is free on an accelerator, including what torch holds there and does not use; 0 for other devices."""
    module: Any = None if device is None else getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):  # such as torch.cpu, which counts nothing
        return 0
    return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))


def copied(value: Any) -> Any:
    """Return a copy of all tensors in a value, because models change their states in place.

    Parameters
    ----------
    value : object
        Tensors in tuples, lists and dicts.
    """
    return tree_map_only(Tensor, Tensor.clone, value)


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states in a block's output or arguments: the tensor itself, or the first one of tuples.

    Parameters
    ----------
    output : object
        What a block returned, or was given.
    """
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in tuples, lists and dicts.

    Parameters
    ----------
    value : object
    """
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class _Pinned:
    """A tensor of a CUDA device in page-locked memory, which is copied at the speed of the bus and behind the work.

    Copies are in the order of the device's stream, so that what is read was written before.
    """

    pieces: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    def to(self, device: torch.device, *, copy: bool = True) -> Tensor:
        """Return a new tensor on the device."""
        there = torch.empty(self.shape, dtype=self.dtype, device=device)
        rows = torch.split(there.view(-1).view(torch.uint8), _PIECE)
        for row, piece in zip(rows, self.pieces, strict=True):
            row.copy_(piece, non_blocking=True)
        return there


def _on_host(tensor: Tensor) -> Tensor | _Pinned:
    if not tensor.is_cuda or tensor.numel() == 0:
        return tensor.to("cpu", copy=True)
    pieces = []
    try:
        for row in torch.split(tensor.contiguous().view(-1).view(torch.uint8), _PIECE):
            pieces.append(torch.empty(len(row), dtype=torch.uint8, pin_memory=True))
            pieces[-1].copy_(row, non_blocking=True)
    except RuntimeError:  # no more memory may be locked
        return tensor.to("cpu", copy=True)
    return _Pinned(tuple(pieces), tensor.shape, tensor.dtype)


def _placed(leaves: list[Any], structure: TreeSpec, places: list[torch.device | None], *, copy: bool) -> Any:
    pairs = zip(leaves, places, strict=True)
    return tree_unflatten([leaf if place is None else leaf.to(place, copy=copy) for leaf, place in pairs], structure)
