"""Removing units from a model: narrower blocks in the place of the old ones, and a configuration that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block
from maskopt.packed.shrunk import WIDTHS, place_block, set_parameter, shrunk_class
from maskopt.shrinking.configuration import Skeletons, block_of, with_buffers
from maskopt.shrinking.units import Site

__all__ = ["Cut", "cut_model"]


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
    """

    uniform: bool = True
    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@torch.no_grad()
def cut_model(model: PreTrainedModel, kept: Mapping[Site, Tensor]) -> Cut:
    """Remove units from a model's blocks, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Its blocks become other modules; the model's class and configuration change where blocks get different widths.
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
    cut = Cut()
    by_block: dict[Block, list[Site]] = {}
    for site, units in kept.items():
        if not bool(units.all()):
            by_block.setdefault(site.block, []).append(site)
    skeletons = Skeletons(model)
    made: list[tuple[Block, list[Site], nn.Module]] = []  # all of them before the model changes
    models: dict[tuple[tuple[str, int], ...], nn.Module | None] = {}
    for block, sites in by_block.items():
        entries: dict[str, int] = {}
        for site in sites:
            if site.role.fields is not None:
                entries |= site.role.fields.entries(int(kept[site].sum(-1).reshape(-1)[0]))
        twin: nn.Module | None = block.module
        if entries:
            key = tuple(sorted(entries.items()))
            if key not in models:
                models[key] = skeletons.make(entries)
            whole = models[key]
            twin = None if whole is None else block_of(whole, block.name)
            if twin is None or not with_buffers(twin, block.module):
                raise MaskoptError(f"The configuration of {type(model).__name__} cannot be changed to {entries}.")
            cut.entries[block.name] = {**skeletons.own.get(block.name, {}), **entries}
        assert twin is not None
        made.append((block, sites, twin))
    for block, sites, twin in made:
        narrow = _narrow(block, sites, kept)
        shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
        cut.shapes |= {
            f"{block.name}.{name}": tuple(each.shape) for name, each in narrow.items() if each.shape != shapes[name]
        }
        _replace(model, block, twin, narrow)
    _configure(model, skeletons, cut)
    return cut


def _narrow(block: Block, sites: list[Site], kept: Mapping[Site, Tensor]) -> dict[str, Tensor]:
    """Return all parameters of a block after its units are removed."""
    tensors: dict[str, Tensor] = {name: each.data for name, each in block.module.named_parameters()}
    for site in sites:
        tensors |= site.role.cut(tensors, kept[site])
    return tensors


def _replace(model: PreTrainedModel, block: Block, twin: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a block with these parameters in the place of another one."""
    old = dict(block.module.named_parameters())
    for name, tensor in tensors.items():
        set_parameter(twin, name, tensor)
        twin.get_parameter(name).requires_grad_(old[name].requires_grad)
        twin.get_parameter(name).data = tensor
    twin.train(block.module.training)
    if twin is not block.module:
        place_block(model, block.name, twin)


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
            for name, value in union.items():
                setattr(text, name, value)
            return
    cut.uniform = False
    setattr(model.config, WIDTHS, {"entries": cut.entries, "shapes": {n: list(s) for n, s in cut.shapes.items()}})
    model.__class__ = shrunk_class(type(model))
