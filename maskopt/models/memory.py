"""How much memory a recovery takes, estimated before it begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.models.batches import prepare_all, vocabulary_size
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.checks import check_model
from maskopt.models.experts import StackedLayer
from maskopt.models.heap import resident_bytes
from maskopt.models.layers import Layer
from maskopt.models.ranks import current
from maskopt.models.recovery import Recoverer
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.selection import select_layers
from maskopt.models.states import first_tensor, stays
from maskopt.models.windows import divided
from maskopt.oracles import Unstructured
from maskopt.recovery import MaskRule, Recovery

__all__ = ["gram_bytes", "inside_bytes", "layer_bytes", "pruning_bytes", "recovery_bytes", "states_bytes"]

_LAYER_ARRAYS = 8  # of a layer in float32: weight, target, their difference, the result, and residuals in float64
_GRAM_ARRAYS = 7  # of d x d in float32: three sums, and what targets or a solution need beside them

_STREAMS = 2  # hidden states that wait inside a block: what is lost, and what attention adds in the dense model

_ADAM, _MASTER, _GRADIENT = 8, 4, 4  # bytes for each parameter
_LOGITS = 16  # bytes for each logit of a micro-batch: float32 values, their logarithms, and gradients of both


def recovery_bytes(
    model: PreTrainedModel,
    batches: Iterable[Any],
    recovery: Recovery,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    held_out: Iterable[Any] | None = None,
    further: Iterable[Any] | None = None,
) -> int:
    """Return about how many bytes a recovery takes at its peak, beside the model and the states of all windows.

    Counted are the optimizer's two moments, the best state, and what masks that move and half precision need, for the
    parameters of the largest block or of the model, or for the factors of a change of low rank; the largest gradient,
    or all of them where several ranks fit together; and the activations of a micro-batch, which are measured on the
    first block.

    Parameters
    ----------
    model : PreTrainedModel
    batches, recovery, include, exclude, held_out, further
        As for `prune`.

    Returns
    -------
    int

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from maskopt.models import recovery_bytes
    >>> from maskopt.recovery import MaskRule, Recovery
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> batches = [torch.zeros(4, 8, dtype=torch.int64)]
    >>> small, large = (
    ...     recovery_bytes(LlamaForCausalLM(config), batches, Recovery(level)) for level in ("block", "model")
    ... )
    >>> small < large
    True
    """
    check_model(model)
    selection = select_layers(model, include, exclude)
    data = divided(prepare_all(model, batches, held_out, further), current().count)
    batch = data.batches[data.fitted[0]]
    with evaluation_mode(model):
        replay = Replay(model, list(selection.blocks), [batch])
        anything = dict.fromkeys(selection.layers, Unstructured(0.5))  # which set does not matter here
        recoverer = Recoverer(model, replay, data, recovery, anything, {})
        activations, states = _saved_bytes(replay)
    # One after the other, so that the larger of both counts.
    needed = max(
        _fit_bytes(recoverer, recoverer.parameters(block), recovery.rule_for("block")) for block in replay.order
    )
    needed += activations
    if recovery.level == "model":
        logits = batch.shape[0] * batch.shape[1] * (vocabulary_size(model) or 0)
        whole = _fit_bytes(recoverer, recoverer.all_parameters(), recovery.rule_for("model"))
        blocks = len(replay.order)
        whole += activations + blocks * states if recovery.checkpoint else blocks * activations
        whole += _LOGITS * logits
        needed = max(needed, whole)
    return needed


def _fit_bytes(recoverer: Recoverer, parameters: Sequence[nn.Parameter], rule: MaskRule) -> int:
    """Return the bytes of a fit: the optimizer's, copies of what it changes, what the rule keeps, and gradients."""
    total, largest, gradients = 0, 0, 0
    for parameter in parameters:
        numbers, entries = recoverer.trained(parameter), parameter.numel()
        gradients += _GRADIENT * entries
        size = parameter.element_size()
        if numbers != entries:
            # Factors and the best of them, a copy of the weight; its change beside the gradient.
            total += (_ADAM + 2 * _MASTER) * numbers + size * entries
            largest = max(largest, 2 * _GRADIENT * entries)
            continue
        exact = parameter.dtype in (torch.float32, torch.float64)
        beside = max(rule.numbers if parameter.ndim > 1 else min(1.0, rule.numbers), 0.0 if exact else 1.0)
        total += int((_ADAM + size + _MASTER * beside) * entries)
        largest = max(largest, _GRADIENT * entries)
    return total + (largest if current().count == 1 else max(largest, gradients))


def _saved_bytes(replay: Replay) -> tuple[int, int]:
    """Return the bytes that the first block keeps for its backward pass, without parameters, and of its output."""
    block = replay.order[0]
    parameters = list(block.module.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = first_tensor(replay.output(0, 0))
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return sum(seen.values()), output.nbytes


def pruning_bytes(model: PreTrainedModel, layers: Sequence[Layer], tokens: int, memory: int) -> int:
    """Return about how many bytes pruning an offloaded model takes at most.

    Counted are the largest block, the Gram matrices of the widest layer, the largest group of layers with one input,
    the solver's memory, and states and tensors inside a block that stay on the device.

    Parameters
    ----------
    model : PreTrainedModel
    layers : sequence of Layer
        To prune.
    tokens : int
        Of the calibration and held out.
    memory : int
        Of the solver, as for `prune`.

    Returns
    -------
    int
        On a CPU with what the process has now.
    """
    found = find_blocks(model)
    blocks = (sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in found)
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        # Layers beside each other with inputs of one width mostly have the same.
        stacked = isinstance(layer, StackedLayer)
        groups.setdefault(layer if stacked else (layer.name.rpartition(".")[0], layer.shape[1]), []).append(layer)
    size = model.dtype.itemsize
    kept = states_bytes(model, size, tokens), inside_bytes(model, found, groups.values(), size, tokens)
    now = resident_bytes() if model.device.type == "cpu" else 0
    solution = gram_bytes(layers) + layer_bytes(groups.values()) + memory
    return now + max(blocks) + solution + sum(bytes for bytes in kept if stays(bytes, memory, model.device))


def gram_bytes(layers: Iterable[Layer]) -> int:
    """Return the bytes of the Gram matrices of one turn, at most, and of what a solution needs beside them.

    Parameters
    ----------
    layers : iterable of Layer
        To prune.
    """
    most, stacks = 0, Counter[object]()
    for layer in layers:
        rows, width = layer.shape
        most = max(most, 4 * (_GRAM_ARRAYS * width + rows) * width)  # beside them a sum with what the stream has lost
        if isinstance(layer, StackedLayer):
            stacks[layer.stack] += 4 * layer.shape[1] ** 2
    return max([most, *stacks.values()])


def layer_bytes(groups: Iterable[Sequence[Layer]]) -> int:
    """Return the bytes of weights, targets and residuals of layers that are solved together, at most.

    Parameters
    ----------
    groups : iterable of sequence of Layer
        Layers with one input.
    """
    return 4 * _LAYER_ARRAYS * max(group[0].shape[1] * sum(layer.shape[0] for layer in group) for group in groups)


def states_bytes(model: PreTrainedModel, itemsize: int, tokens: int) -> int:
    """Return the bytes of the states of all windows, in the dense and in the pruned model.

    Parameters
    ----------
    model : PreTrainedModel
    itemsize : int
        Bytes of a number.
    tokens : int
        Of all windows, held-out ones included.
    """
    return 2 * itemsize * tokens * _stream_width(model)


def inside_bytes(
    model: PreTrainedModel, blocks: Sequence[Block], groups: Iterable[Sequence[Layer]], itemsize: int, tokens: int
) -> int:
    """Return the bytes of the inputs and outputs inside a block that wait for a later turn, at most.

    Parameters
    ----------
    model : PreTrainedModel
    blocks : sequence of Block
    groups : iterable of sequence of Layer
        Layers with one input. Of experts nothing waits.
    itemsize : int
        Bytes of a number.
    tokens : int
        Of the calibration windows.
    """
    waiting = [group[0] for group in groups if not isinstance(group[0], StackedLayer)]
    widths = (sum(one.shape[1] for one in waiting if one.name.startswith(f"{block.name}.")) for block in blocks)
    return itemsize * tokens * (max(widths) + _STREAMS * _stream_width(model))


def _stream_width(model: PreTrainedModel) -> int:
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    return width if isinstance(width, int) else 0
