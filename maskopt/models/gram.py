"""Second moments of layers' inputs: G = sum of x x^T over the calibration tokens, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch
from maskopt.models.calls import Inputs, identity
from maskopt.models.experts import Products, Stack, StackedLayer
from maskopt.models.layers import Layer
from maskopt.models.states import States

__all__ = ["DenseInputs", "Gram", "GramCollector"]

_PANELS, _NARROW = 4, 256
"""Panels of a symmetric product, measured: more are not faster, and matrices narrower than this gain nothing."""

_TILE = 512


@dataclass(eq=False)
class Gram:
    """A second-moment matrix.

    Attributes
    ----------
    matrix : Tensor
        Sum of y y^T over the inputs y, float32, shape (d, d).
    leader : Layer
        The layer whose calls add to it; other layers with the same input tensors use it, too.
    tokens : int
        Terms of the sum.
    cross : Tensor, optional
        Sum of x y^T, shape (d, d), where x is the input of the dense model; None where not asked for, or where x and y
        belong to different tokens (experts that a router chose differently).
    held_out : Tensor, optional
        Sum of y y^T over the inputs in held-out batches, which are not among those of `matrix`; None without any.
    pooled : bool
        Whether the matrix contains tokens of other experts, in place of missing ones (`GramCollector`).
    """

    matrix: Tensor
    leader: Layer
    tokens: int = 0
    cross: Tensor | None = None
    held_out: Tensor | None = None
    pooled: bool = False


class DenseInputs(Inputs):
    """Context manager that hooks layers and stores their inputs, for a `GramCollector` to pair with later ones.

    Parameters
    ----------
    layers : sequence of Layer
        The layers to observe; call `begin` before every batch. Of stacked matrices nothing is stored: the pruned
        model's routers choose other tokens for them, so that inputs cannot be paired.
    states : States, optional
        Where inputs are kept; on the device by default.
    """

    def __init__(self, layers: Sequence[Layer], states: States | None = None) -> None:
        super().__init__(layers)
        self._states = States() if states is None else states
        self._batches: dict[int, dict[Layer, list[int]]] = {}
        self._seen: dict[Layer, list[int]] = {}
        self._readers: dict[int, int] = {}
        self._latest: tuple[Tensor, int, int] | None = None
        self._read: tuple[int, Tensor] | None = None  # layers with the same input read it one after the other
        self._number = 0

    def _see(self, layer: Layer, x: Tensor) -> None:
        # A copy, because models may change their states in place; one for all layers with the same tensor.
        if self._latest is None or self._latest[0] is not x or self._latest[1] != x._version:
            self._number += 1
            self._latest = x, x._version, self._number
            self._states.put(self._number, x.clone())
        number = self._latest[2]
        self._seen.setdefault(layer, []).append(number)
        self._readers[number] = self._readers.get(number, 0) + 1

    def _release(self) -> None:
        self._latest = None

    def begin(self, index: int) -> None:
        """Set the number of the batch that runs, or is asked for, next."""
        self._seen = self._batches.setdefault(index, {})

    def forget(self, index: int) -> None:
        """Drop the inputs of a batch that are left."""
        for numbers in self._batches.pop(index, {}).values():
            for number in numbers:
                self._leave(number)
        self._seen = {}

    def pop(self, layer: Layer) -> Tensor | None:
        """Return a layer's earliest input that has not been returned yet, None if there is none."""
        calls = self._seen.get(layer)
        if not calls:
            return None
        number = calls.pop(0)
        if self._read is None or self._read[0] != number:
            self._read = number, self._states.get(number)
        x = self._read[1]
        self._leave(number)
        return x

    def _leave(self, number: int) -> None:
        self._readers[number] -= 1
        if self._readers[number] == 0:
            del self._readers[number]
            self._states.drop(number)
            self._read = None


class GramCollector(Inputs):
    """Context manager that hooks layers and accumulates the Gram matrix of their inputs.

    Layers with the same input tensor (queries, keys and values; gate and up) have one matrix in common. Padded
    positions are left out.

    Every matrix of a stack of E has a Gram matrix G_e of its own, a sum over the n_e tokens that were routed to it.
    Where n_e < d, it says nothing of d - n_e directions, and masks and weights would be chosen as if inputs along them
    never came. The missing tokens then count as tokens of the whole stack, G_e + (d - n_e) P / N, where P is the sum of
    all G_e and N that of all n_e: with n_e = d nothing is added, and a matrix that saw no token has d P / N, which the
    unseen ones have in common. Tokens whose inputs are all zero are not counted: in batched products of all tokens
    with all matrices they stand for those that were routed elsewhere. Of padded batches, experts see routed tokens
    without their positions; so they compute a second time, on NaN at padded positions, and rows that are NaN are left
    out.

    Parameters
    ----------
    layers : sequence of Layer
        The layers to observe; call `begin` before every batch.
    dense : DenseInputs, optional
        The layers' inputs in the dense model for the same batches; then cross terms are summed, too.
    """

    def __init__(self, layers: Sequence[Layer], dense: DenseInputs | None = None) -> None:
        super().__init__(layers)
        self._dense = dense
        self._grams: dict[Layer, Gram] = {}
        self._halves: set[Gram] = set()  # of which the entries below the diagonal blocks are still to be filled
        self._calls: dict[Layer, int] = dict.fromkeys(layers, 0)
        # The references keep the addresses of a batch's tensors from being used again.
        self._seen: dict[tuple[object, ...], tuple[Tensor, Gram]] = {}
        self._batch: Batch | None = None
        self._rest: dict[Stack, Gram] = {}
        """Of each stack: the tokens of matrices that are not among the layers."""
        self._completed: set[Stack] = set()
        self._marked = False  # whether padded positions are NaN
        self._passed_over: set[nn.Module] = set()
        """Modules whose products count no more, because they were counted with marked positions."""

    def _release(self) -> None:
        self._seen.clear()

    def begin(self, batch: Batch) -> None:
        """Set the batch that runs next."""
        self._batch = batch
        self._seen.clear()

    def __getitem__(self, layer: Layer) -> Gram:
        """Return the Gram matrix of a layer.

        Raises
        ------
        MaskoptError
            If the layer was never called, or has another layer's input in some batches only.
        """
        if isinstance(layer, StackedLayer) and layer.stack not in self._completed:
            self._complete(layer.stack)
        gram = self._grams.get(layer)
        if gram is not None:
            self._fill(gram)
        if gram is None or (gram.tokens == 0 and not gram.pooled):
            raise MaskoptError(
                f"The layer {layer.name} saw no token of the calibration data (experts may need more of it, and some "
                f"modules are never called); exclude it to leave it dense."
            )
        if self._calls[layer] != self._calls[gram.leader]:
            raise _inseparable(layer, gram.leader)
        return gram

    def _see(self, layer: Layer, x: Tensor) -> None:
        self._calls[layer] += 1
        before = None if self._dense is None else self._dense.pop(layer)
        key = identity(x)
        gram = self._grams.get(layer)
        if key in self._seen:
            common = self._seen[key][1]
            if gram is None:
                self._grams[layer] = common
            if gram is None or gram is common:
                return
        if gram is None:
            gram = self._grams[layer] = _empty(layer, x, cross=self._dense is not None)
        if gram.leader is not layer:
            raise _inseparable(layer, gram.leader)
        rows = self._token_rows(layer, x).float()
        self._add(gram, rows)
        assert self._batch is not None
        if gram.cross is not None and not self._batch.held_out:
            gram.cross = self._paired(gram.cross, layer, before, x, rows)
        self._seen[key] = x, gram

    def _observe(self) -> Products | None:
        return Products(self._stacked, self._see_stacked) if self._stacked else None

    def __enter__(self) -> Self:
        super().__enter__()
        for module in {stack.module for stack in self._stacked}:
            self._hooks.append(module.register_forward_pre_hook(self._mark, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._unmark, always_call=True))
        return self

    def _mark(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a module of stacks compute on NaN at padded positions, where its input has all positions."""
        assert self._batch is not None
        real = self._batch.real
        x = args[0] if args else next(iter(kwargs.values()), None)
        if real is None or not isinstance(x, Tensor) or x.shape[:-1].numel() != real.numel():
            return
        padded = ~real.to(x.device).flatten()
        marked = x.reshape(len(padded), -1).masked_fill(padded.unsqueeze(1), float("nan"))
        if not bool(torch.isfinite(marked[~padded]).all()):
            raise _not_finite(next(one for stack in self._stacked if stack.module is module for one in stack.layers()))
        marked = marked.view(x.shape)
        self._marked = True
        try:
            if args:
                module.forward(marked, *args[1:], **kwargs)
            else:
                module.forward(**{**kwargs, next(iter(kwargs)): marked})
        finally:
            self._marked = False
        self._passed_over.add(module)

    def _unmark(self, module: nn.Module, args: Any, output: Any) -> None:
        self._passed_over.discard(module)

    def _see_stacked(self, stack: Stack, index: int, x: Tensor) -> None:
        if stack.module in self._passed_over:
            return
        layer = self._stacked[stack].get(index)
        leader = layer or next(iter(self._stacked[stack].values()))
        rows = x[~x.isnan().any(-1)] if self._marked else self._token_rows(leader, x)
        rows = rows[(rows != 0).any(-1)].float()
        gram = self._rest.get(stack) if layer is None else self._grams.get(layer)
        if gram is None:
            gram = _empty(leader, x)
            if layer is None:
                self._rest[stack] = gram
            else:
                self._grams[layer] = gram
        self._add(gram, rows)

    def _complete(self, stack: Stack) -> None:
        """Give matrices of a stack that saw fewer tokens than they have inputs the missing ones of all."""
        self._completed.add(stack)
        layers = self._stacked[stack].values()
        seen = [self._grams[layer] for layer in layers if layer in self._grams]
        everything = seen + ([self._rest[stack]] if stack in self._rest else [])
        for gram in everything:
            self._fill(gram)
        tokens = sum(gram.tokens for gram in everything)
        short = [gram for gram in seen if gram.tokens < len(gram.matrix)]
        unseen = [layer for layer in layers if layer not in self._grams]
        if not tokens or not (short or unseen):
            return
        mean = everything[0].matrix / tokens
        for gram in everything[1:]:
            mean.add_(gram.matrix, alpha=1.0 / tokens)
        for gram in short:
            gram.matrix.add_(mean, alpha=float(len(mean) - gram.tokens))
            gram.pooled = True
        if unseen:
            common = Gram(mean.mul_(len(mean)), unseen[0], pooled=True)
            self._grams.update((layer, common) for layer in unseen)

    def _fill(self, gram: Gram) -> None:
        """Fill the half of a Gram matrix that is not summed."""
        if gram in self._halves:
            self._halves.discard(gram)
            for matrix in (gram.matrix, gram.held_out):
                if matrix is not None:
                    _mirror(matrix)

    def _add(self, gram: Gram, rows: Tensor) -> None:
        """Add tokens of the current batch to a matrix."""
        assert self._batch is not None
        total = gram.matrix
        if self._batch.held_out:
            if gram.held_out is None:
                gram.held_out = torch.zeros_like(gram.matrix)
            total = gram.held_out
        else:
            gram.tokens += len(rows)
        with _full_precision():
            _add_square(total, rows)
        self._halves.add(gram)
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise _not_finite(gram.leader)

    def _paired(self, cross: Tensor, layer: Layer, before: Tensor | None, x: Tensor, rows: Tensor) -> Tensor | None:
        """Return the cross term plus this call's part, None if the dense model's call had other tokens."""
        assert self._batch is not None
        sequences, positions = self._batch.shape
        # An expert's tokens may differ from those in the dense model even where their number is the same.
        whole = x.shape[:-1].numel() == sequences * positions or (x.ndim > 2 and x.shape[0] == sequences)
        if before is None or before.shape != x.shape or not whole:
            return None
        with _full_precision():
            return cross.addmm_(self._token_rows(layer, before).float().T, rows)

    def _token_rows(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the inputs at the positions that are not padding, shape (tokens, d)."""
        assert self._batch is not None, "begin() announces a batch first"
        real = self._batch.real
        # Inputs with one row per sequence, such as a pooler's, have no padding.
        if real is None or x.shape[:-1] == real.shape[:1]:
            return x.reshape(-1, x.shape[-1])
        real = real.to(x.device)
        if x.shape[:2] == real.shape:
            return x[real].reshape(-1, x.shape[-1])
        # Axes of one do not change the order of the tokens, nor does flattening.
        if _longer_axes(x.shape[:-1]) in (_longer_axes(real.shape), [real.numel()]):
            return x.reshape(-1, x.shape[-1])[real.reshape(-1)]
        raise MaskoptError(
            f"The layer {layer.name} has inputs of shape {tuple(x.shape)} for a padded batch of shape "
            f"{tuple(real.shape)}, in which padding cannot be identified; calibrate on sequences of one length or "
            f"exclude this layer."
        )


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to a matrix, on the diagonal blocks and above them only: less than two thirds of the work."""
    size = total.shape[0]
    step = size if size < _NARROW else -(-size // _PANELS)
    for first in range(0, size, step):
        last = first + step
        total[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])


def _mirror(total: Tensor) -> None:
    """Fill the entries below the diagonal with those above it."""
    size = total.shape[0]
    for first in range(0, size, _TILE):
        last = first + _TILE
        total[last:, first:last] = total[first:last, last:].T
        tile = total[first:last, first:last]
        tile.copy_(tile.triu() + tile.triu(1).T)


def _empty(leader: Layer, x: Tensor, *, cross: bool = False) -> Gram:
    """Return the Gram matrix of no tokens, for inputs like x."""
    zeros = torch.zeros(x.shape[-1], x.shape[-1], device=x.device, dtype=torch.float32)
    return Gram(zeros, leader, cross=zeros.clone() if cross else None)


def _longer_axes(shape: torch.Size) -> list[int]:
    return [length for length in shape if length != 1]


def _not_finite(layer: Layer) -> MaskoptError:
    return MaskoptError(
        f"The inputs of {layer.name} hold NaN or infinite values (or their squares exceed float32) on the calibration "
        f"data; the model already fails there before any pruning of this layer."
    )


def _inseparable(layer: Layer, leader: Layer) -> MaskoptError:
    return MaskoptError(
        f"The layers {leader.name} and {layer.name} have the same input in one calibration batch and different ones in "
        f"another; exclude one of them."
    )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, even where the caller has allowed TF32 or bf16."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]  # torch >= 2.9
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
