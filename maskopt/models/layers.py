"""The layers that are pruned: linear modules, and matrices stacked in one parameter, behind one orientation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskopt.checks import FLOATS
from maskopt.errors import MaskoptError
from maskopt.models.checks import Offloaded

__all__ = ["Layer", "LinearLayer", "is_linear", "linear_layers", "swapped"]


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """A linear map y = W x whose weight can be pruned.

    Parameters
    ----------
    name : str
        Full name, such as ``model.layers.0.mlp.up_proj``.
    module : nn.Module
        The module that has the weight.
    """

    name: str
    module: nn.Module

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """The module's tensor that holds the weight, and perhaps those of other layers."""

    @property
    @abstractmethod
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""

    @property
    def identity(self) -> tuple[int, ...]:
        """What layers with the same weights have in common."""
        return (id(self.parameter),)

    @abstractmethod
    def part(self, tensor: Tensor) -> Tensor:
        """Return this layer's part of a tensor of the parameter's shape; a view."""

    @abstractmethod
    def swap(self, weight: Tensor) -> Tensor:
        """Let the module compute with another weight, as the weight is stored, and return the one before."""

    @property
    def weight(self) -> Tensor:
        """The stored weight, two-dimensional, in the module's own orientation."""
        return self.part(self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d) = (out features, in features)."""
        rows, columns = self.oriented(self.weight).shape
        return rows, columns

    def oriented(self, tensor: Tensor) -> Tensor:
        """Turn a tensor from the stored orientation to (rows, d), or back; a view."""
        return tensor.T if self.transposed else tensor

    def apply(self, mask: Tensor, weight: Tensor | None = None) -> None:
        """Set the pruned weights to zero in place, and the others to those of `weight`, if there is one.

        Parameters
        ----------
        mask : Tensor
            Boolean, as the weight is stored, True = kept.
        weight : Tensor, optional
            New values, as the weight is stored; rounded to its type.
        """
        if weight is not None:
            self.weight.data.copy_(weight)
        # masked_fill_ rather than a product: it leaves no -0.0 and cannot change the dtype.
        self.weight.data.masked_fill_(~mask.to(self.weight.device), 0.0)

    def check_prunable(self) -> None:
        """Check that the weight can be pruned in place.

        Raises
        ------
        MaskoptError
            If it is recomputed from other parameters, quantised, without data, or not finite.
        """
        parameter = self.parameter
        if not isinstance(parameter, nn.Parameter):
            raise MaskoptError(
                f"The weight of {self.name} is recomputed from other parameters (torch.nn.utils.prune or a "
                f"parametrization); make it permanent first, for instance with torch.nn.utils.prune.remove."
            )
        if parameter.is_meta and not isinstance(parameter, Offloaded):
            raise MaskoptError(f"The weight of {self.name} holds no data (it is on the meta device); load it first.")
        weight = self.weight
        if weight.dtype not in FLOATS or weight.ndim != 2 or weight.layout is not torch.strided:
            raise MaskoptError(
                f"The weight of {self.name} is stored as {weight.dtype} of shape {tuple(weight.shape)}; only "
                f"unquantised floating-point matrices (float64, float32, bfloat16, float16) can be pruned."
            )
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise MaskoptError(f"The weight of {self.name} has NaN or infinite entries; repair the checkpoint first.")


@dataclass(frozen=True, eq=False)
class LinearLayer(Layer):
    """A module of type nn.Linear or Conv1D; the latter stores its weight as (in, out).

    Parameters
    ----------
    name : str
        Full module name.
    module : nn.Linear or Conv1D

    Examples
    --------
    >>> from torch import nn
    >>> LinearLayer("up", nn.Linear(3, 5)).shape
    (5, 3)
    """

    @property
    def parameter(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def part(self, tensor: Tensor) -> Tensor:
        return tensor

    def swap(self, weight: Tensor) -> Tensor:
        before = self.parameter.data
        self.parameter.data = weight
        return before


@contextmanager
def swapped(weights: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """Let layers compute with other weights inside the block.

    Parameters
    ----------
    weights : iterable of (Layer, Tensor)
        As the weights are stored.
    """
    before: dict[Layer, Tensor] = {}
    try:
        for layer, weight in weights:
            before[layer] = layer.swap(weight)
        yield
    finally:
        for layer, weight in before.items():
            layer.swap(weight)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear or transformers' Conv1D.

    Parameters
    ----------
    module : nn.Module
    """
    return isinstance(module, (nn.Linear, Conv1D))


def linear_layers(module: nn.Module, name: str = "") -> Iterator[Layer]:
    """Yield the linear modules in a module, each once, in order.

    Parameters
    ----------
    module : nn.Module
    name : str
        Full name of the module; empty for a whole model.

    Yields
    ------
    Layer
    """
    for inner, child in module.named_modules(prefix=name):
        if is_linear(child):
            yield LinearLayer(inner, child)
