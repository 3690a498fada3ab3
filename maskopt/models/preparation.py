"""What `prune` checks and decides before the first block: arguments, sets, starting masks, stages, calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.checks import choice, real, shown
from maskopt.errors import MaskoptError
from maskopt.models.calls import CallOrder
from maskopt.models.edits import Edits
from maskopt.models.experts import StackedLayer
from maskopt.models.layers import Layer
from maskopt.models.offload import offload_of
from maskopt.models.propagation import Accompanied, Corrected, Dense, Propagation, Pruned, Stage, last_uses
from maskopt.models.replay import Replay
from maskopt.models.residual import Target
from maskopt.models.selection import LeftDense, Selection
from maskopt.models.states import Place
from maskopt.oracles import MaskSet
from maskopt.recovery import Recovery
from maskopt.solvers.arguments import check_masks, check_memory, check_solver

__all__ = [
    "OnError",
    "Propagate",
    "check_arguments",
    "check_fit",
    "masks_setting",
    "propagation_of",
    "require_calls",
    "sets_of",
    "stages_of",
    "starting_masks",
    "unreached",
]

Propagate = Literal["corrected", "pruned", "dense"]
OnError = Literal["restore", "keep"]


def check_arguments(
    masks: object,
    solver: object,
    propagate: object,
    correction: object,
    target: object,
    on_error: object,
    progress: object,
    memory: object,
    recover: object,
    states: object,
) -> None:
    """Check the types and ranges of the arguments of `prune`, which have the same names."""
    if isinstance(masks, Mapping):
        for each in masks.values():
            check_masks(each)
    elif not isinstance(masks, Plan):
        check_masks(masks)
    check_solver(solver)
    for name, value, options, optional in (
        ("propagate", propagate, get_args(Propagate), True),
        ("target", target, get_args(Target), False),
        ("on_error", on_error, get_args(OnError), False),
        ("states", states, get_args(Place), True),
    ):
        if not choice(options, optional=optional).fits(value):
            raise MaskoptError(f"{name} must be one of {', '.join(options)}; got {shown(value)}.")
    if not real(0, 1).fits(correction):
        raise MaskoptError(f"correction must be a number between 0 and 1; got {shown(correction)}.")
    if recover is not None and not isinstance(recover, Recovery):
        raise MaskoptError(f"recover must be an object such as Recovery('block'); got {shown(recover)}.")
    if progress is not None and not callable(progress):
        raise MaskoptError(f"progress must be a function of one argument; got {shown(progress)}.")
    check_memory(memory)


def stages_of(replay: Replay, selection: Selection) -> list[Stage]:
    """Return the stages up to the last one that has layers to prune."""
    stages = [Stage(index, block.name, selection.blocks[block]) for index, block in enumerate(replay.order)]
    stages.append(Stage(None, "layers outside the blocks", selection.outside))
    while stages and not stages[-1].layers:
        stages.pop()
    if not stages:
        raise MaskoptError("The calibration batches do not run any of the blocks that hold layers to prune.")
    return stages


def require_calls(replay: Replay, order: CallOrder, stages: Sequence[Stage]) -> None:
    """Run further batches for layers, which experts may need, until every layer was called; fail if one never is."""

    def uncalled() -> list[str]:
        return [layer.name for stage in stages for layer in stage.layers if layer not in order]

    for index in range(replay.batches):
        if not uncalled():
            break
        if replay.purpose(index) == "layers":
            replay.run_whole(index)
    names = uncalled()
    if names:
        kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
        patterns = " and ".join(repr(kind) for kind in kinds[:8]) + (" ..." if len(kinds) > 8 else "")
        raise MaskoptError(
            f"The calibration batches never call {len(names)} of the layers to prune, such as {names[0]} (experts may "
            f"need more data, and some modules are never called); exclude {patterns} to leave them dense."
        )
    order.check()


def sets_of(layers: Sequence[Layer], masks: MaskSet | Plan | Mapping[str, MaskSet]) -> dict[Layer, MaskSet]:
    """Return the set of masks of each layer."""
    if isinstance(masks, MaskSet):
        return dict.fromkeys(layers, masks)
    if isinstance(masks, Mapping):
        return {layer: masks[layer.name] for layer in layers}
    planned = masks.masks({layer.name: layer.shape for layer in layers})
    return {layer: planned[layer.name] for layer in layers}


def masks_setting(masks: MaskSet | Plan | Mapping[str, MaskSet]) -> object:
    """Return what reports, and the settings that a resumed run must share, say of the sets."""
    if isinstance(masks, MaskSet):
        return repr(masks)
    if isinstance(masks, Plan):
        return f"{masks.patterns}, by the plan"
    return {name: repr(each) for name, each in masks.items()}


def check_fit(sets: Mapping[Layer, MaskSet]) -> None:
    """Check that sets fit the layers."""
    for layer, masks in sets.items():
        try:
            masks.check(layer.shape)
        except MaskoptError as error:
            raise MaskoptError(f"The masks do not fit the layer {layer.name}: {error}") from error


def starting_masks(layers: Iterable[Layer], start: Mapping[str, Tensor]) -> dict[Layer, Tensor]:
    """Return the starting masks by layer after a check, as the weights are stored."""
    if not isinstance(start, Mapping) or not all(isinstance(mask, Tensor) for mask in start.values()):
        raise MaskoptError(f"start must be a dict of boolean tensors by layer names; got {shown(start)}.")
    named = {layer.name: layer for layer in layers}
    for name, mask in start.items():
        if name not in named:
            raise MaskoptError(f"There is a starting mask for {name}, which is not a layer to prune.")
        expected = tuple(named[name].weight.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise MaskoptError(
                f"The starting mask of {name} must be boolean of shape {expected}; it is {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
    return {named[name]: mask for name, mask in start.items()}


def unreached(replay: Replay, selection: Selection) -> list[LeftDense]:
    """Return the layers of blocks that the batches never reach, such as the vision part of a model fed with text."""
    reached = set(replay.order)
    return [
        LeftDense(
            layer.name if isinstance(layer, StackedLayer) else f"{layer.name}.weight",
            tuple(layer.weight.shape),
            f"{block.name} is not run by these batches",
        )
        for block, layers in selection.blocks.items()
        if block not in reached
        for layer in layers
    ]


def propagation_of(
    kind: Propagate,
    by_block: bool,
    model: PreTrainedModel,
    replay: Replay,
    edits: Edits,
    order: CallOrder,
    stages: Sequence[Stage],
    memory: int,
) -> Propagation:
    """Return what runs the blocks; with `by_block` it knows the dense model's states, too."""
    if kind == "dense":
        if by_block:
            raise MaskoptError("Blocks are fitted behind pruned ones; use propagate='corrected' or 'pruned'.")
        if offload_of(model) is not None and not replay.shortcut:
            raise MaskoptError(
                f"The blocks of {type(model).__name__} cannot be run one at a time, so that they have to be in memory "
                f"for propagate='dense'; load the model without offload, or use propagate='pruned'."
            )
        return Dense(replay, edits, last_uses(model, replay, stages), memory)
    if kind == "pruned" and not by_block:
        return Pruned(replay, edits, memory)
    if not replay.shortcut:
        raise MaskoptError(
            f"The blocks of {type(model).__name__} cannot be run one at a time, so its dense states are "
            f"lost once blocks are pruned; use {'recover at the level ' if by_block else 'propagate='}"
            f"{'model' if by_block else 'pruned'!r}."
        )
    chosen = Corrected if kind == "corrected" else Accompanied
    return chosen(replay, edits, order, last_uses(model, replay, stages), memory)
