"""The transformer blocks of any model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from maskopt.errors import MaskoptError
from maskopt.models.layers import is_linear, linear_layers

__all__ = ["Block", "find_blocks"]


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block.

    Parameters
    ----------
    name : str
        Full module name, such as ``model.layers.0``.
    module : nn.Module
        The block.
    stack : str
        Name of the list it belongs to; the encoder and the decoder of one model are two stacks.
    """

    name: str
    module: nn.Module
    stack: str


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the members of the outermost ``nn.ModuleList`` s whose members all contain linear layers.

    Parameters
    ----------
    model : nn.Module
        Usually a transformers model.

    Returns
    -------
    list of Block
        In the order of the model's modules.

    Raises
    ------
    MaskoptError
        If there are none.
    """
    blocks = list(_search(model, ""))
    if not blocks:
        raise MaskoptError(
            f"{type(model).__name__} holds no transformer blocks: it has no nn.ModuleList whose members contain "
            f"nn.Linear or Conv1D layers."
        )
    return blocks


def _search(module: nn.Module, prefix: str) -> Iterator[Block]:
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(member) for member in child):
            for index, member in child.named_children():
                yield Block(f"{name}.{index}", member, name)
        else:
            yield from _search(child, f"{name}.")


def _is_block(module: nn.Module) -> bool:
    # A list whose members *are* linear layers is a set of heads, not a stack.
    return not is_linear(module) and next(linear_layers(module), None) is not None
