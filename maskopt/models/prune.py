"""Pruning a whole model, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.bounds import BoundKind
from maskopt.errors import MaskoptError, RankLostError
from maskopt.models.batches import data_settings, in_parts, prepare_all, share
from maskopt.models.calls import CallOrder
from maskopt.models.checks import check_model, move_model
from maskopt.models.edits import Edits
from maskopt.models.experts import StackedLayer, eager_experts
from maskopt.models.heap import trim
from maskopt.models.journal import data_hash, tensors_hash
from maskopt.models.keeping import Keeping
from maskopt.models.offload import Offload, offload_of
from maskopt.models.preparation import (
    OnError,
    Propagate,
    check_arguments,
    check_fit,
    masks_setting,
    propagation_of,
    require_calls,
    sets_of,
    stages_of,
    starting_masks,
    unreached,
)
from maskopt.models.proofs import Prover
from maskopt.models.ranks import current
from maskopt.models.recovering import RecoveryOfRun
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.report import PruneReport, circumstances
from maskopt.models.residual import Target
from maskopt.models.selection import select_layers
from maskopt.models.solving import Observer, Progress, Work
from maskopt.models.states import Place, Storage
from maskopt.models.windows import divided
from maskopt.oracles import MaskSet
from maskopt.recovery import Recovery
from maskopt.solvers import ContinuationFrankWolfe, Solver
from maskopt.weights import Joint

__all__ = ["CORRECTION", "Progress", "Propagate", "PruningError", "prune", "prune_layers"]

CORRECTION = 0.7
"""Strength of the correction of errors upstream.

Measured (benchmarks/correction.py): perplexity is lowest between .5 and .85. Errors of single layers against the dense
outputs say 1, on held-out windows, too: only the model shows it.
"""


class PruningError(MaskoptError):
    """Pruning failed after some layers were pruned, with ``on_error="keep"``.

    Attributes
    ----------
    report : PruneReport
        Of the layers that are pruned in the model: exactly the keys of ``report.masks``.
    """

    def __init__(self, sentence: str, report: PruneReport) -> None:
        super().__init__(sentence)
        self.report = report


def prune(
    model: PreTrainedModel,
    batches: Iterable[Any],
    masks: MaskSet | Plan,
    solver: Solver | None = None,
    *,
    propagate: Propagate | None = None,
    correction: float = CORRECTION,
    target: Target = "stream",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    start: Mapping[str, Tensor] | None = None,
    certify: BoundKind | None = None,
    certify_seconds: float | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    states: Place | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_error: OnError = "restore",
    recover: Recovery | None = None,
    held_out: Iterable[Any] | None = None,
    further: Iterable[Any] | None = None,
) -> PruneReport:
    """Choose a mask for every linear layer in a model's blocks and set the pruned weights to zero, in place.

    Where the solver updates the surviving weights (`maskopt.weights`), these are replaced.

    The blocks are pruned in order of execution. For each, the calibration batches run through the block, the Gram
    matrices of its layers' inputs are summed in float32 without padded positions, every layer is solved on its own,
    and the block runs again to compute the inputs of the next one. Only one block's Gram matrices exist at a time.
    After an error or an interrupt the model is as it was before, see `on_error`.

    Before the first block is pruned, batches run through the dense model until every layer to prune has been called.

    Parameters
    ----------
    model : PreTrainedModel
        Any transformers model whose blocks hold nn.Linear or Conv1D; **its weights are modified**. Mode, dtype
        and requires_grad stay as they are.
    batches : iterable of dict or Tensor
        Keyword arguments of the model's forward (``input_ids``, ``attention_mask``, ...) or tensors of token ids, shape
        (sequences, positions); pixels likewise for vision models. Positions where ``attention_mask`` is 0 are padding.
    masks : MaskSet or Plan
        The set of masks, the same for every layer, such as ``PerRow(keep=0.5)`` or ``NM(keep=2, group=4)``; or a plan
        with a sparsity for each layer to prune, see `allocate`.
    solver : Solver, optional
        ContinuationFrankWolfe() by default: masks alone. `maskopt.weights.ConditionalADMM()` updates weights as well.
    propagate : {"corrected", "pruned", "dense"}, optional
        The states on which a block is calibrated. "pruned": outputs of the pruned blocks before it. "dense": those of
        the dense model. "corrected": outputs of the pruned blocks, while the target is the layer's output in the
        dense model, see `LayerReconstruction.towards`. Layers within a block are then pruned one after the other, each
        on the outputs of those before it; this takes a multiple of the calibration time and a second copy of the
        states. By default "corrected" for solvers with `Solver.corrects` (`ContinuationFrankWolfe`, `LeastSquares`,
        `FISTAPruner`, `ConditionalADMM`), "pruned" for all others, with `certify`, and where a model's blocks cannot
        be run one at a time.
    correction : float
        With "corrected", how far the target moves from the layer's own output on its inputs (0) to the output in the
        dense model (1). In full, each layer spends its weights on making up for all before it.
    target : {"stream", "layer"}
        With "corrected", what layers aim at whose output is added to the residual stream: the dense model's stream
        behind them, so that they make up for what others before them have lost of it, or their own outputs alone. Which
        layers those are is found by running a block; where outputs are normed on their way there are none.
    include, exclude : sequence of str
        Patterns of `fnmatch` on full layer names, see `select_layers`. By default all linear layers inside the
        blocks are pruned. Layers outside the blocks come last.
    start : mapping of str to Tensor, optional
        A mask per layer to start from, as in ``report.masks``; other layers start from the solver's own choice.
    certify : {"shift", "sdp", "cuts"}, optional
        Prove for every layer a lower bound on the error of every mask, see `maskopt.bounds.mask_bound`; it is the
        record's `lower_bound`. Meant for layers of up to a few hundred inputs.
    certify_seconds : float, optional
        Time for the proofs of all layers together, divided in proportion to their cost. Rows that are not reached have
        the bound of the plain convex relaxation; a record's `unfinished_rows` counts those the time limit cut short.
    device : str or torch.device, optional
        Where the model is moved first (it stays there).
    memory : int
        Bytes of working memory for the solver; of what `states` keeps on the device; and of the Gram matrices of
        stacked layers (experts) that are calibrated at a time, as far as one fits.
    states : {"device", "host", "disk"}, optional
        Where the states of all batches wait, with the inputs and outputs inside a block that its later turns need. By
        default those that exceed an eighth of `memory`, and a sixth of what is free on an accelerator, move from there
        to the main memory, and from a CPU to temporary files.
    progress : callable, optional
        Called with a `Progress` before every batch and about once per iteration of a solver.
    on_error : {"restore", "keep"}
        What happens to the model after an error or an interrupt. "restore" gives all layers their dense weights back;
        the copy it needs takes as much main memory as the pruned layers (with ``propagate="dense"`` only at the end).
        "keep" needs no copy and leaves finished layers pruned: a MaskoptError is then a `PruningError` with the report
        of these layers, and any exception has a note with their names.
    recover : Recovery, optional
        Fit each block to the dense block's output once its layers are pruned, and then the model to the dense model's
        predictions, see `maskopt.recovery.Recovery`. Without `held_out`, an eighth of the windows to fit is held out.
    held_out : iterable of dict or Tensor, optional
        Batches on which nothing is chosen, such as ``calibration.apart(16)``: the error of every layer is measured on
        them as well, and recovery stops by them.
    further : iterable of dict or Tensor, optional
        Batches to fit blocks and the model to in place of those for the layers, such as ``calibration.apart(256)``.
        To windows of its own the same fit generalises better, because on those that layers were fitted to they look
        better than they are.

    Returns
    -------
    PruneReport
        Per-layer errors, the masks, and what was left dense.

    Raises
    ------
    MaskoptError
        If an argument is of the wrong type, there is nothing to prune or to calibrate with, a pattern matches nothing,
        the inputs of stacked matrices (experts) cannot be told apart, `masks` does not fit a layer, a plan has other
        layers than those to prune, the batches never call a layer, or weights or activations are not finite.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.models import calibration_batches, load_model, save_pruned
    >>> model, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=128)  # doctest: +SKIP
    >>> report = maskopt.prune(model, batches, maskopt.NM(keep=2, group=4))  # doctest: +SKIP
    >>> report.sparsity  # doctest: +SKIP
    0.5
    >>> save_pruned("pruned", model, tokenizer, report)  # doctest: +SKIP
    """
    return prune_layers(
        model,
        batches,
        masks,
        solver,
        propagate=propagate,
        correction=correction,
        target=target,
        include=include,
        exclude=exclude,
        start=start,
        certify=certify,
        certify_seconds=certify_seconds,
        device=device,
        memory=memory,
        states=states,
        progress=progress,
        on_error=on_error,
        recover=recover,
        held_out=held_out,
        further=further,
    )


def prune_layers(
    model: PreTrainedModel,
    batches: Iterable[Any],
    masks: MaskSet | Plan | Mapping[str, MaskSet],
    solver: Solver | None = None,
    *,
    propagate: Propagate | None = None,
    correction: float = CORRECTION,
    target: Target = "stream",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    start: Mapping[str, Tensor] | None = None,
    certify: BoundKind | None = None,
    certify_seconds: float | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    states: Place | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_error: OnError = "restore",
    recover: Recovery | None = None,
    held_out: Iterable[Any] | None = None,
    further: Iterable[Any] | None = None,
    observe: Observer | None = None,
) -> PruneReport:
    """Do the work of `prune`, for parts of this package that look at the layers' problems as well.

    Parameters
    ----------
    model, batches, masks, solver, propagate, correction, target, include, exclude, start, certify, certify_seconds
        As for `prune`.
    device, memory, states, progress, on_error, recover, held_out, further
        As for `prune`; `masks` may also be a set for each layer to prune, by name.
    observe : callable, optional
        Called with every layer, its problem and its result; layers are then solved one by one.

    Returns
    -------
    PruneReport
    """
    solver = ContinuationFrankWolfe() if solver is None else solver
    check_arguments(masks, solver, propagate, correction, target, on_error, progress, memory, recover, states)
    check_model(model)
    ranks = current()
    if ranks.count > 1 and (certify is not None or observe is not None):
        raise MaskoptError("Several ranks prune layer by layer; certify needs one process.")
    if certify is not None:
        if isinstance(solver, Joint):
            raise MaskoptError("certify proves bounds on masks whose weights stay; choose a solver that updates none.")
    elif certify_seconds is not None:
        raise MaskoptError("certify_seconds limits the time of the proofs that certify asks for; give both.")
    offload = offload_of(model)
    if offload is not None and recover is not None and recover.level == "model":
        raise MaskoptError("Fitting the whole model needs all its weights in memory; load it without offload.")
    if device is not None:
        move_model(model, device)
    selection = select_layers(model, include, exclude)
    sets = sets_of(selection.layers, masks)
    prover = None if certify is None else Prover(sets.values(), certify, certify_seconds, memory)
    # What a product of the model shows about stacked matrices comes first.
    check_fit({layer: each for layer, each in sets.items() if not isinstance(layer, StackedLayer)})
    starts = starting_masks(sets, {} if start is None else start)
    prepared = prepare_all(model, batches, held_out, None if recover is None else further)
    data = None if recover is None else divided(prepared, ranks.count)
    prepared = in_parts(prepared) if data is None else data.batches
    own = share(prepared, ranks.number, ranks.count)
    with evaluation_mode(model), eager_experts(model, selection.layers), Storage(memory, states) as storage:
        began = time.perf_counter()
        order = CallOrder(selection.blocks, selection.outside)
        with order:
            corrects = propagate == "corrected" or (propagate is None and solver.corrects and certify is None)
            replay = Replay(
                model,
                list(selection.blocks),
                prepared,
                storage,
                own,
                writing=corrects and target == "stream",
            )
            selection = selection.without(order.elsewise)
            stages = stages_of(replay, selection)
            require_calls(replay, order, stages)
        trim()
        check_fit({layer: sets[layer] for layer in selection.layers})
        # Oriented only now: the batches may have shown that stacked matrices are transposed.
        starts = {layer: layer.oriented(mask) for layer, mask in starts.items()}
        if propagate is None:
            propagate = "corrected" if corrects and replay.shortcut else "pruned"
        edits = Edits(on_error == "restore" and offload is None)
        by_block = recover is not None and (recover.level == "block" or (replay.shortcut and propagate != "dense"))
        if not by_block:
            replay.own = replay.seen  # a fit of the model alone runs the model itself
        propagation = propagation_of(propagate, by_block, model, replay, edits, order, stages, memory)
        report = PruneReport()
        report.settings = {
            "masks": masks_setting(masks),
            "solver": repr(solver),
            "propagate": propagate,
            **({"correction": correction, "target": target} if propagate == "corrected" else {}),
            **({} if recover is None else {"recover": repr(recover), "number_of_ranks": ranks.count}),
            **({} if data is None or further is None else {"further_tokens": data.tokens}),
            "include": list(include),
            "exclude": list(exclude),
            "warm_started_layers": sorted(layer.name for layer in starts),
            "block_by_block": replay.shortcut,
            **data_settings(prepared),
            **circumstances(model),
        }
        keeping = Keeping(model, replay, offload, edits, report, propagation, ranks)
        work = Work(
            sets,
            solver,
            starts,
            memory,
            progress,
            prover,
            stages,
            propagation,
            edits,
            keeping,
            correction,
            ranks,
            report,
            observe,
        )
        after = None
        if recover is not None and data is not None:
            after = RecoveryOfRun(model, replay, data.among(own), recover, work, edits, memory)
            work.recover = after.block if by_block else None
        report.calibration_seconds = time.perf_counter() - began
        keeping.begin(
            lambda: {
                **report.settings,
                "memory": memory,
                "certify": certify,
                "certify_seconds": certify_seconds,
                "plan": masks.to_json() if isinstance(masks, Plan) else None,
                "data": data_hash(prepared),
                "starting masks": tensors_hash({layer.name: mask for layer, mask in starts.items()}),
            }
        )
        with _restoring(edits, report, on_error, offload):
            work.run()
            if after is not None:
                after.model()
            work.done()
        keeping.end()
        ranks.end()
    report.left_dense = [*selection.left_dense, *unreached(replay, selection)]
    report.plan = masks if isinstance(masks, Plan) else None
    return report


@contextmanager
def _restoring(edits: Edits, report: PruneReport, on_error: OnError, offload: Offload | None) -> Iterator[None]:
    """Where the work fails, restore the model, or report exactly which layers are pruned."""
    try:
        yield
    except BaseException as error:
        edits.settle()
        names = [layer.name for layer in edits.applied]
        if on_error == "restore":
            edits.undo()
            if offload is not None:
                offload.reset()
            if names:
                error.add_note(f"The model is as it was: the {len(names)} layers pruned so far are dense again.")
            raise
        if not names:
            error.add_note("No layer of the model was pruned.")
            raise
        error.add_note(f"These {len(names)} layers of the model are pruned, all others are dense: {', '.join(names)}.")
        if not isinstance(error, MaskoptError) or isinstance(error, RankLostError):
            raise
        done = PruneReport(
            layers=[record for record in report.layers if record.name in set(names)],
            masks={name: report.masks[name] for name in names},
        )
        sentence = str(error).rstrip(".")
        raise PruningError(
            f"{sentence}; {len(names)} layers are pruned already and stay so, up to {names[-1]}, all others are dense.",
            done,
        ) from error
