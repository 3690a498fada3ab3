"""Blocks whose weights lie on disk, and are in memory only while they run or are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from maskopt.files import open_tensors
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.checks import Offloaded, check_finite

__all__ = ["Offload", "Stored", "changes", "offload_of", "parameters_in", "resident", "set_aside"]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Parameters
    ----------
    file : Path
        A safetensors file.
    key : str
        The tensor's name in it.
    """

    file: Path
    key: str


class Offload:
    """The weights of a model's blocks: read when a block runs, dropped when another one does.

    Weights that several blocks, or a block and the rest of the model, have in common stay in memory. At most two blocks
    are in memory at a time: the one that is held (`hold`), and another one that runs.

    Parameters
    ----------
    model : nn.Module
        Blocks' parameters on the meta device, everything else in memory.
    stored : mapping of str to Stored
        Where the parameters of the blocks lie, by full name.
    device : torch.device
        Where blocks run.
    folder : Path
        In which `prune` writes the blocks that are pruned.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Stored], device: torch.device, folder: Path) -> None:
        self.folder = folder
        self.blocks = find_blocks(model)
        self._original = dict(stored)
        self._stored = dict(stored)
        self._device = device
        self._held: Block | None = None
        self._passing: Block | None = None
        self._checked: set[str] = set()
        self._resident = False
        owners = _owners(model)
        self._offloaded: dict[str, list[tuple[str, nn.Module, str]]] = {block.name: [] for block in self.blocks}
        for block in self.blocks:
            for name, module, key in parameters_in(block):
                parameter = _parameter(module, key)
                if len(owners[id(parameter)]) == 1:
                    self._offloaded[block.name].append((name, module, key))
                    set_aside(module, key)
                elif parameter.is_meta:
                    _replace(model, parameter, self._read({name: parameter})[name])
            block.module.forward = self._entering(block, block.module.forward)
        _OFFLOADS[model] = self

    @property
    def files(self) -> dict[str, list[int]]:
        """The files of the checkpoint that hold the blocks' parameters: size in bytes and time of the last change.

        Of files that were made for this process in `folder`, the size only.
        """
        found = {}
        for file in sorted({place.file for place in self._original.values()}):
            status = file.stat()
            own = file.is_relative_to(self.folder)
            found[file.name] = [status.st_size] if own else [status.st_size, status.st_mtime_ns]
        return found

    def hold(self, block: Block | None) -> None:
        """Read a block and keep it, changes included, until another one, or None, is held.

        Parameters
        ----------
        block : Block or None
        """
        if _same(block, self._held):
            return
        before, self._held = self._held, None
        if before is not None:
            self._release(before)
        if block is not None:
            if _same(block, self._passing):
                self._passing = None
            else:
                self._load(block)
            self._held = block

    def tensors(self, block: Block) -> dict[str, Tensor]:
        """Return all parameters and saved buffers of a block by full name; one that is not in memory is read.

        Parameters
        ----------
        block : Block
        """
        found = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        parameters = {name: _parameter(module, key) for name, module, key in self._offloaded[block.name]}
        missing = {name: parameter for name, parameter in parameters.items() if parameter.is_meta}
        return found | {name: parameter.data for name, parameter in self._read(missing).items()}

    def written(self, block: Block, file: Path) -> None:
        """Read a block from another file from now on.

        Parameters
        ----------
        block : Block
            What is in memory of it is dropped, unless it is held.
        file : Path
            Holds its parameters by full name.
        """
        self._stored.update((name, Stored(file, name)) for name, *_ in self._offloaded[block.name])
        if _same(block, self._passing):
            self._passing = None
            self._release(block)

    def renewed(self, model: nn.Module, stored: Mapping[str, Stored]) -> Offload:
        """Return an offload of the same model after some of its blocks were replaced by others.

        Parameters
        ----------
        model : nn.Module
            Parameters of the new blocks are on the meta device.
        stored : mapping of str to Stored
            Where these lie, by full name; all others stay where they are.
        """
        self.hold(None)
        for block in self.blocks:
            vars(block.module).pop("forward", None)  # the one that reads the block
        return Offload(model, {**self._stored, **stored}, self._device, self.folder)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have all blocks in memory inside the block."""
        self.hold(None)
        if self._passing is not None:
            self._release(self._passing)
            self._passing = None
        for block in self.blocks:
            self._load(block)
        self._resident = True
        try:
            yield
        finally:
            self._resident = False
            for block in self.blocks:
                self._release(block)

    def reset(self) -> None:
        """Drop what is in memory, and read all blocks from the checkpoint again."""
        self._stored = dict(self._original)
        for block in (self._held, self._passing):
            if block is not None:
                self._release(block)
        self._held = self._passing = None

    def _entering(self, block: Block, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._resident:
                return own(*args, **kwargs)
            if not _same(block, self._held) and not _same(block, self._passing):
                before, self._passing = self._passing, None
                if before is not None:
                    self._release(before)
                self._load(block)
                self._passing = block
            return own(*args, **kwargs)

        return forward

    def _load(self, block: Block) -> None:
        global _changes
        places = self._offloaded[block.name]
        values = self._read({name: _parameter(module, key) for name, module, key in places})
        for name, module, key in places:
            module._parameters[key] = values[name]
        _changes += 1

    def _release(self, block: Block) -> None:
        global _changes
        for _, module, key in self._offloaded[block.name]:
            set_aside(module, key)
        _changes += 1

    def _read(self, wanted: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return parameters with their values, by full name; each file is opened once."""
        files: dict[Path, list[str]] = {}
        for name in wanted:
            files.setdefault(self._stored[name].file, []).append(name)
        found = {}
        for file, names in files.items():
            with open_tensors("weight file", file) as content:
                for name in names:
                    before, tensor = wanted[name], content.get_tensor(self._stored[name].key)
                    # A copy of its own, so that the file does not stay mapped.
                    tensor = tensor.to(device=self._device, dtype=before.dtype, copy=True)
                    found[name] = nn.Parameter(tensor, before.requires_grad)
        for name in found.keys() - self._checked:
            check_finite(name, found[name])
        self._checked |= found.keys()
        return found


_changes = 0


def changes() -> int:
    """Return a number that is another one after parameters of any offloaded model were read or dropped."""
    return _changes


_OFFLOADS: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()


def offload_of(model: nn.Module) -> Offload | None:
    """Return the offload of a model; None where all its weights are in memory.

    Parameters
    ----------
    model : nn.Module
    """
    return _OFFLOADS.get(model)


def resident(model: nn.Module) -> AbstractContextManager[None]:
    """Have all weights of a model in memory inside the block, whether they lie on disk or not.

    Parameters
    ----------
    model : nn.Module
    """
    offload = offload_of(model)
    return nullcontext() if offload is None else offload.resident()


def _same(one: Block | None, other: Block | None) -> bool:
    return one is other or (one is not None and other is not None and one.module is other.module)


def parameters_in(block: Block) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the full name of every parameter of a block, its module and its name there.

    Parameters
    ----------
    block : Block

    Yields
    ------
    tuple of str, Module and str
    """
    for prefix, module in block.module.named_modules(prefix=block.name):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}", module, key


def set_aside(module: nn.Module, key: str) -> None:
    """Put an `Offloaded` parameter, which has no data, in the place of a parameter.

    Parameters
    ----------
    module : nn.Module
    key : str
        The parameter's name in it.
    """
    parameter = _parameter(module, key)
    # Not by an operation on the parameter: what observes uses of stacked matrices would see one.
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    module._parameters[key] = Offloaded(empty, parameter.requires_grad)


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Return the names under which each parameter occurs."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return owners


def _parameter(module: nn.Module, key: str) -> nn.Parameter:
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter


def _replace(model: nn.Module, parameter: nn.Parameter, new: nn.Parameter) -> None:
    """Put another parameter in the place of one, in all modules that have it."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is parameter:
                module._parameters[key] = new
