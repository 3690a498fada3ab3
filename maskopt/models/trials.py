"""The ground of every allocation: layers and budget, the calibration sequences in parts, and trials of the model."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.allocation.budget import apportioned, budget_of, filled
from maskopt.allocation.plan import fitting, pattern_of
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, gathered, sequences
from maskopt.models.curves import Curves
from maskopt.models.database import Database
from maskopt.models.divergence import Divergence
from maskopt.models.layers import Layer
from maskopt.models.prune import Progress, prune_layers
from maskopt.models.selection import Selection
from maskopt.models.solving import Observer
from maskopt.models.store import Store
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.recovery import clearly_smaller
from maskopt.solvers import Result, Solver

__all__ = ["AllocationProgress", "Candidate", "Trials", "nearest"]

_PER_INPUT = 6  # tokens in trials, at least, for each input of the widest layer
_MEASURED = 32  # sequences, at most, on which losses are measured, and on which candidates are compared


@dataclass(frozen=True)
class AllocationProgress:
    """Progress of `allocate`.

    Attributes
    ----------
    stage : str
        What is being done.
    fraction : float
        Of all the work, in [0, 1]; an estimate.
    """

    stage: str
    fraction: float


@dataclass
class Candidate:
    """Counts of the free layers, and what a model pruned so loses.

    Attributes
    ----------
    counts : dict of str to int
        By layer name.
    losses : Tensor or None
        Divergence per token of each held-out sequence, float64; None before the trial.
    separable : (float, float) or None
        Total loss and proven lower bound where the counts solve the separable problem.
    """

    counts: dict[str, int]
    losses: Tensor | None = None
    separable: tuple[float, float] | None = None

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        assert self.losses is not None
        return float(self.losses.mean())

    def clearly_better(self, other: Candidate) -> bool:
        """Whether this loses less than another by more than the standard error of the differences."""
        assert self.losses is not None
        assert other.losses is not None
        return clearly_smaller(self.losses, other.losses)


class Trials:
    """A model whose layers are pruned and restored again and again.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, in evaluation mode.
    selection : Selection
        Its layers.
    batches : sequence of Batch
        Calibration data.
    pattern : str or mapping of str to str
        Of the masks; one for all layers, or one for each by name.
    sparsity : float
        Mean of the free layers.
    solver : Solver
    fixed : mapping of str to float
        Sparsity of the layers that are not free, by name.
    options : mapping
        `propagate`, `correction`, `target`, `include`, `exclude` and `memory` of `prune`.
    progress : callable or None
    uniform : mapping of str to int, optional
        Counts that others are compared with, in place of those at the mean sparsity; they set the budget.
    costs : mapping of str to int, optional
        What a unit of each layer's count costs in the budget, by default its weights.
    together : sequence of sequence of str
        Patterns of `fnmatch` on layer names: the free layers of a block that match one of a sequence have equal counts.

    Attributes
    ----------
    layers : dict of str to Layer
        All layers to prune.
    counts : dict of str to Counts
        Of the free ones.
    units : dict of str to Counts
        Of layers whose counts are chosen together, by the name of the first one; most are single layers.
    members : dict of str to list of str
        The layers of each unit.
    budget : int
        What the free layers may cost: the weights that they may keep, unless other costs are given.
    uniform : dict of str to int
        Counts at the mean sparsity.
    centres : dict of str to float
        The sparsities that they stand for, around which others are tried.
    candidates : dict of str to Candidate
        What has been tried.
    notes : dict
        More that the details of a plan tell.
    store : Store or None
        Where measurements are kept for the next call.

    Raises
    ------
    MaskoptError
        If layers that belong together have other numbers of choices, a pattern of them matches no layer, or all of a
        sequence match no two layers of a block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selection: Selection,
        batches: Sequence[Batch],
        pattern: str | Mapping[str, str],
        sparsity: float,
        solver: Solver,
        fixed: Mapping[str, float],
        options: Mapping[str, Any],
        progress: Callable[[AllocationProgress], object] | None,
        uniform: Mapping[str, int] | None = None,
        costs: Mapping[str, int] | None = None,
        together: Sequence[Sequence[str]] = (),
    ) -> None:
        self.model, self.selection, self.solver = model, selection, solver
        self.pattern, self.sparsity, self.fixed = pattern, sparsity, dict(fixed)
        self.layers = {layer.name: layer for layer in selection.layers}
        self._every = {
            name: fitting(pattern_of(pattern, name), name, layer.shape, (costs or {}).get(name, 0))
            for name, layer in self.layers.items()
        }
        # A layer that can only keep all or nothing, such as one with a single input, keeps all.
        self.fixed |= {name: 0.0 for name, each in self._every.items() if each.most < 2 and name not in fixed}
        self.counts = {name: each for name, each in self._every.items() if name not in self.fixed}
        self._together = [list(patterns) for patterns in together]
        self.members = {names[0]: names for names in self._grouped()}
        self.units = {
            name: replace(self.counts[name], cost=sum(self.counts[each].cost for each in names))
            for name, names in self.members.items()
        }
        if uniform is None:
            self.budget = budget_of(self.counts, sparsity)
            self.uniform = {name: each.of(sparsity) for name, each in self.counts.items()}
            self.centres = dict.fromkeys(self.counts, sparsity)
        else:
            self.uniform = {name: uniform[name] for name in self.counts}
            self.budget = self.kept(self.uniform)
            self.centres = {name: each.sparsity(self.uniform[name]) for name, each in self.counts.items()}
        self.candidates: dict[str, Candidate] = {}
        self.notes: dict[str, Any] = {}
        self.batches, self.memory = list(batches), int(options["memory"])
        self._options, self._progress = dict(options), progress
        self.store: Store | None = None
        # After every trial the layers get these weights back.
        self._dense = {layer: layer.weight.detach().to("cpu", copy=True) for layer in self.layers.values()}
        self._began = time.perf_counter()
        self._planned, self._reached = 1.0, 0.0

    # The sequences

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many sequences serve for trials, for losses of layers, and for the choice between candidates.

        Raises
        ------
        MaskoptError
            If there are fewer than three.
        """
        number = sum(batch.shape[0] for batch in self.batches)
        mean = max(1, sum(batch.tokens for batch in self.batches) // number)
        widest = max(layer.shape[1] for layer in self.layers.values())
        trial = min(max(number // 8, math.ceil(_PER_INPUT * widest / mean)), max(1, number // 2))
        probe = min(_MEASURED, max(1, (number - trial) // 2))
        held = min(_MEASURED, number - trial - probe)
        if held < 1:
            raise MaskoptError(
                "The allocation needs at least three calibration sequences, to prune with some and measure on others; "
                f"there are {number}."
            )
        return {"all": number, "trial": trial, "losses": probe, "held_out": held}

    @cached_property
    def _parts(self) -> tuple[list[Batch], list[Batch], list[Batch]]:
        single = sequences(self.batches)
        first, second = self.sizes["trial"], self.sizes["trial"] + self.sizes["losses"]
        return single[:first], single[first:second], single[second : second + self.sizes["held_out"]]

    @property
    def batch_size(self) -> int:
        """Sequences in a batch."""
        return max(batch.shape[0] for batch in self.batches)

    @cached_property
    def singles(self) -> Divergence:
        """The divergence on the sequences for losses of layers, one at a time."""
        return Divergence(self.model, self._parts[1])

    @cached_property
    def held_out(self) -> Divergence:
        """The divergence on the sequences that decide between candidates."""
        return Divergence(self.model, gathered(self._parts[2], self.batch_size))

    def predict(self) -> None:
        """Let the dense model predict what changed ones are measured against; to be called before any change.

        Where the solver corrects errors upstream, no composed model is measured on `singles`: that waits until it is
        asked for, while the model is dense.
        """
        _ = self.held_out
        if not self.solver.corrects:
            _ = self.singles

    def few(self, number: int) -> Divergence:
        """Return the divergence on some of the sequences for losses of layers."""
        return Divergence(self.model, gathered(self._parts[1][:number], max(number, self.batch_size)))

    # Pruning

    def try_out(self, name: str) -> None:
        """Prune the model with the trial sequences as a candidate says, measure its losses, and restore it."""
        candidate, held = self.candidates[name], self.held_out
        file = f"trial-{re.sub(r'[^a-z0-9]+', '-', name)}"
        known = None if self.store is None else self.store.read(file)
        if known is not None and known["counts"] == candidate.counts:
            self.part(f"trial of {name}")
            candidate.losses = torch.tensor(known["losses"], dtype=torch.float64)
            return
        with self._restored():
            self._prune(f"trial of {name}", self.plan("trial", candidate.counts), self.solver, None, self._parts[0])
            candidate.losses = held.each(self.model)
        if self.store is not None:
            self.store.write(file, {"counts": candidate.counts, "losses": candidate.losses.tolist()})

    def database(self, levels: Mapping[str, Sequence[int]]) -> Database:
        """Solve the free layers at levels, on the dense model's states and the trial sequences."""
        free = {self.layers[name]: counts for name, counts in self.counts.items()}
        wanted = {self.layers[name]: list(counts) for name, counts in levels.items()}
        dense = {layer: self._dense[layer].to(layer.weight.device) for layer in free}
        database = Database(free, wanted, dense, self.solver, self.memory)
        if self.store is not None and database.load(self.store.folder):
            self.part("layers at several levels")
            return database

        def observe(layer: Layer, problem: LayerReconstruction, result: Result) -> None:
            # `prune` makes its own objects for the layers.
            if layer.name in self.counts:
                database.observe(self.layers[layer.name], problem, result)

        start = {name: nearest(levels[name], count) for name, count in self.uniform.items()}
        with self._restored():
            self._prune(
                "layers at several levels", self.plan("levels", start), self.solver, observe, self._parts[0], "dense"
            )
        if self.store is not None:
            database.save(self.store.folder)
        return database

    def remembered(self, name: str, measure: Callable[[], Curves]) -> Curves:
        """Return losses from the store, or measure and store them."""
        known = None if self.store is None else self.store.read(name)
        if known is not None:
            return {self.layers[layer]: {int(n): loss for n, loss in losses.items()} for layer, losses in known.items()}
        curves = measure()
        if self.store is not None:
            self.store.write(name, {layer.name: losses for layer, losses in curves.items()})
        return curves

    def identity(self) -> dict[str, Any]:
        """Return what decides all measurements: data, weights, settings and versions."""
        weights, data = hashlib.sha256(), hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            weights.update(name.encode())
            weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for batch in sequences(self.batches):
            for value in batch.inputs.values():
                if isinstance(value, Tensor):
                    data.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "maskopt": version("maskopt"),
            "torch": torch.__version__,
            "weights of the model": weights.hexdigest(),
            "calibration data": data.hexdigest(),
            "batch size": self.batch_size,
            "pattern": self.pattern if isinstance(self.pattern, str) else dict(self.pattern),
            "sparsity": self.sparsity,
            "solver": repr(self.solver),
            "fixed": self.fixed,
            "together": sorted(names for names in self.members.values() if len(names) > 1),
            "layers": sorted(self.counts),
            "propagate": self._options["propagate"],
            "correction": self._options["correction"],
            "target": self._options["target"],
        }

    def observe_dense(self, what: str, masks: MaskSet, solver: Solver, observe: Observer) -> None:
        """Let a function see every layer's problem on the dense model's states and all sequences, and a solution."""
        with self._restored():
            self._prune(what, masks, solver, observe, self.batches, "dense")

    def _prune(
        self,
        what: str,
        masks: MaskSet | Plan,
        solver: Solver,
        observe: Observer | None,
        batches: Sequence[Batch],
        propagate: str | None = None,
    ) -> None:
        tell = self.part(what)

        def show(event: Progress) -> None:
            tell(event.done / max(1, event.total))

        options = {**self._options, **({} if propagate is None else {"propagate": propagate})}
        inputs = [batch.inputs for batch in gathered(batches, self.batch_size)]
        prune_layers(self.model, inputs, masks, solver, **options, on_error="keep", observe=observe, progress=show)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the layers their dense weights back, whatever happens inside."""
        try:
            yield
        finally:
            for layer, weight in self._dense.items():
                layer.weight.data.copy_(weight)

    # Counts

    @property
    def prunes(self) -> bool:
        """Whether there is a weight to prune in a free layer."""
        return self.budget < sum(counts.cost * counts.most for counts in self.counts.values())

    def kept(self, counts: Mapping[str, int]) -> int:
        """Return what counts of the free layers cost: the weights that they keep, unless other costs are given."""
        return sum(self.counts[name].cost * count for name, count in counts.items())

    def within(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return counts of layers, changed as little as meets the budget; those of a unit have their mean."""
        found = {name: round(self._mean(counts, name)) for name in self.units}

        def left() -> int:
            return self.budget - sum(self.units[name].cost * count for name, count in found.items())

        while left() < 0:
            densest = max(found, key=lambda name: found[name] / self.units[name].most)
            found[densest] -= 1
        return self.of_layers(filled(self.units, found, left()))

    def wished(self, sparsities: Mapping[str, float]) -> dict[str, int]:
        """Return counts of layers near to wished sparsities of all of them, within the budget."""
        return self.of_layers(apportioned(self.units, {n: self._mean(sparsities, n) for n in self.units}, self.budget))

    def of_layers(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the counts of layers, from those of units."""
        of = {layer: counts[name] for name, names in self.members.items() for layer in names}
        return {name: of[name] for name in self.counts}

    def _mean(self, values: Mapping[str, float], unit: str) -> float:
        """Return the mean of values of a unit's layers, each in proportion to what a unit of its count costs."""
        first, *others = self.members[unit]
        if not others:
            return values[first]
        costs = [self.counts[name].cost for name in self.members[unit]]
        pairs = zip(costs, self.members[unit], strict=True)
        return math.fsum(cost * values[name] for cost, name in pairs) / sum(costs)

    def _grouped(self) -> list[list[str]]:
        """Return the names of the free layers in groups that have equal counts, in the order of their first ones."""
        blocks = [[layer.name for layer in layers] for layers in self.selection.blocks.values()]
        leader = {name: name for name in self.counts}
        for patterns in self._together:
            for each in patterns:
                if not any(fnmatchcase(name, each) for name in self.layers):
                    raise MaskoptError(
                        f"The pattern {each!r} of layers to keep together matches no layer to prune; names look like "
                        f"{next(iter(self.layers))!r}."
                    )
            matched = [
                [name for name in block if name in self.counts and any(fnmatchcase(name, each) for each in patterns)]
                for block in blocks
            ]
            if all(len(names) < 2 for names in matched):
                raise MaskoptError(
                    f"The patterns {', '.join(map(repr, patterns))} match no two layers of a block whose sparsity is "
                    f"chosen, so there is nothing to keep together; names look like {next(iter(self.layers))!r}."
                )
            for names in filter(None, matched):
                first, *others = names
                for name in others:
                    self._check_equal(first, name)
                same = {leader[name] for name in names}
                leader |= {name: leader[first] for name, before in leader.items() if before in same}
        groups: dict[str, list[str]] = {}
        for name in self.counts:
            groups.setdefault(leader[name], []).append(name)
        return list(groups.values())

    def _check_equal(self, one: str, other: str) -> None:
        first, second = self.counts[one], self.counts[other]
        if (first.pattern, first.most) != (second.pattern, second.most):
            raise MaskoptError(
                f"The layers {one} and {other} cannot have one sparsity: they have {first.most} and {second.most} "
                f"choices; keep layers with equal numbers of inputs together, or use a pattern such as n:m."
            )

    def plan(self, rule: str, counts: Mapping[str, int], chosen: str | None = None) -> Plan:
        """Return the plan of counts of the free layers.

        Parameters
        ----------
        rule : str
        counts : mapping of str to int
        chosen : str, optional
            The name of the candidate.
        """
        every = {
            name: counts[name] if name in counts else self._every[name].of(self.fixed[name]) for name in self.layers
        }
        details: dict[str, Any] = {
            "solver": repr(self.solver),
            "target": self.sparsity,
            "budget": self.budget,
            "kept": self.kept(counts),
            "fixed": self.fixed,
            **({"together": self._together} if self._together else {}),
            "seconds": time.perf_counter() - self._began,
            **self.notes,
        }
        tried = {name: one.loss for name, one in self.candidates.items() if one.losses is not None}
        if chosen is not None:
            details["chosen"] = chosen
        solved = {name: one.separable for name, one in self.candidates.items() if one.separable is not None}
        if solved:
            details["separable"] = {n: {"loss": loss, "lower_bound": low} for n, (loss, low) in solved.items()}
        if tried:
            details |= {"sequences": self.sizes, "divergence": tried}
        return Plan(
            self.pattern, {name: self._every[name].sparsity(every[name]) for name in self.layers}, rule, details
        )

    # Progress

    def expect(self, parts: int) -> None:
        """Say how many parts of about equal length the work has."""
        self._planned = float(parts)

    def part(self, stage: str) -> Callable[[float], None]:
        """Begin a part of the work and return a function that takes the fraction of it that is done."""
        start = self._reached
        self._reached += 1.0

        def tell(fraction: float) -> None:
            if self._progress is not None:
                done = min(start + fraction, self._planned) / self._planned
                self._progress(AllocationProgress(stage, done))

        tell(0.0)
        return tell


def nearest(levels: Sequence[int], count: int) -> int:
    """Return the level that is nearest to a count."""
    return min(levels, key=lambda level: abs(level - count))
