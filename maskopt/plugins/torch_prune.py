"""torch.nn.utils.prune: masks of any set by any solver, as one of its pruning methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.plugins.moments import InputMoments, observing
from maskopt.solvers import Solver

__all__ = ["Reconstruction", "apply", "observing", "reconstruct"]


class Reconstruction(prune.BasePruningMethod):
    """Prunes the weights without which a module's output on calibration data changes least.

    Use `reconstruct`, or `Reconstruction.apply(module, "weight", masks, moments)`, as methods of
    torch.nn.utils.prune are used. Where the solver updates weights (`maskopt.weights`), those of the module change.

    Parameters
    ----------
    masks : MaskSet
    moments : InputMoments
        Of this module.
    solver : Solver, optional
        `ContinuationFrankWolfe()` by default.
    """

    # Of the types that torch knows this one passes a method the whole weight, in its shape.
    PRUNING_TYPE = "global"

    def __init__(self, masks: MaskSet, moments: InputMoments, solver: Solver | None = None) -> None:
        self.masks, self.moments, self.solver = masks, moments, solver
        self.updated: Tensor | None = None

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask of a weight, 0 or 1, shape as `t`, within a mask of earlier prunings."""
        earlier = default_mask.bool()
        mask, self.updated, _ = self.moments.solve(t * default_mask, self.masks, self.solver, kept=earlier)
        return mask.logical_and(earlier).to(default_mask)

    @classmethod
    def apply(cls, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """Prune a module's parameter; further arguments are those of the class."""
        method: Any = super().apply(module, name, *args, **kwargs)  # type: ignore[no-untyped-call]
        last: Any = method[-1] if isinstance(method, prune.PruningContainer) else method
        if last.updated is not None:
            with torch.no_grad():
                getattr(module, f"{name}_orig").copy_(last.updated)
            setattr(module, name, method.apply_mask(module))
            last.updated = None
        return method


def reconstruct(
    module: nn.Module, name: str, masks: MaskSet, moments: InputMoments, solver: Solver | None = None
) -> nn.Module:
    """Prune a module's weight so that its output on calibration data changes least.

    Parameters
    ----------
    module : nn.Module
        nn.Linear, nn.Conv2d or the Conv1D of transformers; changed in place, as by others of torch.nn.utils.prune.
    name : str
        "weight".
    masks : MaskSet
        For the weight as (out, in), such as `PerRow(0.5)`.
    moments : InputMoments
        Of this module, from `observing`.
    solver : Solver, optional
        `ContinuationFrankWolfe()` by default; those of `maskopt.weights` update the surviving weights, too.

    Returns
    -------
    nn.Module
        The module.

    Raises
    ------
    MaskoptError
        If the name is another one, the set does not fit, or the module saw no data.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.nn.utils import prune
    >>> import maskopt
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> with torch.no_grad(), observing(model) as moments:
    ...     _ = model(torch.randn(64, 8))
    >>> _ = reconstruct(model[0], "weight", maskopt.PerRow(0.5), moments["0"])
    >>> _ = prune.remove(model[0], "weight")  # makes it permanent
    >>> (model[0].weight != 0).sum(1).tolist()
    [4, 4, 4, 4, 4, 4]
    """
    if name != "weight":
        raise MaskoptError(f"Only the parameter weight can be pruned by what its module reads; got {name!r}.")
    Reconstruction.apply(module, name, masks, moments, solver)
    return module


def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Hand masks over to torch.nn.utils.prune, which multiplies them into the weights at every forward pass.

    Parameters
    ----------
    model : nn.Module
    masks : mapping of str to Tensor
        By module name, boolean (or 0 and 1), True = kept, as the module stores its weight: those of
        `maskopt.prune(...)`, or of `maskopt.models.load_masks`.

    Returns
    -------
    list of str
        The modules' names; `torch.nn.utils.prune.remove(model.get_submodule(name), "weight")` makes a mask permanent.
        Do that before saving: transformers draws weights anew that it does not find under their own name.

    Raises
    ------
    MaskoptError
        If there is no such module, or a mask has another shape or other entries; the model is as before.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> apply(model, {"0": torch.tensor([[True, False]])})
    ['0']
    >>> model[0].weight_mask.tolist()
    [[1.0, 0.0]]
    """
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        if name not in modules or not isinstance(getattr(modules[name], "weight", None), Tensor):
            raise MaskoptError(f"The model has no module {name} with a weight, for which there is a mask.")
        shape = tuple(modules[name].weight.shape)
        if shape != tuple(mask.shape):
            raise MaskoptError(f"The mask of {name} has shape {tuple(mask.shape)}, but its weight {shape}.")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise MaskoptError(f"The mask of {name} must be boolean, or 0 and 1; it has other entries.")
    for name, mask in masks.items():
        module: Any = modules[name]
        prune.custom_from_mask(module, "weight", mask.to(module.weight.device))  # type: ignore[no-untyped-call]
    return list(masks)
