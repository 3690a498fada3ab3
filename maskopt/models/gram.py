"""Second moments of layers' inputs: G = sum of x x^T over the calibration tokens, in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch
from maskopt.models.blocks import Block
from maskopt.models.layers import Layer
from maskopt.models.states import States

__all__ = ["CallOrder", "DenseInputs", "Gram", "GramCollector", "identity"]

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
    """

    matrix: Tensor
    leader: Layer
    tokens: int = 0
    cross: Tensor | None = None
    held_out: Tensor | None = None


class _Inputs(ABC):
    """Context manager that hooks layers and passes their inputs to `_see`, call by call."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def _see(self, layer: Layer, x: Tensor) -> None: ...

    def __enter__(self) -> Self:
        for layer in self._layers:

            def hook(module: Any, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                self._see(layer, args[0] if args else next(iter(kwargs.values())))

            self._hooks.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """Drop references to tensors that only serve while the hooks are in place."""


class CallOrder(_Inputs):
    """Context manager that records in which order layers are first called, and which have the same input tensor.

    It computes nothing from the inputs, except to compare the outputs of subclasses of nn.Linear (`check`).

    Parameters
    ----------
    blocks : mapping of Block to sequence of Layer
        The layers of each block; only layers of one block are grouped by their input.
    outside : sequence of Layer
        Layers outside the blocks.
    """

    def __init__(self, blocks: Mapping[Block, Sequence[Layer]], outside: Sequence[Layer] = ()) -> None:
        super().__init__([layer for layers in (*blocks.values(), outside) for layer in layers])
        self._block_of = {layer: block for block, layers in blocks.items() for layer in layers}
        self._current: Block | None = None
        self._groups: dict[Layer, list[Layer]] = {}
        self._sizes: dict[int, int] = {}
        self._nonlinear: Layer | None = None  # the first that does more than multiply
        # The references keep the addresses of a block's tensors from being used again.
        self._seen: dict[tuple[object, ...], tuple[Tensor, list[Layer]]] = {}

    def _release(self) -> None:
        self._seen.clear()

    def _see(self, layer: Layer, x: Tensor) -> None:
        block = self._block_of.get(layer)
        if block is not self._current:
            self._current = block
            self._seen.clear()
        if layer not in self._groups:
            _, group = self._seen.setdefault(identity(x), (x, []))
            group.append(layer)
            self._groups[layer] = group
            self._sizes[id(group)] = x.numel() * x.element_size()

    def __enter__(self) -> Self:
        super().__enter__()
        for layer in self._layers:
            if type(layer.module).forward not in (nn.Linear.forward, Conv1D.forward):
                hook = partial(self._compare, layer)
                self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def _compare(self, layer: Layer, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record a subclass of nn.Linear whose output is not its weight times its input."""
        if self._nonlinear is not None or not isinstance(output, Tensor):
            return  # routers return choices made from the product
        x = args[0] if args else next(iter(kwargs.values()))
        weight, bias = layer.oriented(layer.weight), getattr(layer.module, "bias", None)
        if x.dtype == weight.dtype:
            product = nn.functional.linear(x, weight, bias)
            size = float(product.float().nan_to_num().abs().amax()) if product.numel() else 0.0
            rounding = 1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2
            if output.shape == product.shape and torch.allclose(
                output.float(), product.float(), rtol=0.0, atol=rounding * size, equal_nan=True
            ):
                return
        self._nonlinear = layer

    def check(self) -> None:
        """Check that outputs of layers are their weights times their inputs, as reconstruction from a Gram assumes.

        Raises
        ------
        MaskoptError
            With the name of the first layer for which they are not.
        """
        layer = self._nonlinear
        if layer is not None:
            raise MaskoptError(
                f"The layer {layer.name} is a {type(layer.module).__name__}, which does more than multiply its "
                f"input by its weight; exclude it to leave it dense."
            )

    def __contains__(self, layer: Layer) -> bool:
        return layer in self._groups

    def groups(self, layers: Iterable[Layer]) -> list[list[Layer]]:
        """Return the called ones of some layers, in order, grouped where they have the same input tensor."""
        wanted = set(layers)
        groups = {id(group): group for group in self._groups.values()}
        chosen = ([layer for layer in group if layer in wanted] for group in groups.values())
        return [group for group in chosen if group]

    def size(self, layers: Iterable[Layer]) -> int:
        """Return the bytes of some layers' input tensors in their first calls, each tensor once."""
        return sum(self._sizes[group] for group in {id(self._groups[layer]) for layer in layers})


class DenseInputs(_Inputs):
    """Context manager that hooks layers and stores their inputs, for a `GramCollector` to pair with later ones.

    Parameters
    ----------
    layers : sequence of Layer
        The layers to observe; call `begin` before every batch.
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


class GramCollector(_Inputs):
    """Context manager that hooks layers and accumulates the Gram matrix of their inputs.

    Layers with the same input tensor (queries, keys and values; gate and up) have one matrix in common. Padded
    positions are left out.

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
        gram = self._grams.get(layer)
        if gram is not None and gram in self._halves:
            self._halves.discard(gram)
            for matrix in (gram.matrix, gram.held_out):
                if matrix is not None:
                    _mirror(matrix)
        if gram is None or gram.tokens == 0:
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
            size = x.shape[-1]
            zeros = torch.zeros(size, size, device=x.device, dtype=torch.float32)
            gram = self._grams[layer] = Gram(zeros, layer, cross=None if self._dense is None else zeros.clone())
        if gram.leader is not layer:
            raise _inseparable(layer, gram.leader)
        rows = self._token_rows(layer, x).float()
        assert self._batch is not None
        total = gram.matrix
        if self._batch.held_out:
            if gram.held_out is None:
                gram.held_out = torch.zeros_like(gram.matrix)
            total = gram.held_out
        with _full_precision():
            _add_square(total, rows)
            self._halves.add(gram)
            if not self._batch.held_out:
                gram.tokens += len(rows)
                if gram.cross is not None:
                    gram.cross = self._paired(gram.cross, layer, before, x, rows)
        self._seen[key] = x, gram
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise MaskoptError(
                f"The inputs of {layer.name} hold NaN or infinite values (or their squares exceed float32) on the "
                f"calibration data; the model already fails there before any pruning of this layer."
            )

    def _paired(self, cross: Tensor, layer: Layer, before: Tensor | None, x: Tensor, rows: Tensor) -> Tensor | None:
        """Return the cross term plus this call's part, None if the dense model's call had other tokens."""
        assert self._batch is not None
        sequences, positions = self._batch.shape
        # An expert's tokens may differ from those in the dense model even where their number is the same.
        whole = x.shape[:-1].numel() == sequences * positions or (x.ndim > 2 and x.shape[0] == sequences)
        if before is None or before.shape != x.shape or not whole:
            return None
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


def identity(x: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors have in common only if they are the same, as long as both exist.

    Parameters
    ----------
    x : Tensor
    """
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version


def _longer_axes(shape: torch.Size) -> list[int]:
    return [length for length in shape if length != 1]


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
