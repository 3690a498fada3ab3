"""Second moments of layers' inputs: G = sum of x x^T over the calibration tokens, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch
from maskopt.models.calls import Inputs, identity
from maskopt.models.experts import Products, Stack
from maskopt.models.layers import Layer
from maskopt.models.moments import Gram, Moments, Sums, inseparable, not_finite
from maskopt.models.ranks import Ranks
from maskopt.models.residual import Lost
from maskopt.models.states import States
from maskopt.models.sums import add_product, add_square, multipliable
from maskopt.precision import full_precision

__all__ = ["DenseInputs", "Gram", "GramCollector"]


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
            self._states.put(self._number, x, copy=True)
        number = self._latest[2]
        self._seen.setdefault(layer, []).append(number)
        self._readers[number] = self._readers.get(number, 0) + 1

    def _release(self) -> None:
        self._latest = None

    def begin(self, index: int) -> None:
        """Set the number of the batch that runs, or is asked for, next."""
        self._seen = self._batches.setdefault(index, {})

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
    parts : range
        The parts of the batches (`Batch.part`) that run here; other processes run the others.
    total : bool
        Whether the inputs themselves are summed, too.
    lost : Lost, optional
        What the residual stream has lost before layers that add to it.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dense: DenseInputs | None = None,
        parts: range = range(1),
        *,
        total: bool = False,
        lost: Lost | None = None,
    ) -> None:
        super().__init__(layers)
        self._dense, self._lost = dense, lost
        self._moments = Moments(layers, self._stacked, parts, total)
        # The references keep the addresses of a batch's tensors from being used again.
        self._seen: dict[tuple[object, ...], tuple[Tensor, Layer]] = {}
        self._batch: Batch | None = None
        self._marked = False  # whether padded positions are NaN
        self._passed_over: set[nn.Module] = set()
        """Modules whose products count no more, because they were counted with marked positions."""

    def _release(self) -> None:
        self._seen.clear()

    def begin(self, batch: Batch) -> None:
        """Set the batch that runs next."""
        self._batch = batch
        self._seen.clear()

    def agree(self, ranks: Ranks) -> None:
        """Let all processes know the same of the layers, once their batches have run; see `Moments.agree`."""
        self._moments.agree(ranks)

    def gather(self, ranks: Ranks, wanted: Mapping[Layer, Sequence[int]]) -> None:
        """Sum the matrices over all processes, where they are wanted; see `Moments.gather`."""
        self._moments.gather(ranks, wanted)

    def leader(self, layer: Layer) -> Layer:
        """Return the layer whose Gram matrix is a layer's own, too; `agree` comes first.

        Raises
        ------
        MaskoptError
            If the layer was never called, or has another layer's input in some batches only.
        """
        return self._moments.leader(layer)

    def __getitem__(self, layer: Layer) -> Gram:
        """Return the Gram matrix of a layer, which was wanted here; where nothing was gathered, of this process.

        Raises
        ------
        MaskoptError
            As for `leader`.
        """
        if not self._moments.agreed:
            self.agree(Ranks())
            self.gather(Ranks(), {})
        return self._moments[self.leader(layer)]

    def _see(self, layer: Layer, x: Tensor) -> None:
        moments = self._moments
        moments.calls[layer] += 1
        before = None if self._dense is None else self._dense.pop(layer)
        key = identity(x)
        if key in self._seen:
            common = self._seen[key][1]
            if moments.leaders.setdefault(layer, common) is common:
                moments.sums[common].kinds.pop("lost", None)  # it is of one layer's rows
                return
        leader = moments.leaders.setdefault(layer, layer)
        if leader is not layer:
            raise inseparable(layer, leader)
        lost = self._lost if self._lost is not None and layer in self._lost else None
        sums = moments.begun(layer, layer, cross=self._dense is not None, lost=lost is not None)
        rows = multipliable(self._token_rows(layer, x))
        self._add(sums, rows)
        assert self._batch is not None
        if "cross" in sums.kinds and not self._batch.held_out:
            self._pair(sums, layer, before, x, rows)
            if lost is not None:
                self._pair_lost(sums, layer, lost.before(layer), x, rows)
        self._seen[key] = x, layer

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
            raise not_finite(next(one for stack in self._stacked if stack.module is module for one in stack.layers()))
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
        rows = multipliable(rows[(rows != 0).any(-1)])
        if layer is not None:
            self._moments.leaders[layer] = layer
        self._add(self._moments.begun(layer or stack, leader), rows)

    def _add(self, sums: Sums, rows: Tensor) -> None:
        """Add tokens of the current batch to a matrix."""
        assert self._batch is not None
        kind = "held_out" if self._batch.held_out else "matrix"
        width = rows.shape[-1]
        total = sums.kinds[kind].part(self._batch.part, (width, width), rows.device)
        if not self._batch.held_out:
            sums.tokens += len(rows)
            if "total" in sums.kinds:
                sums.kinds["total"].part(self._batch.part, (width,), rows.device).add_(rows.sum(0, dtype=torch.float32))
        with full_precision():
            add_square(total, rows)
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise not_finite(sums.leader)

    def _pair(self, sums: Sums, layer: Layer, before: Tensor | None, x: Tensor, rows: Tensor) -> None:
        """Add this call's part of the cross term; drop the term if the dense model's call had other tokens."""
        assert self._batch is not None
        sequences, positions = self._batch.shape
        # An expert's tokens may differ from those in the dense model even where their number is the same.
        whole = x.shape[:-1].numel() == sequences * positions or (x.ndim > 2 and x.shape[0] == sequences)
        if before is None or before.shape != x.shape or not whole:
            del sums.kinds["cross"]
            return
        cross = sums.kinds["cross"].part(self._batch.part, (rows.shape[-1],) * 2, rows.device)
        with full_precision():
            add_product(cross, self._token_rows(layer, before), rows)

    def _pair_lost(self, sums: Sums, layer: Layer, lost: Tensor | None, x: Tensor, rows: Tensor) -> None:
        """Add this call's part of the sum with what is lost; drop it where that has other tokens."""
        assert self._batch is not None
        if lost is None or "cross" not in sums.kinds or lost.shape[:-1].numel() != x.shape[:-1].numel():
            sums.kinds.pop("lost", None)
            return
        if "lost" not in sums.kinds:
            return
        missing = multipliable(self._token_rows(layer, lost.view(*x.shape[:-1], -1).to(rows.device)))
        total = sums.kinds["lost"].part(self._batch.part, (missing.shape[-1], rows.shape[-1]), rows.device)
        with full_precision():
            add_product(total, missing, rows)

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


def _longer_axes(shape: torch.Size) -> list[int]:
    return [length for length in shape if length != 1]
