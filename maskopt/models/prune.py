"""Pruning a whole model, one block at a time."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.bounds import BoundKind, check_bound, mask_bound
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, prepare_batches
from maskopt.models.gram import DenseInputs, Gram, GramCollector
from maskopt.models.layers import Layer
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.report import LayerRecord, PruneReport
from maskopt.models.selection import LeftDense, Selection, select_layers
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers import ContinuationFrankWolfe, GapKind, Result, Solver, State, solve
from maskopt.solvers.arguments import check_masks, check_solver
from maskopt.weights import ConditionalADMM, FISTAPruner, Joint, LeastSquares

__all__ = ["Progress", "prune"]

Propagate = Literal["corrected", "pruned", "dense"]

_CORRECTING = (ContinuationFrankWolfe, LeastSquares, FISTAPruner, ConditionalADMM)


@dataclass(frozen=True)
class Progress:
    """Where `prune` is: sent before every step, about once per iteration of a solver, and at the end ("done")."""

    stage: Literal["calibrate", "solve", "certify", "done"]
    name: str
    """The block being run, or the layer being solved (several, joined by commas, where they read the same input)."""
    done: int
    """Layers that have their mask."""
    total: int
    """Layers to prune, known from the start."""
    fraction: float = 0.0
    """Fraction of the current layer's solution that is done; an estimate."""


def prune(
    model: PreTrainedModel,
    batches: Iterable[Any],
    masks: MaskSet,
    solver: Solver | None = None,
    *,
    propagate: Propagate | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    start: Mapping[str, Tensor] | None = None,
    certify: BoundKind | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    progress: Callable[[Progress], object] | None = None,
) -> PruneReport:
    """Choose a mask for every linear layer in a model's blocks and set the pruned weights to zero, in place.

    Where the solver moves the surviving weights too (`maskopt.weights`), these are replaced.

    Block by block, in order of execution: the calibration batches run through the block, the Gram matrices of its
    layers' inputs are summed in float32 without padded positions, every layer is solved on its own, and the
    block runs again to make the next one's inputs. Only one block's Gram matrices exist at a time. Should an error or
    an interrupt stop it, what is already done stays pruned (with ``propagate="dense"``: nothing is).

    Parameters
    ----------
    model : PreTrainedModel
        Any transformers model whose blocks hold nn.Linear or Conv1D; **its weights are modified**. Mode, dtype
        and requires_grad stay as they are.
    batches : iterable of dict or Tensor
        Keyword arguments of the model's forward (``input_ids``, ``attention_mask``, ...) or tensors of token ids, shape
        (sequences, positions); pixels likewise for vision models. Positions where ``attention_mask`` is 0 are padding.
    masks : MaskSet
        The set of masks, the same for every layer, such as ``PerRow(keep=0.5)`` or ``NM(keep=2, group=4)``.
    solver : Solver, optional
        ContinuationFrankWolfe() by default: masks alone. `maskopt.weights.ConditionalADMM()` moves weights as well.
    propagate : {"corrected", "pruned", "dense"}
        Whether a block is calibrated on what the pruned blocks before it give out, or on the dense model's states; or
        ("corrected") on the former, aiming at the outputs of the dense model on the latter: see
        `LayerReconstruction.towards`. Layers within a block are then pruned one after the other, each on what those
        before it give out; it takes a multiple of the calibration time and a second copy of the states. By default
        "corrected" for our own methods and what was published so (`ContinuationFrankWolfe`, `LeastSquares`,
        `FISTAPruner`, `ConditionalADMM`), "pruned" for all others, with `certify`, and where a model's blocks cannot
        be run one at a time.
    include, exclude : sequence of str
        Patterns of `fnmatch` on full layer names, see `select_layers`. By default all linear layers inside the
        blocks are pruned. Layers outside the blocks come last.
    start : mapping of str to Tensor, optional
        A mask per layer to start from, as in ``report.masks``; layers without one start afresh.
    certify : {"shift", "sdp", "cuts"}, optional
        Prove for every layer how small the error of any mask could be, see `maskopt.bounds.mask_bound`; the record's
        `lower_bound`. Meant for layers of up to a few hundred inputs.
    device : str or torch.device, optional
        Move the model there first (it stays there).
    memory : int
        Bytes of working memory for the solver.
    progress : callable, optional
        Called with a `Progress` whenever there is some.

    Returns
    -------
    PruneReport
        Per-layer errors, the masks, and what was left dense.

    Raises
    ------
    MaskoptError
        If there is nothing to prune or to calibrate with, a pattern matches nothing, expert weights are neither
        pruned nor excluded, `masks` does not fit a layer, or activations are not finite.
    """
    if propagate is not None and propagate not in get_args(Propagate):
        raise MaskoptError(f"propagate must be one of {', '.join(get_args(Propagate))}; got {propagate!r}.")
    check_masks(masks)
    check_solver(solver, optional=True)
    solver = ContinuationFrankWolfe() if solver is None else solver
    if certify is not None:
        if isinstance(solver, Joint):
            raise MaskoptError("certify proves bounds on masks whose weights stay; choose a solver that moves none.")
        check_bound(masks, certify)
    if device is not None:
        model.to(device)
    selection = select_layers(model, include, exclude)
    starts = _check_fit(selection.layers, masks, start or {})
    prepared = prepare_batches(model, batches)
    with evaluation_mode(model):
        began = time.perf_counter()
        replay = Replay(model, list(selection.blocks), prepared)
        dense = None
        if propagate is None:
            corrects = isinstance(solver, _CORRECTING) and certify is None and replay.shortcut
            propagate = "corrected" if corrects else "pruned"
        if propagate == "corrected":
            if not replay.shortcut:
                raise MaskoptError(
                    f"The blocks of {type(model).__name__} cannot be run one at a time, so its dense states are "
                    "lost once blocks are pruned; use propagate='pruned'."
                )
            dense = replay.dense_copy()
        work = _Work(masks, solver, starts, memory, progress, propagate, certify, _stages(replay, selection))
        work.report.calibration_seconds = time.perf_counter() - began
        work.run(replay, dense)
    work.report.left_dense = [*selection.left_dense, *_unreached(replay, selection)]
    work.report.settings = {
        "masks": repr(masks),
        "solver": repr(solver),
        "propagate": propagate,
        "include": list(include),
        "exclude": list(exclude),
        "warm_started_layers": sorted(layer.name for layer in starts),
        "block_by_block": replay.shortcut,
        **_data(prepared),
        **_circumstances(model),
    }
    return work.report


@dataclass(frozen=True)
class _Stage:
    """One turn of the loop: a block by its position in the order of execution, or (None) all that lies outside."""

    position: int | None
    name: str
    layers: tuple[Layer, ...]


def _stages(replay: Replay, selection: Selection) -> list[_Stage]:
    """Return the turns up to the last one that has layers to prune."""
    stages = [_Stage(index, block.name, selection.blocks[block]) for index, block in enumerate(replay.order)]
    stages.append(_Stage(None, "layers outside the blocks", selection.outside))
    while stages and not stages[-1].layers:
        stages.pop()
    if not stages:
        raise MaskoptError("The calibration batches do not run any of the blocks that hold layers to prune.")
    return stages


_Solved = tuple[LayerRecord, Tensor, Tensor | None]


@dataclass
class _Work:
    """The loop over the blocks and what it needs."""

    masks: MaskSet
    solver: Solver
    starts: Mapping[Layer, Tensor]
    memory: int
    progress: Callable[[Progress], object] | None
    propagate: Propagate
    certify: BoundKind | None
    stages: Sequence[_Stage]
    report: PruneReport = field(default_factory=PruneReport)
    solved: dict[Layer, _Solved] = field(default_factory=dict)
    moved: dict[Layer, Tensor] = field(default_factory=dict)
    """New weights that wait for being applied, as the layers store theirs."""
    originals: dict[Layer, Tensor] = field(default_factory=dict)
    """Dense weights of the layers of the current stage that are pruned already."""

    def run(self, replay: Replay, beside: Replay | None) -> None:
        """Prune stage by stage; `beside` has the dense model's states where they are aimed at."""
        dense = self.propagate == "dense"
        for stage in self.stages:
            self._tell("calibrate", stage.name)
            turns = [stage.layers] if stage.layers else []
            if beside is not None and stage.layers:
                turns = self._turns(replay, stage)
            for turn in turns:
                if beside is None:
                    grams = self._collect(replay, stage, turn)
                else:
                    grams = self._pair(replay, beside, stage, turn, store=turn is turns[-1])
                for layers in self._together(turn, grams):
                    self._solve(layers, grams[layers[0]])
                del grams  # before the next turn's come into being
                for layer in turn:
                    record, self.report.masks[layer.name], weight = self.solved.pop(layer)
                    self.report.layers.append(record)
                    if weight is not None:
                        self.moved[layer] = weight
                if not dense:
                    if beside is not None:
                        self.originals.update((layer, layer.weight.data.clone()) for layer in turn)
                    self._apply(turn)
            self.originals.clear()
            if stage is not self.stages[-1] and not (stage.layers and dense):
                self._timed(replay, stage, store=True)
                if beside is not None and not stage.layers:
                    self._timed(beside, stage, store=True)
        if dense:
            for stage in self.stages:
                self._apply(stage.layers)
        self._tell("done", "")

    def _collect(self, replay: Replay, stage: _Stage, layers: Sequence[Layer]) -> GramCollector:
        """Run a stage's block, still dense, and return the second moments of what its layers see."""
        with GramCollector(layers) as grams:
            self._timed(replay, stage, store=self.propagate == "dense", before=grams.begin)
        return grams

    def _pair(
        self, replay: Replay, beside: Replay, stage: _Stage, layers: Sequence[Layer], *, store: bool
    ) -> GramCollector:
        """Run a stage's block as pruned so far and as it was, batch by batch, and return moments with cross terms."""
        inputs = DenseInputs(layers)
        grams = GramCollector(layers, inputs)
        for index in range(replay.batches):
            with self._as_it_was(), inputs:
                self._timed(beside, stage, store=store, indices=[index])
            with grams:
                self._timed(replay, stage, before=grams.begin, indices=[index])
            inputs.clear()
        return grams

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Give the layers that were pruned in this stage their dense weights for a while."""
        pruned = {layer: layer.weight.data for layer in self.originals}
        for layer, weight in self.originals.items():
            layer.weight.data = weight
        try:
            yield
        finally:
            for layer, weight in pruned.items():
                layer.weight.data = weight

    def _turns(self, replay: Replay, stage: _Stage) -> list[tuple[Layer, ...]]:
        """Return a stage's layers in the order of their calls, together where they see the same or are of one kind.

        Errors of the first are then in the inputs of the next, which can make up for them. Layers of one kind are
        those whose names differ in numbers only, such as experts: turns of their own would take as many runs.
        """
        with GramCollector(stage.layers) as grams:
            self._timed(replay, stage, before=grams.begin, indices=[0])
        turns: dict[str, list[Layer]] = {}
        for group in grams.order():
            kind = re.sub(r"\d+", "#", group[0].name)
            turns.setdefault(kind, []).extend(group)
        seen = {layer for turn in turns.values() for layer in turn}
        left = tuple(layer for layer in stage.layers if layer not in seen)
        return [*map(tuple, turns.values()), *([left] if left else [])]

    def _timed(self, replay: Replay, stage: _Stage, **options: Any) -> None:
        began = time.perf_counter()
        replay.run(stage.position, **options)
        self.report.calibration_seconds += time.perf_counter() - began

    def _apply(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            layer.apply(self.report.masks[layer.name], self.moved.pop(layer, None))

    def _together(self, layers: Sequence[Layer], grams: GramCollector) -> list[list[Layer]]:
        """Group the layers that read the same input, where stacking their rows changes nothing but the speed."""
        same_for_any_rows = self.masks.separable and self.masks.rows(slice(None), layers[0].shape) is self.masks
        if not (same_for_any_rows and self.solver.solves_rows_apart(self.masks)):
            return [[layer] for layer in layers]
        groups: dict[tuple[int, torch.device, bool], list[Layer]] = {}
        for layer in layers:
            key = id(grams[layer]), layer.weight.device, layer in self.starts
            groups.setdefault(key, []).append(layer)
        return list(groups.values())

    def _solve(self, layers: Sequence[Layer], gram: Gram) -> None:
        """Choose the masks of layers with one Gram matrix and write their records."""
        name = ", ".join(layer.name for layer in layers)
        self._tell("solve", name)
        began = time.perf_counter()

        def tell(state: State) -> None:
            self._tell("solve", name, state.fraction)

        # The Gram is a sum of x x^T whose diagonal was checked, and so was the weight: no need to factorise it.
        weight = torch.cat([layer.oriented(layer.weight.detach()) for layer in layers])
        matrix = gram.matrix.to(weight.device)
        if gram.cross is None:
            problem = LayerReconstruction(weight, matrix, gram.tokens, check=False)
        else:
            problem = LayerReconstruction.towards(weight, matrix, gram.cross.to(weight.device), gram.tokens)
        start = torch.cat([self.starts[layer] for layer in layers]) if layers[0] in self.starts else None
        try:
            result = solve(
                problem,
                self.masks,
                self.solver,
                start=start,
                callback=None if self.progress is None else tell,
                memory=self.memory,
            )
        except MaskoptError as error:
            raise MaskoptError(f"The layer {name} cannot be solved: {error}") from error
        self.report.solve_seconds += time.perf_counter() - began
        if self.certify is not None:
            self._tell("certify", name)
            bound = mask_bound(problem, self.masks, self.certify, memory=self.memory)
            result = replace(result, lower_bound=bound, gap_kind=GapKind.PROVEN)
        first = 0
        for layer in layers:
            part = result if len(layers) == 1 else result.part(slice(first, first + layer.shape[0]))
            first += layer.shape[0]
            mask = layer.oriented(part.mask).cpu().contiguous()
            # In the layer's own type: it is rounded to that in any case, and waits for the end where nothing is.
            moved = None if part.weight is None else layer.oriented(part.weight).to(layer.weight.dtype)
            self.solved[layer] = _record(layer, gram, part), mask, moved

    def _tell(self, stage: Literal["calibrate", "solve", "certify", "done"], name: str, fraction: float = 0.0) -> None:
        if self.progress is not None:
            total = sum(len(turn.layers) for turn in self.stages)
            done = len(self.report.layers) + len(self.solved)
            self.progress(Progress(stage, name, done, total, fraction))


def _check_fit(layers: Sequence[Layer], masks: MaskSet, start: Mapping[str, Tensor]) -> dict[Layer, Tensor]:
    """Refuse misfits before any work; return the starting masks as (rows, d)."""
    named = {layer.name: layer for layer in layers}
    for layer in layers:
        try:
            masks.check(layer.shape)
        except MaskoptError as error:
            raise MaskoptError(f"The masks do not fit the layer {layer.name}: {error}") from error
    for name, mask in start.items():
        if name not in named:
            raise MaskoptError(f"There is a starting mask for {name}, which is not a layer to prune.")
        expected = tuple(named[name].weight.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise MaskoptError(
                f"The starting mask of {name} must be boolean of shape {expected}; it is {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
    return {named[name]: named[name].oriented(mask.to(named[name].weight.device)) for name, mask in start.items()}


def _record(layer: Layer, gram: Gram, result: Result) -> LayerRecord:
    rows, columns = layer.shape
    nonzeros = int(result.mask.sum())
    return LayerRecord(
        name=layer.name,
        rows=rows,
        columns=columns,
        relative_error=result.relative_error,
        kept_error=result.kept_error,
        objective=result.total,
        lower_bound=None if result.lower_bound is None else float(result.lower_bound.sum()),
        gap_kind=result.gap_kind.name,
        sparsity=result.sparsity,
        nonzeros=nonzeros,
        tokens=gram.tokens,
        iterations=result.iterations,
        seconds=result.seconds,
        status=result.status.name,
    )


def _unreached(replay: Replay, selection: Selection) -> list[LeftDense]:
    """Account for blocks that the batches never reach, such as the vision tower of a model fed with text."""
    reached = set(replay.order)
    return [
        LeftDense(f"{layer.name}.weight", tuple(layer.weight.shape), f"{block.name} is not run by these batches")
        for block, layers in selection.blocks.items()
        if block not in reached
        for layer in layers
    ]


def _data(batches: Sequence[Batch]) -> dict[str, Any]:
    return {
        "batches": len(batches),
        "sequences": sum(batch.shape[0] for batch in batches),
        "longest_sequence": max(batch.shape[1] for batch in batches),
        "calibration_tokens": sum(batch.tokens for batch in batches),
    }


def _circumstances(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
