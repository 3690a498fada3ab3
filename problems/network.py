"""Objectives that span layers: a block's output, or a model's predictions, as functions of all layers' masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maskopt.checks import shown
from maskopt.errors import MaskoptError
from maskopt.problems.base import Point
from maskopt.problems.function import Function

__all__ = ["BlockReconstruction", "ModelDivergence", "NetworkObjective"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


class NetworkObjective(Function):
    """A loss of a module's outputs on batches, as a function of relaxed masks of several of its weights.

    The relaxed masks of all weights stand in one row, in the order of `names`; `maskopt.oracles.Product` is the set
    for them. The module computes with mask * weight, through `torch.func.functional_call`; its own parameters stay.

    Parameters
    ----------
    module : nn.Module
        In the mode in which it is to be judged, usually evaluation.
    names : sequence of str
        Full names of the parameters that are masked.
    batches : sequence of (tuple, dict)
        Positional and keyword arguments of the module's forward, for each batch.
    loss : callable
        Takes the module's output and the number of the batch; returns a scalar, whose mean over the batches is
        minimised.
    transposed : sequence of str
        Those of the names whose parameter is stored as (d, rows), such as transformers' Conv1D weights.

    Raises
    ------
    MaskoptError
        If a name is no parameter of the module, there is no batch, or the loss is not a finite scalar with gradients.

    Attributes
    ----------
    names : tuple of str
    shapes : list of (int, int)
        Of each weight as a (rows, d) matrix.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        batches: Sequence[Call],
        loss: Callable[[Any, int], Tensor],
        *,
        transposed: Sequence[str] = (),
    ) -> None:
        parameters = dict(module.named_parameters())
        unknown = [name for name in names if name not in parameters]
        if not names or unknown:
            raise MaskoptError(
                f"The module has no parameter {unknown[0]!r}." if unknown else "There is no parameter to mask."
            )
        if not batches:
            raise MaskoptError("There are no batches; at least one is needed.")
        self._module, self.names, self._batches, self._loss = module, tuple(names), list(batches), loss
        self._weights = {name: parameters[name].detach() for name in names}
        if any(weight.ndim != 2 for weight in self._weights.values()):
            raise MaskoptError("Only matrices can be masked.")
        self._transposed = frozenset(transposed)
        self.shapes = [
            (weight.shape[1], weight.shape[0]) if name in self._transposed else (weight.shape[0], weight.shape[1])
            for name, weight in self._weights.items()
        ]
        self._sizes = [math.prod(shape) for shape in self.shapes]
        first = self._weights[names[0]]
        super().__init__(self._mean, (1, sum(self._sizes)), dtype=first.dtype, device=first.device)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mask of each weight, (rows, d), from one row for all; views.

        Parameters
        ----------
        x : Tensor
            Shape (1, entries).
        """
        pieces = torch.split(x.reshape(-1), self._sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def join(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return one row for the masks of all weights, shape (1, entries): the inverse of `masks`."""
        return torch.cat([masks[name].reshape(-1) for name in self.names]).unsqueeze(0)

    def of_batch(self, x: Tensor, index: int) -> Tensor:
        """Return the loss on one batch, a scalar; gradients flow to `x`.

        Parameters
        ----------
        x : Tensor
            Shape (1, entries).
        index : int
        """
        weights = {
            name: (mask.T if name in self._transposed else mask) * self._weights[name]
            for name, mask in self.masks(x).items()
        }
        args, kwargs = self._batches[index]
        found = self._loss(functional_call(self._module, weights, args, kwargs), index)
        if not isinstance(found, Tensor) or found.ndim:
            raise MaskoptError(f"The loss of a batch must be one number, a tensor without axes; got {shown(found)}.")
        return found

    def _mean(self, x: Tensor) -> Tensor:
        return torch.stack([self.of_batch(x, index) for index in range(len(self._batches))]).mean()

    def _over(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the gradient of the mean loss over some batches, one batch in memory at a time."""
        gradient = torch.zeros_like(x)
        for index in indices:
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                (part,) = torch.autograd.grad(self.of_batch(leaf, index), leaf)
            gradient.add_(part, alpha=1.0 / len(indices))
        return gradient

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, self._finite("slope", self._over(x, range(len(self._batches)))))

    def sampled(self, x: Tensor, fraction: float, random: torch.Generator) -> Tensor:
        number = max(1, round(fraction * len(self._batches)))
        chosen = torch.randperm(len(self._batches), generator=random, device=random.device)[:number]
        return self._finite("slope", self._over(x, chosen.tolist()))


class BlockReconstruction(NetworkObjective):
    """Squared error of a block's output, relative to the size of the output to reach.

    Parameters
    ----------
    block : nn.Module
        Returns a tensor, or a tuple or list whose first element is one.
    names : sequence of str
        Of the parameters that are masked.
    batches : sequence of (tuple, dict)
        The block's arguments behind pruned blocks.
    targets : sequence of Tensor
        Its output to reach on each batch, such as that of the dense block on the dense model's states.
    transposed : sequence of str
        See `NetworkObjective`.

    Raises
    ------
    MaskoptError
        As `NetworkObjective`, or if there are not as many targets as batches.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import PerRow, Product
    >>> _ = torch.manual_seed(0)
    >>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).double()
    >>> x = torch.randn(32, 4, dtype=torch.float64)
    >>> problem = BlockReconstruction(block, ["0.weight", "2.weight"], [((x,), {})], [block(x).detach()])
    >>> masks = Product([(PerRow(0.5), shape) for shape in problem.shapes])
    >>> problem.shape, float(problem.objective(torch.ones(1, 64, dtype=torch.bool)))
    ((1, 64), 0.0)
    """

    def __init__(
        self,
        block: nn.Module,
        names: Sequence[str],
        batches: Sequence[Call],
        targets: Sequence[Tensor],
        *,
        transposed: Sequence[str] = (),
    ) -> None:
        if len(targets) != len(batches):
            raise MaskoptError(f"There are {len(batches)} batches but {len(targets)} targets.")
        self._targets = [target.detach() for target in targets]
        size = sum(float(target.double().square().sum()) for target in self._targets) / max(1, len(targets))
        self._scale = size or 1.0
        super().__init__(block, names, batches, self._error, transposed=transposed)

    def _error(self, output: Any, index: int) -> Tensor:
        found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return (found - self._targets[index]).square().sum() / self._scale


class ModelDivergence(NetworkObjective):
    """Kullback-Leibler divergence of a model's predictions from its own with all weights kept, per position.

    Parameters
    ----------
    model : nn.Module
        Returns logits, shape (..., vocabulary), or an object with them as `logits`.
    names : sequence of str
        Of the parameters that are masked.
    batches : sequence of (tuple, dict)
        The model's arguments.
    transposed : sequence of str
        See `NetworkObjective`.

    Raises
    ------
    MaskoptError
        As `NetworkObjective`.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)).double()
    >>> x = torch.randn(32, 4, dtype=torch.float64)
    >>> problem = ModelDivergence(model, ["0.weight"], [((x,), {})])
    >>> half = torch.full((1, 32), 0.5, dtype=torch.float64)
    >>> bool(problem.value(problem.evaluate(half)) > 0)
    True
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], batches: Sequence[Call], *, transposed: Sequence[str] = ()
    ) -> None:
        with torch.no_grad():
            self._dense = [_logits(model(*args, **kwargs)).log_softmax(-1) for args, kwargs in batches]
        super().__init__(model, names, batches, self._divergence, transposed=transposed)

    def _divergence(self, output: Any, index: int) -> Tensor:
        dense, logs = self._dense[index], _logits(output).log_softmax(-1)
        return (dense.exp() * (dense - logs)).sum(-1).mean()


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise MaskoptError(f"The model must return logits; it returned a {type(output).__name__}.")
    return found
