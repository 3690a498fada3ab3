"""torch.ao.pruning: masks of any set by any solver, as one of its sparsifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.plugins.moments import InputMoments
from maskopt.solvers import Solver

__all__ = ["LayerSparsifier"]


class LayerSparsifier(BaseSparsifier):
    """Prunes the weights without which each layer's output on calibration data changes least.

    `prepare` the model, run calibration data through it, `step`, and `squash_mask`. Settings of a layer, `masks` and
    `solver`, may stand in its entry of the configuration. Where the solver updates weights (`maskopt.weights`), the
    original weights change, too. The masks are in the `state_dict`. A later `step` chooses among the weights that are
    left, from all data that ran since `prepare`.

    Parameters
    ----------
    masks : MaskSet
        For weights as (out, in), such as `PerRow(0.5)`.
    solver : Solver, optional
        `ContinuationFrankWolfe()` by default.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import maskopt
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> sparsifier = LayerSparsifier(maskopt.PerRow(0.5))
    >>> sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    >>> with torch.no_grad():
    ...     _ = model(torch.randn(64, 8))
    >>> sparsifier.step()
    >>> sparsifier.squash_mask()
    >>> (model[0].weight != 0).sum(1).tolist()
    [4, 4, 4, 4, 4, 4]
    """

    def __init__(self, masks: MaskSet, solver: Solver | None = None) -> None:
        super().__init__(defaults={"masks": masks, "solver": solver})
        self._moments: dict[str, InputMoments] = {}
        self._hooks: list[Any] = []

    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None) -> None:
        """Give layers masks of ones, and begin to observe their inputs; see BaseSparsifier.

        Parameters
        ----------
        model : nn.Module
        config : list of dict, or None
            Each names a weight (`tensor_fqn`); None: all of nn.Linear.

        Raises
        ------
        MaskoptError
            If a module is neither nn.Linear nor Conv1D of transformers.
        """
        super().prepare(model, config)  # type: ignore[no-untyped-call]  # torch has no types here
        for group in self.groups:
            moments = self._moments[group["tensor_fqn"]] = InputMoments(group["module"])
            self._hooks.append(moments.watch(group["module"]))

    def update_mask(self, module: nn.Module, tensor_name: str, tensor_fqn: str = "", **kwargs: Any) -> None:
        """Choose a layer's mask; `step` calls it for all layers."""
        if tensor_fqn not in self._moments:
            raise MaskoptError(f"The inputs of {tensor_fqn} were not observed; prepare the model and run data first.")
        parametrization: Any = module.parametrizations[tensor_name]  # type: ignore[index]
        held, weight = parametrization[0].mask, parametrization.original
        earlier = held.bool()
        solved = self._moments[tensor_fqn].solve(weight * held, kwargs["masks"], kwargs["solver"], kept=earlier)
        mask, updated, _ = solved
        with torch.no_grad():
            held.copy_(mask & earlier)
            if updated is not None:
                weight.copy_(updated)

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Make the masks permanent, and stop observing; see BaseSparsifier."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().squash_mask(*args, **kwargs)
