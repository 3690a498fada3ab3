"""Scripts of the SparseGPT and Wanda family: an object with add_batch and fasterprune for each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, MaskSet, PerRow
from maskopt.plugins.moments import InputMoments, weight_of
from maskopt.solvers import Result, Solver
from maskopt.weights import ConditionalADMM

__all__ = ["LayerPruner"]


class LayerPruner:
    """What such scripts call `SparseGPT` or `WrappedGPT`: it sees a layer's inputs, then prunes the layer in place.

    In these scripts n:m says how many of m are *pruned*.

    Parameters
    ----------
    layer : nn.Module
        nn.Linear, or the Conv1D of transformers.
    solver : Solver, optional
        `ConditionalADMM()` by default, which updates the surviving weights.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> layer = nn.Linear(8, 4)
    >>> pruner = LayerPruner(layer)
    >>> hook = layer.register_forward_hook(lambda _, inputs, output: pruner.add_batch(inputs[0], output))
    >>> _ = layer(torch.randn(64, 8))
    >>> hook.remove()
    >>> error = pruner.fasterprune(0.5)
    >>> (layer.weight != 0).sum(1).tolist()
    [4, 4, 4, 4]
    """

    def __init__(self, layer: nn.Module, solver: Solver | None = None) -> None:
        self.layer = layer
        self.solver = ConditionalADMM() if solver is None else solver
        self.result: Result | None = None
        self._moments: InputMoments | None = InputMoments(layer)

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """Add a layer's inputs, shape (..., d); outputs are not needed."""
        self._known().add(inp)

    def fasterprune(
        self,
        sparsity: float | MaskSet,
        prune_n: int = 0,
        prune_m: int = 0,
        blocksize: int | None = None,
        percdamp: float | None = None,
        **_: Any,
    ) -> float:
        """Prune the layer.

        Parameters
        ----------
        sparsity : float or MaskSet
            Fraction of each row that is pruned, or any set for the weight as (out, in).
        prune_n, prune_m : int
            If not 0: prune `prune_n` of every `prune_m` inputs of a row instead.
        blocksize, percdamp
            Ignored: settings of SparseGPT.

        Returns
        -------
        float
            Relative error of the layer's output on the data seen.

        Raises
        ------
        MaskoptError
            If the settings do not fit, or no inputs were added.
        """
        weight = weight_of(self.layer)
        masks: MaskSet
        if prune_n or prune_m:
            masks = NM(keep=prune_m - prune_n, group=prune_m)
        else:
            masks = PerRow(1.0 - sparsity) if isinstance(sparsity, (int, float)) else sparsity
        mask, updated, self.result = self._known().solve(weight, masks, self.solver)
        with torch.no_grad():
            if updated is not None:
                weight.copy_(updated)
            weight.masked_fill_(~mask, 0.0)
        return self.result.relative_error

    def free(self) -> None:
        """Release the memory of the second moments."""
        self._moments = None

    def _known(self) -> InputMoments:
        if self._moments is None:
            raise MaskoptError("The memory of this layer's second moments was released by free().")
        return self._moments
