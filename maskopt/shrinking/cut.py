"""Removing units from a model: narrower blocks in the place of the old ones, and a configuration that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block
from maskopt.models.offload import Offload, Stored, offload_of
from maskopt.models.store import replaced
from maskopt.packed.shrunk import (
    WIDTHS,
    copy_implementations,
    place_block,
    set_parameter,
    shrunk_class,
    take_buffers,
)
from maskopt.shrinking.configuration import Skeletons, block_of
from maskopt.shrinking.siblings import allowed, sibling_of
from maskopt.shrinking.units import Site

__all__ = ["Cut", "check_cut", "cut_model", "share_configuration", "take_over"]


@dataclass
class Cut:
    """What a model's configuration says after its blocks became narrower.

    Attributes
    ----------
    uniform : bool
        Whether the configuration of transformers says it, so that every program loads the model.
    entries : dict of str to dict
        Entries of the configuration by block.
    shapes : dict of str to tuple of int
        Of parameters that no entry speaks of, by full name.
    becomes : str or None
        The model's class, where the configuration of the old one does not allow the entries and this one computes the
        same.
    """

    uniform: bool = True
    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    becomes: str | None = None


@torch.no_grad()
def cut_model(model: PreTrainedModel, kept: Mapping[Site, Tensor]) -> Cut:
    """Remove units from a model's blocks, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Its blocks become other modules; the model's class and configuration change where blocks get different widths.
        Blocks that lie on disk (`Offload`) are written anew, one after the other.
    kept : mapping of Site to Tensor
        Units that stay, boolean, shape (units,), or (experts, units) with as many in every row. At least one stays.

    Returns
    -------
    Cut

    Raises
    ------
    MaskoptError
        If no unit of a site stays, or the blocks cannot be made.
    """
    for site, units in kept.items():
        if not bool(units.any(-1).all()):
            raise MaskoptError(f"No unit of {site.name} would stay; keep at least one.")
    skeletons = Skeletons(model)
    made = _twins(model, kept, skeletons)  # all of them before the model changes
    cut = Cut()
    for block, _, _, entries in made:
        if entries:
            cut.entries[block.name] = {**skeletons.own.get(block.name, {}), **entries}
    offload = offload_of(model)
    stored: dict[str, Stored] = {}
    for number, (block, sites, twin, _) in enumerate(made):
        narrow = _narrow(block, sites, kept, offload)
        shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
        cut.shapes |= {
            f"{block.name}.{name}": tuple(each.shape) for name, each in narrow.items() if each.shape != shapes[name]
        }
        if offload is not None:
            stored |= _written(narrow, block, offload.folder / f"cut-{number}.safetensors")
            narrow = {name: torch.empty_like(each, device="meta") for name, each in narrow.items()}
        take_over(twin, block.module, narrow)
        place_block(model, block.name, twin)
    if offload is not None:
        offload.renewed(model, stored)
    _configure(model, skeletons, cut)
    if cut.uniform:
        for _, _, twin, _ in made:
            share_configuration(model, twin)
    return cut


def check_cut(model: PreTrainedModel, counts: Mapping[Site, int]) -> None:
    """Check that a model's blocks can be made with numbers of units.

    Parameters
    ----------
    model : PreTrainedModel
        It is not changed.
    counts : mapping of Site to int

    Raises
    ------
    MaskoptError
        If the configuration cannot be changed so.
    """
    some = {site: torch.arange(site.role.number) < count for site, count in counts.items()}
    _twins(model, some, Skeletons(model))


_Twin = tuple[Block, list[Site], nn.Module, dict[str, int]]


def _twins(model: PreTrainedModel, kept: Mapping[Site, Tensor], skeletons: Skeletons) -> list[_Twin]:
    """Return for each block that loses units a narrower one with buffers only, and its entries of the configuration."""
    counts = {site: int(units.sum(-1).reshape(-1)[0]) for site, units in kept.items()}
    by_block: dict[Block, list[Site]] = {}
    for site, count in counts.items():
        if count < site.role.number:
            by_block.setdefault(site.block, []).append(site)
    made: list[_Twin] = []
    models: dict[tuple[tuple[str, int], ...], nn.Module | None] = {}
    for block, sites in by_block.items():
        entries: dict[str, int] = {}
        for site in sites:
            if site.role.fields is not None:
                entries |= site.role.fields.entries(counts[site])
        twin: nn.Module | None = block.module
        if entries:
            key = tuple(sorted(entries.items()))
            if key not in models:
                models[key] = skeletons.make(entries)
            whole = models[key]
            twin = None if whole is None else block_of(whole, block.name)
            buffers = dict(block.module.named_buffers())
            for site in sites:
                buffers |= site.role.cut_buffers(buffers, kept[site])
            if twin is None or take_buffers(twin, buffers) is not None:
                raise MaskoptError(f"The configuration of {type(model).__name__} cannot be changed to {entries}.")
        assert twin is not None
        made.append((block, sites, twin, entries))
    return made


def _narrow(block: Block, sites: list[Site], kept: Mapping[Site, Tensor], offload: Offload | None) -> dict[str, Tensor]:
    """Return all parameters of a block after its units are removed."""
    tensors: dict[str, Tensor] = {name: each.data for name, each in block.module.named_parameters()}
    if offload is not None:
        whole = offload.tensors(block)
        tensors = {name: whole[f"{block.name}.{name}"] for name in tensors}
    for site in sites:
        tensors |= site.role.cut(tensors, kept[site])
    return tensors


def _written(tensors: Mapping[str, Tensor], block: Block, file: Path) -> dict[str, Stored]:
    """Write the parameters of a block to a file and return where they lie, by full name."""
    named = {f"{block.name}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    with replaced(file) as aside:
        save_file(named, aside)
    return {name: Stored(file, name) for name in named}


def take_over(twin: nn.Module, old: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block that takes the place of another one its parameters, and gradients and mode as that one has them.

    Parameters
    ----------
    twin, old : nn.Module
    tensors : mapping of str to Tensor
        All parameters, by name within the block.
    """
    gradients = {name: each.requires_grad for name, each in old.named_parameters()}
    for name, tensor in tensors.items():
        set_parameter(twin, name, tensor, gradients[name])
    twin.train(old.training)


def share_configuration(model: PreTrainedModel, block: nn.Module) -> None:
    """Let the modules of a block that was made for another configuration read that of their model.

    Parameters
    ----------
    model : PreTrainedModel
        Its configuration says of the block what the other one said.
    block : nn.Module
        Or the whole model, where it has no other parts than those that read text.
    """
    text = model.config.get_text_config()
    for module in block.modules():
        if getattr(module, "config", None) is not None:
            module.config = text


def _become(model: PreTrainedModel, kind: type[PreTrainedModel], config: Any) -> None:
    """Give a model another class that computes the same, and everything in it that class's configuration."""
    copy_implementations(model.config, config)  # without one, transformers would leave out the causal mask
    model.__class__, model.config = kind, config
    share_configuration(model, model)


def _configure(model: PreTrainedModel, skeletons: Skeletons, cut: Cut) -> None:
    """Let the configuration say what it can; otherwise make the model one of different widths."""
    union: dict[str, int] = {}
    # What blocks lost before, and not now.
    cut.entries = {**skeletons.own, **cut.entries}
    cut.shapes = {**{name: tuple(shape) for name, shape in skeletons.own_shapes.items()}, **cut.shapes}
    agree = not cut.shapes and not skeletons.own
    for entries in cut.entries.values():
        agree = agree and all(union.setdefault(name, value) == value for name, value in entries.items())
    text: Any = model.config.get_text_config()
    if agree:
        whole = skeletons.make(union)
        shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
        if whole is not None and {name: tuple(each.shape) for name, each in whole.named_parameters()} == shapes:
            if allowed(model.config, union):
                for name, value in union.items():
                    setattr(text, name, value)
                return
            sibling = sibling_of(type(model), model.config, union)
            if sibling is not None:
                _become(model, *sibling)
                cut.becomes = type(model).__name__
                return
    cut.uniform = False
    setattr(model.config, WIDTHS, {"entries": cut.entries, "shapes": {n: list(s) for n, s in cut.shapes.items()}})
    model.__class__ = shrunk_class(type(model))
