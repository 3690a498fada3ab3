"""Recovering a model that is pruned already, by us or by others, beside the dense one."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.checks import shown
from maskopt.errors import MaskoptError
from maskopt.models.batches import data_settings, prepare_all, share
from maskopt.models.blocks import find_blocks
from maskopt.models.calls import CallOrder
from maskopt.models.checks import check_model
from maskopt.models.experts import eager_experts
from maskopt.models.layers import Layer
from maskopt.models.ranks import current
from maskopt.models.recovery import Recoverer, predictions
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.report import RecoveryReport, circumstances
from maskopt.models.selection import select_layers
from maskopt.models.windows import divided
from maskopt.oracles import NM, MaskSet, PerRow, Unstructured
from maskopt.recovery import Recovery
from maskopt.solvers.arguments import check_memory

__all__ = ["recognised", "recover"]

_FULL = 0.98  # mean count of kept entries in groups over the largest, from which on a pattern is recognised


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Any],
    recovery: Recovery | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    memory: int = 2**30,
    progress: Callable[[str, float], object] | None = None,
    held_out: Iterable[Any] | None = None,
) -> RecoveryReport:
    """Fit a pruned model to the dense one, in place, block by block and then as a whole.

    Zeros stay zeros, up to exchanges of kept and pruned weights within each layer's pattern (`recognised`), which
    `Recovery.rule` decides. A block, or the model, changes only where that lowers the loss on calibration windows that
    are held out. `prune` does the same with its argument `recover`, without a second model in memory, and its later
    blocks know the recovered ones.

    Parameters
    ----------
    model : PreTrainedModel
        Pruned, or with blocks that have become narrower (`maskopt.shrink`, `drop_experts`); **its weights are
        modified**.
    dense : PreTrainedModel
        What it was made of.
    batches : iterable of dict or Tensor
        As for `prune`; at least two windows. Those that the layers were pruned on serve worse than others, because on
        them layers look better than they are.
    recovery : Recovery, optional
        Settings.
    masks : mapping of str to Tensor, optional
        Masks by layer name, boolean, True = kept, such as `load_masks` returns. By default what is not zero is kept.
    include, exclude : sequence of str
        As for `prune`: the layers that may be masked.
    memory : int
        Bytes for the dense model's predictions.
    progress : callable, optional
        Called with what is fitted and the fraction of all work done.
    held_out : iterable of dict or Tensor, optional
        As for `prune`; an eighth of the windows by default.

    Returns
    -------
    RecoveryReport

    Raises
    ------
    MaskoptError
        If the models differ in more than narrower blocks, no layer of one as wide has a zero, a mask does not fit, or
        the data does not.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.models import calibration_batches, load_model
    >>> dense, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> model, _ = load_model("pruned")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=128)  # doctest: +SKIP
    >>> report = maskopt.recover(model, dense, batches, maskopt.Recovery("model"))  # doctest: +SKIP
    """
    settings = Recovery() if recovery is None else recovery
    if not isinstance(settings, Recovery):
        raise MaskoptError(f"recovery must be an object such as Recovery('block'); got {shown(settings)}.")
    check_memory(memory)
    check_model(model)
    check_model(dense)
    narrower = _is_narrower(model, dense)
    selection = select_layers(model, include, exclude)
    chosen = _masks({layer.name: layer for layer in selection.layers}, masks, needed=not narrower)
    ranks = current()
    data = divided(prepare_all(model, batches, held_out), ranks.count)
    own = share(data.batches, ranks.number, ranks.count)
    mine = data.among(own)
    report = RecoveryReport(masks=chosen)
    began = time.perf_counter()
    with evaluation_mode(model), evaluation_mode(dense), eager_experts(model, selection.layers):
        with CallOrder(selection.blocks, selection.outside) as order:  # shows how stacked matrices are oriented
            replay = Replay(model, list(selection.blocks), data.batches, own=own)
        selection = selection.without(order.elsewise)
        layers = [layer for layer in selection.layers if layer.name in chosen]
        sets = {layer: recognised(layer.oriented(chosen[layer.name])) for layer in layers}
        beside = Replay(dense, list(select_layers(dense, include, exclude).blocks), data.batches, own=own)
        target = predictions(dense, mine, memory) if settings.level == "model" else None
        by_block = replay.shortcut and beside.shortcut
        if target is None and not by_block:
            raise MaskoptError(
                f"The blocks of {type(model).__name__} cannot be run one at a time; use the level 'model'."
            )
        # Over the same windows the model takes about the time of all blocks.
        whole = max(1, len(replay.order))
        parts = (len(replay.order) if by_block else 0) + (0 if target is None else whole)
        done = 0

        def tell(name: str, fraction: float) -> None:
            weight = whole if name == "model" else 1
            if progress is not None:
                progress(name, (done + weight * fraction) / parts)

        recoverer = Recoverer(model, replay, mine, settings, sets, chosen, tell, ranks)
        for position, block in enumerate(replay.order if by_block else ()):
            beside.run(position, store=True)
            inner = [layer for layer in selection.blocks[block] if layer in sets]

            def outputs(index: int, position: int = position) -> Tensor:
                return beside.state(position, index)

            report.recovery += recoverer.fit_block(position, inner, outputs)
            replay.run(position, store=True)
            done += 1
        if target is not None:
            report.recovery += recoverer.fit_model(target)
        ranks.end()
    report.seconds = time.perf_counter() - began
    report.settings = {
        "recover": repr(settings),
        "number_of_ranks": ranks.count,
        **data_settings(data.batches),
        **circumstances(model),
    }
    return report


def recognised(mask: Tensor) -> MaskSet:
    """Return the set of masks that a mask is probably of: N:M, per row, or the whole matrix.

    Parameters
    ----------
    mask : Tensor
        Boolean, shape (rows, d).

    Returns
    -------
    MaskSet
        N:M in groups of 4, 8 or 16 where nearly all groups keep N entries and none keeps more; else per row where
        nearly all rows keep as many as the fullest; else the whole matrix.

    Examples
    --------
    >>> import torch
    >>> recognised(torch.tensor([[True, False, True, False], [False, True, True, False]]))
    NM(keep=2, group=4)
    """
    rows, columns = mask.shape
    for group in (4, 8, 16):
        if columns % group == 0 and (group < columns or group == 4):
            counts = mask.reshape(rows, -1, group).sum(2)
            most = int(counts.max())
            if 0 < most < group and float(counts.float().mean()) >= _FULL * most:
                return NM(keep=most, group=group)
    counts = mask.sum(1)
    most = int(counts.max())
    if float(counts.float().mean()) >= _FULL * most:
        return PerRow(most)
    return Unstructured(int(mask.sum()))


def _is_narrower(model: PreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether a model's blocks have smaller matrices than those of the dense one, which it must otherwise equal.

    Raises
    ------
    MaskoptError
        If the models differ in another way.
    """
    if model is dense:
        raise MaskoptError("The pruned and the dense model are one object; load the dense one beside it.")
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    other = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    if own == other:
        return False
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    for name in (*own, *other):
        one, two = own.get(name, ()), other.get(name, ())
        narrower = name.startswith(inside) and len(one) == len(two) > 0 and all(map(operator.le, one, two))
        if one != two and not narrower:
            if one and two:
                how = f"{name} has the shape {one} in the first and {two} in the second"
            else:
                how = f"the {'second' if one else 'first'} has no {name}"
            raise MaskoptError(
                f"The pruned and the dense model do not belong together: {how}; what is fitted has the dense model's "
                f"blocks, with weights pruned or made narrower."
            )
    return True


def _masks(layers: Mapping[str, Layer], given: Mapping[str, Tensor] | None, *, needed: bool) -> dict[str, Tensor]:
    """Return the masks of the layers that have one, on the CPU; `needed` if there must be any."""
    if given is None:
        kept = {name: (layer.weight.detach() != 0).cpu() for name, layer in layers.items()}
        found = {name: mask for name, mask in kept.items() if not bool(mask.all())}
        if not found and needed:
            raise MaskoptError("No layer of the model has a zero, so there is nothing to recover from.")
        return found
    for name, mask in given.items():
        if name not in layers:
            raise MaskoptError(f"There is a mask for {name}, which is not a layer of the model's blocks.")
        weight = layers[name].weight
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            raise MaskoptError(f"The mask of {name} must be boolean of shape {tuple(weight.shape)}; got {shown(mask)}.")
        if bool((weight.detach().cpu() != 0).logical_and(~mask.cpu()).any()):
            raise MaskoptError(f"The mask of {name} prunes weights that are not zero in the model.")
    return {name: mask.cpu() for name, mask in given.items()}
