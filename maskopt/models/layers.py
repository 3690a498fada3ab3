"""The linear layers of a model: nn.Linear and transformers' Conv1D behind one orientation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskopt.checks import FLOATS
from maskopt.errors import MaskoptError
from maskopt.models.checks import Offloaded

__all__ = ["Layer", "is_linear", "linear_layers"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map y = W x whose weight can be pruned.

    Parameters
    ----------
    name : str
        Full module name, such as ``model.layers.0.mlp.up_proj``.
    module : nn.Linear or Conv1D
        The module; Conv1D stores its weight as (in, out).
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The stored weight, in the module's own orientation."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d) = (out features, in features)."""
        rows, columns = self.oriented(self.weight).shape
        return rows, columns

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.module, Conv1D)

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
        weight = self.weight
        if not isinstance(weight, nn.Parameter):
            raise MaskoptError(
                f"The weight of {self.name} is recomputed from other parameters (torch.nn.utils.prune or a "
                f"parametrization); make it permanent first, for instance with torch.nn.utils.prune.remove."
            )
        if weight.is_meta and not isinstance(weight, Offloaded):
            raise MaskoptError(f"The weight of {self.name} holds no data (it is on the meta device); load it first.")
        if weight.dtype not in FLOATS or weight.ndim != 2 or weight.layout is not torch.strided:
            raise MaskoptError(
                f"The weight of {self.name} is stored as {weight.dtype} of shape {tuple(weight.shape)}; only "
                f"unquantised floating-point matrices (float64, float32, bfloat16, float16) can be pruned."
            )
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise MaskoptError(f"The weight of {self.name} has NaN or infinite entries; repair the checkpoint first.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear or transformers' Conv1D, the layers that are pruned.

    Parameters
    ----------
    module : nn.Module
    """
    return isinstance(module, (nn.Linear, Conv1D))


def linear_layers(module: nn.Module, name: str = "") -> Iterator[Layer]:
    """Yield the linear layers in a module, each once, in order.

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
            yield Layer(inner, child)
