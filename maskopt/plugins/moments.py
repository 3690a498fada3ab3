"""Second moments of a module's inputs, and the solution of its layer: what all adapters have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskopt.errors import MaskoptError
from maskopt.oracles import AtMost, MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Result, Solver, solve

__all__ = ["InputMoments", "observing", "weight_of"]

_PATCHES = 2**24  # entries of the patches that are held at a time, about


class InputMoments:
    """Second moments of the inputs of a linear module, G = sum of x x^T, from which its weights are pruned.

    A convolution is a linear map of patches: its weight as (out, in) has a column for every channel and place in the
    kernel, and x is the part of the input that the kernel covers at one place.

    Parameters
    ----------
    module : nn.Module
        nn.Linear; the Conv1D of transformers, which stores its weight as (in, out); or nn.Conv2d, without groups.

    Attributes
    ----------
    gram : Tensor
        Shape (d, d), float32, where d is the number of inputs; on the weight's device.
    tokens : int
        Inputs seen; of a convolution, patches.
    width : int
        Columns for each input feature or channel: of a convolution the entries of its kernel, else one.

    Raises
    ------
    MaskoptError
        If the module is of another kind.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> moments = InputMoments(nn.Linear(3, 5))
    >>> moments.add(torch.ones(2, 4, 3))
    >>> moments.tokens, moments.gram[0].tolist()
    (8, [8.0, 8.0, 8.0])
    """

    def __init__(self, module: nn.Module) -> None:
        self._transposed = _stores_inputs_first(module)
        self._conv = module if isinstance(module, nn.Conv2d) else None
        weight = weight_of(module)
        size = self.matrix(weight).shape[1]
        self.gram = torch.zeros(size, size, device=weight.device)
        self.tokens = 0
        self.width = 1 if self._conv is None else weight[0, 0].numel()

    def add(self, x: Tensor) -> None:
        """Add inputs, shape (..., d); of a convolution (..., channels, height, width).

        Raises
        ------
        MaskoptError
            If they have another number of features.
        """
        features = x.shape[-1 if self._conv is None else -3]
        if features * self.width != len(self.gram):
            known = len(self.gram) // self.width
            raise MaskoptError(f"The inputs have {features} features, but the module has {known} inputs.")
        for flat in self._rows(x.detach().to(self.gram)):
            self.gram.addmm_(flat.T, flat)
            self.tokens += len(flat)

    def _rows(self, x: Tensor) -> Iterator[Tensor]:
        """Yield inputs as rows, shape (tokens, d); the patches of a convolution for some images at a time."""
        conv = self._conv
        if conv is None:
            yield x.reshape(-1, x.shape[-1])
            return
        images = x.reshape(-1, *x.shape[-3:])
        if conv.padding == "same":
            total = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
            before = [each // 2 for each in total]
            images = nn.functional.pad(images, (before[1], total[1] - before[1], before[0], total[0] - before[0]))
        padding = 0 if isinstance(conv.padding, str) else conv.padding
        entries = images[0].numel() * self.width
        for some in torch.split(images, max(1, _PATCHES // entries)):
            patches = nn.functional.unfold(some, conv.kernel_size, conv.dilation, padding, conv.stride)
            yield patches.transpose(1, 2).reshape(-1, len(self.gram))

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Add the inputs of every call of the module, until the handle that is returned is removed."""

        def add(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.add(arguments[0] if arguments else keywords["input"])

        return module.register_forward_pre_hook(add, with_kwargs=True)

    def solve(
        self, weight: Tensor, masks: MaskSet, solver: Solver | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Result]:
        """Choose a mask, and weights where the solver updates them.

        Parameters
        ----------
        weight : Tensor
            As the module stores it.
        masks : MaskSet
            For the weight as (out, in): `PerRow(0.5)`, `NM(keep=2, group=4)` ...
        solver : Solver, optional
            `ContinuationFrankWolfe()` by default.
        kept : Tensor, optional
            Boolean: entries that are not pruned yet; only these may be kept, where the set can be restricted.

        Returns
        -------
        mask : Tensor
            Boolean, True = kept, as the module stores its weight.
        updated : Tensor or None
            Weights that go with it, likewise, zero where pruned.
        result : Result

        Raises
        ------
        MaskoptError
            If no input was seen, something is not finite, or the set does not fit.
        """
        if self.tokens == 0:
            raise MaskoptError("The module saw no input; run calibration data through the model first.")
        gram = self.gram.clone()
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise MaskoptError("The module's inputs are not finite, or too large for float32; check the model's type.")
        problem = LayerReconstruction(self.matrix(weight.detach()).float(), gram, self.tokens, check=False)
        if kept is not None and not bool(kept.all()) and isinstance(masks, PartitionMatroid):
            # A row that has lost more than its share already keeps fewer.
            masks = (masks if masks.at_most else AtMost(masks)).restrict(pruned=~self.matrix(kept))
        result = solve(problem, masks, solver)
        mask = self.stored(result.mask, weight)
        updated = None if result.weight is None else self.stored(result.weight, weight).to(weight.dtype)
        return mask, updated, result

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor that the module stores like its weight as a matrix (out, in)."""
        return tensor.T if self._transposed else tensor.flatten(1)

    def stored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) as the module stores its weight."""
        return matrix.T if self._transposed else matrix.view(weight.shape)


@contextmanager
def observing(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ("lm_head",)
) -> Iterator[dict[str, InputMoments]]:
    """Add up the second moments of the inputs of a model's linear modules, while it runs.

    Parameters
    ----------
    model : nn.Module
    include, exclude : sequence of str
        Patterns of module names, with * for any part.

    Yields
    ------
    dict of str to InputMoments
        By module name; complete once the calibration data have run.

    Raises
    ------
    MaskoptError
        If no linear module has such a name.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with torch.no_grad(), observing(model) as moments:
    ...     _ = model(torch.ones(4, 3))
    >>> {name: each.tokens for name, each in moments.items()}
    {'0': 4, '2': 4}
    """
    moments: dict[str, InputMoments] = {}
    hooks = []
    try:
        for name, module in model.named_modules():
            wanted = any(fnmatchcase(name, each) for each in include)
            if wanted and not any(fnmatchcase(name, each) for each in exclude) and _is_linear(module):
                moments[name] = InputMoments(module)
                hooks.append(moments[name].watch(module))
        if not moments:
            raise MaskoptError(
                f"No linear module of the model has a name like {', '.join(include)}; names are those of "
                f"model.named_modules()."
            )
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def weight_of(module: nn.Module) -> Tensor:
    """Return a module's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor), "linear modules have one"
    return weight


def _conv1d() -> type[nn.Module] | None:
    """Return the Conv1D of transformers, without importing it: without it no module can be of that type."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _is_linear(module: nn.Module) -> bool:
    conv1d = _conv1d()
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return plain or isinstance(module, nn.Linear) or (conv1d is not None and isinstance(module, conv1d))


def _stores_inputs_first(module: nn.Module) -> bool:
    if not _is_linear(module):
        raise MaskoptError(
            f"A {type(module).__name__} cannot be pruned by its inputs; nn.Linear, Conv1D of transformers and "
            f"nn.Conv2d without groups, padded with zeros, can."
        )
    return not isinstance(module, nn.Linear | nn.Conv2d)
