"""Choosing the masks of a model's layers, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.models.edits import Edits
from maskopt.models.gram import Gram, GramCollector
from maskopt.models.heap import trim
from maskopt.models.jobs import Job, Solved, jobs_of
from maskopt.models.keeping import Keeping
from maskopt.models.layers import Layer
from maskopt.models.proofs import Prover
from maskopt.models.propagation import Propagation, Stage
from maskopt.models.ranks import Ranks
from maskopt.models.report import LayerRecord, PruneReport
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers import GapKind, Result, Solver, State, solve_parts

__all__ = ["BlockFit", "Observer", "Progress", "Work"]


@dataclass(frozen=True)
class Progress:
    """Progress of `prune`: sent before every batch, about once per iteration of a solver or proof, and at the end.

    Attributes
    ----------
    stage : {"calibrate", "solve", "certify", "recover", "done"}
    name : str
        The block being run or fitted, or the layer being solved (several, joined by commas, where they have the same
        input); "model" where the whole model is fitted.
    done : int
        Layers that have their mask.
    total : int
        Layers to prune, known from the start.
    fraction : float
        Fraction of the current solution, proof or fit that is done; an estimate.
    """

    stage: Literal["calibrate", "solve", "certify", "recover", "done"]
    name: str
    done: int
    total: int
    fraction: float = 0.0


BlockFit = Callable[[Stage, Callable[[int], Tensor]], object]
"""Called with the stage of a block whose layers are pruned, and the dense block's output on the batch of an index."""

Observer = Callable[[Layer, LayerReconstruction, Result], object]
"""Called with a layer, its problem and its result."""

_Chosen = tuple[LayerRecord, Tensor, Tensor | None]


@dataclass
class Work:
    """The loop over the stages.

    Parameters
    ----------
    masks : mapping of Layer to MaskSet
        The set of each layer.
    solver, memory, progress
        As for `prune`.
    starts : mapping of Layer to Tensor
        Starting masks, (rows, d).
    prover : Prover or None
        Proves bounds of every layer.
    stages : sequence of Stage
        In order of execution.
    propagation : Propagation
        Runs the blocks.
    edits : Edits
        Receives the chosen masks and weights.
    keeping : Keeping
        Brings blocks into memory and writes finished ones.
    correction : float
        As for `prune`.
    ranks : Ranks
        The processes that share the work.
    report : PruneReport
        Extended layer by layer.
    observe : callable or None
        Called with every layer, its problem and its result; layers are then solved one by one.
    recover : callable or None
        Called with every block once its layers are pruned.
    solved : dict
        Records, masks and weights of layers solved together with an earlier one, until their turn.
    """

    masks: Mapping[Layer, MaskSet]
    solver: Solver
    starts: Mapping[Layer, Tensor]
    memory: int
    progress: Callable[[Progress], object] | None
    prover: Prover | None
    stages: Sequence[Stage]
    propagation: Propagation
    edits: Edits
    keeping: Keeping
    correction: float
    ranks: Ranks
    report: PruneReport = field(default_factory=PruneReport)
    observe: Observer | None = None
    recover: BlockFit | None = None
    solved: dict[Layer, _Chosen] = field(default_factory=dict)

    def run(self) -> None:
        """Prune stage by stage."""
        if self.prover is not None:
            self.prover.plan(layer.shape for stage in self.stages for layer in stage.layers)
        self.propagation.means = self.solver.needs_mean
        self.propagation.before_batch = lambda stage: self._tell("calibrate", stage.name)
        for number, stage in enumerate(self.stages):
            finished = self.keeping.enter(stage, number)
            if finished is None:
                self._prune(stage)
            else:
                self.propagation.repeat(stage)
                values = self.keeping.repeat(stage, number, finished)
                for turn in self.propagation.turns(stage):
                    self.propagation.chosen(turn)
                self.keeping.complete(stage, values)
            if stage is self.stages[-1]:
                self.propagation.finish()
            else:
                self.propagation.leave(stage)
            trim()
            self.keeping.leave(stage, number, finished)

    def _prune(self, stage: Stage) -> None:
        """Choose and apply the masks of a stage's layers, and fit its block where that is asked for."""
        for turn in self.propagation.turns(stage):
            self._choose(turn, self.propagation.collect(stage, turn))
            trim()
            for layer in turn:
                record, mask, weight = self.solved.pop(layer)
                self.report.masks[layer.name] = mask
                self.report.layers.append(record)
                self.edits.choose(layer, mask, weight)
            self.propagation.chosen(turn)
        if self.recover is not None and stage.layers and stage.position is not None:
            began = time.perf_counter()
            self.recover(stage, self.propagation.dense_outputs(stage))
            self.report.recovery_seconds += time.perf_counter() - began

    def done(self) -> None:
        """Tell that all work is done."""
        self._tell("done", "")

    def recovering(self, name: str, fraction: float) -> None:
        """Tell that a block, or the model, is being fitted."""
        self._tell("recover", name, fraction)

    def _choose(self, turn: Sequence[Layer], grams: GramCollector) -> None:
        """Solve the layers of a turn, here and in the other processes, and store the records of all."""
        grams.agree(self.ranks)
        groups = [jobs_of(layers, apart) for layers, apart in self._together(turn, grams)]
        places = iter(self.ranks.spread([job.cost for jobs in groups for job in jobs]))
        placed = [[(job, next(places)) for job in jobs] for jobs in groups]
        wanted: dict[Layer, set[int]] = {}
        for jobs in placed:
            for job, place in jobs:
                wanted.setdefault(grams.leader(job.layers[0]), set()).add(place)
        grams.gather(self.ranks, {leader: sorted(each) for leader, each in wanted.items()})
        solved: dict[Job, Solved] = {}
        for jobs in placed:
            own = [job for job, place in jobs if place == self.ranks.number]
            if own:
                solved.update(self._solve(own, grams[own[0].layers[0]]))
            if self.ranks.count == 1:
                self._store([solved.pop(job) for job in own], own[0].layers)
        if self.ranks.count == 1:
            return
        began = time.perf_counter()
        for jobs in placed:
            parts = []
            for job, place in jobs:
                mine = solved.pop(job, None)
                parts.append(Solved.received(self.ranks.spoken(() if mine is None else mine.content, place)))
            self._store(parts, jobs[0][0].layers)
        self.report.solve_seconds += time.perf_counter() - began

    def _together(self, layers: Sequence[Layer], grams: GramCollector) -> list[tuple[list[Layer], bool]]:
        """Group layers with the same input where stacking their rows changes the speed only, and say where it does."""
        groups: dict[object, tuple[list[Layer], bool]] = {}
        for layer in layers:
            masks, leader = self.masks[layer], grams.leader(layer)
            same_for_any_rows = masks.separable and masks.rows(slice(None), layer.shape) is masks
            apart = self.observe is None and same_for_any_rows and self.solver.solves_rows_apart(masks)
            key: object = (id(masks), leader, layer.weight.device, layer in self.starts) if apart else layer
            groups.setdefault(key, ([], apart and self.prover is None))[0].append(layer)
        return list(groups.values())

    def _solve(self, jobs: Sequence[Job], gram: Gram) -> dict[Job, Solved]:
        """Choose the masks of jobs of the same layers, which have one Gram matrix."""
        layers = jobs[0].layers
        name = ", ".join(layer.name for layer in layers)
        self._tell("solve", name)
        began = time.perf_counter()
        # The Gram is a sum of x x^T whose diagonal was checked, and so was the weight: no need to factorise it.
        weight = torch.cat([layer.oriented(layer.weight.detach()) for layer in layers])
        matrix = gram.matrix.to(weight.device)
        mean = None if gram.mean is None else gram.mean.to(weight.device)
        if gram.cross is None:
            problem = LayerReconstruction(weight, matrix, gram.tokens, mean=mean, check=False)
        else:
            lost = None if gram.lost is None else gram.lost.to(weight.device)
            problem = LayerReconstruction.towards(
                weight,
                matrix,
                gram.cross.to(weight.device),
                gram.tokens,
                strength=self.correction,
                mean=mean,
                lost=lost,
            )
        starts = [self.starts[layer] for layer in layers if layer in self.starts]

        def tell(state: State) -> None:
            self._tell("solve", name, state.fraction)

        masks = self.masks[layers[0]]
        try:
            results = solve_parts(
                problem,
                masks,
                self.solver,
                [job.rows for job in jobs],
                start=torch.cat(starts).to(weight.device) if starts else None,
                callback=None if self.progress is None else tell,
                memory=self.memory,
            )
        except MaskoptError as error:
            raise MaskoptError(f"The layer {name} cannot be solved: {error}") from error
        self.report.solve_seconds += time.perf_counter() - began
        if self.observe is not None:
            self.observe(layers[0], problem, results[0])  # layers are solved alone and whole
        parts = [problem if job.whole else problem.rows(job.rows) for job in jobs]
        return {
            job: self._proved(part, masks, result, gram, name)
            for job, part, result in zip(jobs, parts, results, strict=True)
        }

    def _proved(self, problem: LayerReconstruction, masks: MaskSet, result: Result, gram: Gram, name: str) -> Solved:
        """Return what became of a job: its result, with bounds where they are asked for, and errors on other inputs."""
        unfinished = None
        if self.prover is not None:
            self._tell("certify", name)
            began = time.perf_counter()
            bounds = self.prover.prove(problem, masks, lambda fraction: self._tell("certify", name, fraction))
            self.report.certify_seconds += time.perf_counter() - began
            result = replace(result, lower_bound=bounds.bound, gap_kind=GapKind.PROVEN)
            unfinished = ~bounds.finished
        apart = None if gram.held_out is None else _errors_apart(problem, result, gram.held_out)
        return Solved(result, apart, unfinished, gram.tokens, gram.pooled)

    def _store(self, parts: Sequence[Solved], layers: Sequence[Layer]) -> None:
        """Store what became of layers with one input."""
        result = Result.joined([part.result for part in parts])
        apart = None if parts[0].apart is None else torch.cat([p.apart for p in parts if p.apart is not None], dim=1)
        unfinished, first = parts[0].unfinished, 0
        for layer in layers:
            index = slice(first, first + layer.shape[0])
            own = result if len(layers) == 1 else result.part(index)
            rows = 0 if unfinished is None else int(unfinished[index].sum())
            first = index.stop
            mask = layer.oriented(own.mask).cpu().contiguous()
            # In the layer's own type, to which it is rounded anyway: with dense propagation all weights are kept.
            updated = None if own.weight is None else layer.oriented(own.weight).to(layer.weight.dtype)
            error = None if apart is None else _ratio(*apart[:, index])
            record = _record(layer, parts[0].tokens, own, rows, error, parts[0].pooled)
            self.solved[layer] = record, mask, updated

    def _tell(
        self, stage: Literal["calibrate", "solve", "certify", "recover", "done"], name: str, fraction: float = 0.0
    ) -> None:
        if self.progress is not None:
            total = sum(len(stage.layers) for stage in self.stages)
            done = len(self.report.layers) + len(self.solved)
            self.progress(Progress(stage, name, done, total, fraction))


def _errors_apart(problem: LayerReconstruction, result: Result, gram: Tensor) -> Tensor:
    """Return each row's error on the inputs of another Gram matrix, and that of pruning everything, shape (2, rows)."""
    target, weight = problem.target, problem.weight if result.weight is None else result.weight
    other = LayerReconstruction(problem.weight, gram.to(target.device), target=target, check=False)
    return torch.stack([other.error(result.mask * weight), other.scale()])


def _ratio(lost: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(lost.sum()) / total if total > 0 else 0.0


def _record(
    layer: Layer, tokens: int, result: Result, unfinished_rows: int, held_out_error: float | None, pooled: bool
) -> LayerRecord:
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
        tokens=tokens,
        iterations=result.iterations,
        seconds=result.seconds,
        status=result.status.name,
        unfinished_rows=unfinished_rows,
        held_out_error=held_out_error,
        pooled=pooled,
    )
