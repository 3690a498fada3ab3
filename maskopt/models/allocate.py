"""How sparse each layer of a model should be, found by measuring what the model loses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan, allocate_levels, overridden
from maskopt.allocation.budget import apportioned, budget_of, filled, interpolated, levels_of, separable_levels
from maskopt.allocation.evolution import evolve
from maskopt.allocation.plan import fitting
from maskopt.allocation.rules import alpha_pruning, atp, atp_slopes, dlp, hill_exponent, lsa, outlier_share, owl
from maskopt.checks import choice, real, shown
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, prepare_batches
from maskopt.models.checks import check_model, move_model
from maskopt.models.curves import Curves, expanded_losses, gathered, measured_losses, sequences
from maskopt.models.database import Database
from maskopt.models.divergence import Divergence
from maskopt.models.layers import Layer
from maskopt.models.prune import Progress, Propagate, prune_layers
from maskopt.models.replay import evaluation_mode
from maskopt.models.selection import Selection, select_layers
from maskopt.models.solving import Observer
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.solvers import ContinuationFrankWolfe, Result, Solver, Wanda
from maskopt.solvers.arguments import check_memory, check_solver

__all__ = ["RULES", "AllocationProgress", "Rule", "allocate"]

Rule = Literal["uniform", "auto", "owl", "dlp", "alpha", "lsa", "atp", "evo", "kl", "fisher"]
RULES: tuple[Rule, ...] = get_args(Rule)

# Levels around the mean sparsity. Solvers that correct errors are slow; others are composed at any level.
_COARSE = (-0.4, -0.2, 0.0, 0.12, 0.24)
_FINE = tuple(0.05 * step for step in range(-9, 7))
_DENSEST, _SPARSEST = 0.05, 0.96
_PASSES = 9  # runs of a block on every batch when a model is pruned with corrected errors
_MEASURED = 0.8  # most time for measured curves, in pruning runs
_TOKENS = 6  # per input of the widest layer, at least, in trials
_EXPANDED = 32  # sequences for expansions and for the choice between candidates
_ROUNDS = 12


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


def allocate(
    model: PreTrainedModel,
    batches: Iterable[Any],
    pattern: str = "per-row",
    sparsity: float = 0.5,
    solver: Solver | None = None,
    *,
    rule: Rule = "auto",
    fixed: Mapping[str, float] | None = None,
    propagate: Propagate | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    progress: Callable[[AllocationProgress], object] | None = None,
) -> Plan:
    """Choose a sparsity for each layer of a model so that the model loses little at a given mean sparsity.

    "auto" solves every layer at a few levels on the dense model's states, measures or expands what each level costs the
    model (the Kullback-Leibler divergence of its predictions from the dense ones), and solves the separable problem
    exactly. Candidates are then tried: the model is pruned with a part of the sequences, by the solver that will be
    used, and the divergence on other sequences decides between them and uniform sparsity. The model is as it was
    afterwards.

    Parameters
    ----------
    model : PreTrainedModel
    batches : iterable of dict or Tensor
        Calibration data as for `prune`; "auto", "kl", "fisher", "atp" and "evo" need at least three sequences of token
        ids.
    pattern : str
        As for `maskopt.oracles.parse_masks`; of "n:m", every layer gets its own n.
    sparsity : float
        Fraction of the weights of all layers together to prune, in [0, 1).
    solver : Solver, optional
        The one that will prune; ContinuationFrankWolfe() by default, as in `prune`.
    rule : str
        "uniform"; "auto"; "kl" or "fisher" (the separable problem with measured or expanded losses, no trials); or a
        published rule: "owl" (arXiv 2310.05175), "dlp" (2505.23807), "alpha" (AlphaPruning, 2410.10912), "lsa", "atp"
        (2502.14770), "evo" (EvoPress, 2410.14649).
    fixed : mapping of str to float, optional
        Sparsity by pattern of `fnmatch` on layer names; `sparsity` is then the mean of all other layers.
    propagate, include, exclude, device, memory
        As for `prune`.
    seed : int
        Of the labels that expansions draw, and of "evo".
    progress : callable, optional
        Called with an `AllocationProgress`.

    Returns
    -------
    Plan
        To be given to `prune`; `details` tells the divergence of each candidate.

    Raises
    ------
    MaskoptError
        If an argument is wrong, a pattern fits no layer, there are too few sequences, or the model predicts no tokens
        and the rule needs predictions.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.models import allocate, calibration_batches, load_model
    >>> model, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=128)  # doctest: +SKIP
    >>> solver = maskopt.weights.ConditionalADMM()  # doctest: +SKIP
    >>> plan = allocate(model, batches, "per-row", 0.6, solver)  # doctest: +SKIP
    >>> report = maskopt.prune(model, batches, plan, solver)  # doctest: +SKIP
    """
    solver = ContinuationFrankWolfe() if solver is None else solver
    check_solver(solver)
    check_memory(memory)
    if not choice(RULES).fits(rule):
        raise MaskoptError(f"The rule must be one of {', '.join(RULES)}; got {shown(rule)}.")
    if not real(0, 1, below=True).fits(sparsity):
        raise MaskoptError(f"The mean sparsity must lie between 0 and 1, below 1; got {shown(sparsity)}.")
    if progress is not None and not callable(progress):
        raise MaskoptError(f"progress must be a function of one argument; got {shown(progress)}.")
    check_model(model)
    if device is not None:
        move_model(model, device)
    selection = select_layers(model, include, exclude)
    layers = {layer.name: layer for layer in selection.layers}
    pinned = overridden(list(layers), fixed or {})
    if len(pinned) == len(layers):
        return Plan(pattern, pinned, "by hand")
    search = _Search(
        model,
        selection,
        list(prepare_batches(model, batches)),
        pattern,
        float(sparsity),
        solver,
        pinned,
        {"propagate": propagate, "include": include, "exclude": exclude, "memory": memory},
        seed,
        memory,
        progress,
    )
    with evaluation_mode(model):
        return search.run(rule)


@dataclass
class _Candidate:
    """Counts of the free layers, and what they lose."""

    counts: dict[str, int]
    losses: Tensor | None = None  # per sequence, float64

    @property
    def loss(self) -> float:
        assert self.losses is not None
        return float(self.losses.mean())


@dataclass
class _Search:
    """The work of `allocate`."""

    model: PreTrainedModel
    selection: Selection
    batches: list[Batch]
    pattern: str
    sparsity: float
    solver: Solver
    pinned: dict[str, float]
    options: dict[str, Any]
    seed: int
    memory: int
    progress: Callable[[AllocationProgress], object] | None
    candidates: dict[str, _Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = {layer.name: layer for layer in self.selection.layers}
        every = {name: fitting(self.pattern, name, layer.shape) for name, layer in self.layers.items()}
        self.pinned_counts = {name: every[name].of(value) for name, value in self.pinned.items()}
        self.counts = {name: each for name, each in every.items() if name not in self.pinned}
        self.every = every
        self.budget = budget_of(self.counts, self.sparsity)
        self.uniform = {name: each.of(self.sparsity) for name, each in self.counts.items()}
        # In every trial the layers get these weights back.
        self.dense = {layer: layer.weight.detach().to("cpu", copy=True) for layer in self.layers.values()}
        self.began = time.perf_counter()
        self.planned = self.reached = 1.0
        self.forwards = 0
        self.sizes = self._windows()

    # The sequences

    def _windows(self) -> dict[str, int]:
        """Divide the sequences: for trials, for what pruning costs the model, and for the choice between candidates."""
        self.sequences = sequences(self.batches)
        number = len(self.sequences)
        mean = max(1, sum(batch.tokens for batch in self.sequences) // number)
        widest = max(columns for _, columns in (layer.shape for layer in self.layers.values()))
        trial = min(max(number // 8, math.ceil(_TOKENS * widest / mean)), max(1, number // 2))
        probe = min(_EXPANDED, max(1, (number - trial) // 2))
        held = min(_EXPANDED, number - trial - probe)
        return {"sequences": number, "trial": trial, "probe": probe, "held_out": held}

    def _cut(self) -> None:
        """Make the divergences on the parts of the sequences."""
        if self.sizes["held_out"] < 1:
            raise MaskoptError(
                "The allocation needs at least three calibration sequences, to prune with some and measure on others; "
                f"there are {len(self.sequences)}."
            )
        size = max(batch.shape[0] for batch in self.batches)
        trial, probe, held = (self.sizes[name] for name in ("trial", "probe", "held_out"))
        self.trial_batches = gathered(self.sequences[:trial], size)
        self.singles = self.sequences[trial : trial + probe]
        self.probe = Divergence(self.model, self.singles)
        self.held = Divergence(self.model, gathered(self.sequences[trial + probe : trial + probe + held], size))
        self.batch_size = size

    # Rules

    def run(self, rule: Rule) -> Plan:
        """Return the plan of a rule."""
        if rule == "uniform":
            return self._plan(rule, self.uniform)
        if rule in ("owl", "dlp", "alpha", "lsa"):
            self._expect(1)
            return self._plan(rule, self._published(rule, self._statistics("statistics of the layers")))
        self._cut()
        if rule == "atp":
            return self._atp()
        database = self._database(rule == "evo" or not self.solver.corrects)
        if rule == "evo":
            return self._evo(database)
        if rule == "fisher":
            self._expect(2)
            return self._plan(rule, self._separable([(self._expanded(database), True)]))
        if rule == "kl":
            self._expect(2)
            return self._plan(rule, self._separable([(self._measured(database, self.sizes["probe"]), True)]))
        return self._auto(database)

    def _auto(self, database: Database) -> Plan:
        curves = self._curves(database)
        alone = [(losses, True) for _, losses in curves]
        context = self._context(database)
        self.candidates["uniform"] = _Candidate(self.uniform)
        self.candidates["kl"] = _Candidate(self._separable(alone[-1:]))
        if len(curves) > 1:
            self.candidates["kl+fisher"] = _Candidate(self._separable(alone))
        self.candidates["kl and context"] = _Candidate(self._separable([alone[-1], (context, False)]))
        if len(curves) > 1:
            self.candidates["all"] = _Candidate(self._separable([*alone, (context, False), (context, False)]))
        if not self.solver.corrects:
            self._compose(database)
        for name, candidate in self.candidates.items():
            candidate.losses = self._trial(name, candidate.counts)
        uniform = self.candidates["uniform"]
        best = min(self.candidates, key=lambda name: self.candidates[name].loss)
        if not _clearly_less(self.candidates[best], uniform):
            best = "uniform"
        chosen = self.uniform if best == "uniform" else self.candidates[best].counts
        return self._plan("auto", chosen, best)

    def _curves(self, database: Database) -> list[tuple[str, Curves]]:
        """Return losses of single layers: expanded, and measured where that takes no longer than pruning."""
        found = [("fisher", self._expanded(database))]
        levels = sum(len(database.measured(layer)) for layer in database.counts)
        windows = min(12, self.sizes["probe"], int(_MEASURED * _PASSES * self.sizes["sequences"] / max(1, levels)))
        if windows >= 2:
            found.append(("kl", self._measured(database, windows)))
        return found

    def _expanded(self, database: Database) -> Curves:
        return expanded_losses(
            self.model,
            database,
            self.probe,
            first_order=False,
            seed=self.seed,
            memory=self.memory,
            progress=self._part("losses of layers, expanded"),
        )

    def _measured(self, database: Database, windows: int) -> Curves:
        free = set(self.counts)
        return measured_losses(
            self.model,
            {block: [x for x in layers if x.name in free] for block, layers in self.selection.blocks.items()},
            [layer for layer in self.selection.outside if layer.name in free],
            database,
            Divergence(self.model, gathered(self.singles[:windows], max(windows, self.batch_size))),
            self._part("losses of layers, measured"),
        )

    def _context(self, database: Database) -> Curves:
        """Return losses around the model composed at the mean sparsity."""
        at = {layer: _nearest(database.measured(layer), self.uniform[layer.name]) for layer in database.counts}
        with database.composed(at):
            return expanded_losses(
                self.model,
                database,
                self.probe,
                first_order=True,
                seed=self.seed,
                memory=self.memory,
                progress=self._part("losses of layers in context"),
            )

    def _separable(self, curves: Sequence[tuple[Curves, bool]]) -> dict[str, int]:
        """Minimise the sum of the layers' losses, each the mean of several curves, within the budget."""
        layers, grids = [], []
        for name, counts in self.counts.items():
            known = [losses[self.layers[name]] for losses, _ in curves]
            measured = sorted(known[0])
            grid = levels_of(name, counts, measured[0], measured[-1])
            total = np.zeros(len(grid))
            for losses, (_, positive) in zip(known, curves, strict=True):
                total += interpolated(measured, [losses[count] for count in measured], grid, positive=positive)
            layers.append(separable_levels(name, counts, grid, total))
            grids.append(grid)
        chosen = allocate_levels(layers, self.budget)
        found = {name: int(grid[level]) for name, grid, level in zip(self.counts, grids, chosen.levels, strict=True)}
        return filled(self.counts, found, self.budget - chosen.cost)

    # Models composed of solved layers

    def _compose(self, database: Database) -> None:
        """Improve the best of the candidates and of the published rules in context, and add it as a candidate."""
        statistics = self._statistics("statistics of the layers")
        starts = {name: candidate.counts for name, candidate in self.candidates.items()}
        starts |= {name: self._published(name, statistics) for name in ("owl", "dlp", "alpha", "lsa")}
        grid = {name: database.measured(layer) for name, layer in self.layers.items() if name in self.counts}
        best, least, name = {}, math.inf, ""
        for start, counts in starts.items():
            near = {layer: _nearest(grid[layer], count) for layer, count in counts.items()}
            loss = self._composed(database, near)
            if loss < least:
                best, least, name = near, loss, start
        self.candidates[name] = _Candidate(starts[name])
        tell = self._part("in context")
        radius = 0.1
        for number in range(_ROUNDS):
            levels = {
                self.layers[layer]: [
                    count
                    for count in grid[layer]
                    if abs(count - best[layer]) <= (radius + 1e-9) * self.counts[layer].most
                ]
                for layer in self.counts
            }
            with database.composed({self.layers[layer]: count for layer, count in best.items()}):
                losses = expanded_losses(
                    self.model,
                    database,
                    self.probe,
                    first_order=True,
                    seed=self.seed + number,
                    memory=self.memory,
                    levels=levels,
                )
            tell((number + 1) / _ROUNDS)
            layers = [
                separable_levels(
                    layer, counts, _array(levels[self.layers[layer]]), _array(losses[self.layers[layer]].values())
                )
                for layer, counts in self.counts.items()
            ]
            budget = max(self.budget, sum(min(each.costs) for each in layers))
            chosen = allocate_levels(layers, budget).levels
            trial = {layer: levels[self.layers[layer]][level] for layer, level in zip(self.counts, chosen, strict=True)}
            loss = self._composed(database, trial)
            if loss < least and self._kept(trial) <= self.budget:
                best, least = trial, loss
            else:
                radius /= 2
                if radius < 0.05:
                    break
        left = self.budget - self._kept(best)
        if left >= 0:
            self.candidates["in context"] = _Candidate(filled(self.counts, best, left))

    def _composed(self, database: Database, counts: Mapping[str, int]) -> float:
        """Return the divergence of the model composed of solved layers."""
        with database.composed({self.layers[name]: count for name, count in counts.items()}):
            return float(self.probe.each(self.model).mean())

    def _kept(self, counts: Mapping[str, int]) -> int:
        return sum(self.counts[name].step * count for name, count in counts.items())

    def _database(self, fine: bool) -> Database:
        """Solve every free layer at the levels around the mean, on the dense model's states."""
        self._expect(8)
        levels = {}
        for name, counts in self.counts.items():
            if counts.most <= 16:
                wanted: Iterable[int] = range(1, counts.most)
            else:
                offsets = _FINE if fine else _COARSE
                wanted = (
                    counts.of(min(_SPARSEST, max(_DENSEST, self.sparsity + offset))) for offset in sorted(offsets)
                )
            levels[self.layers[name]] = sorted({*wanted, self.uniform[name]} - {0, counts.most})
        free = {self.layers[name]: counts for name, counts in self.counts.items()}
        dense = {layer: self.dense[layer].to(layer.weight.device) for layer in free}
        database = Database(free, levels, dense, self.solver, self.memory)

        def observe(layer: Layer, problem: LayerReconstruction, result: Result) -> None:
            # `prune` makes its own objects for the layers.
            if layer.name in self.counts:
                database.observe(self.layers[layer.name], problem, result)

        with self._restored():
            self._prune("layers at several levels", self._plan("", self.uniform), observe, propagate="dense")
        return database

    # Trials

    def _trial(self, name: str, counts: Mapping[str, int]) -> Tensor:
        """Return the divergence on the held-out sequences, one by one, of the model pruned with some of the others."""
        with self._restored():
            self._prune(f"trial of {name}", self._plan("", counts), None)
            return self.held.each(self.model)

    def _prune(self, what: str, plan: Plan, observe: Observer | None, **options: Any) -> None:
        tell = self._part(what)

        def show(event: Progress) -> None:
            tell(event.done / max(1, event.total))

        batches = [batch.inputs for batch in self.trial_batches]
        prune_layers(
            self.model,
            batches,
            plan,
            self.solver,
            **{**self.options, **options},
            on_error="keep",
            observe=observe,
            progress=show,
        )

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the layers their dense weights back, whatever happens inside."""
        try:
            yield
        finally:
            for layer, weight in self.dense.items():
                layer.weight.data.copy_(weight)

    # Published rules

    def _blocks(self) -> dict[str, list[Layer]]:
        """Return the free layers of each block, those outside the blocks one by one."""
        groups = {block.name: list(layers) for block, layers in self.selection.blocks.items()}
        groups |= {layer.name: [layer] for layer in self.selection.outside}
        free = {name: [layer for layer in layers if layer.name in self.counts] for name, layers in groups.items()}
        return {name: layers for name, layers in free.items() if layers}

    def _statistics(self, what: str) -> dict[str, list[float]]:
        """Measure, for each block, what the published rules need, on the dense model's states."""
        outliers: dict[Layer, Tensor] = {}
        errors: dict[Layer, float] = {}

        def observe(layer: Layer, problem: LayerReconstruction, result: Result) -> None:
            scores = problem.weight.abs() * problem.gram.diagonal().clamp_min(0.0).sqrt()
            outliers[self.layers[layer.name]] = scores.float().cpu()
            errors[self.layers[layer.name]] = result.total

        batches = [batch.inputs for batch in self.batches]
        tell = self._part(what)
        with self._restored():
            prune_layers(
                self.model,
                batches,
                PerRow(0.5),
                Wanda(),
                **{**self.options, "propagate": "dense"},
                on_error="keep",
                observe=observe,
                progress=lambda event: tell(event.done / max(1, event.total)),
            )
        blocks = self._blocks().values()
        return {
            "owl": [outlier_share([outliers[layer] for layer in layers]) for layers in blocks],
            "dlp": [float(torch.cat([outliers[x].flatten() for x in layers]).median()) for layers in blocks],
            "alpha": [
                math.fsum(hill_exponent(layer.oriented(layer.weight.detach())) for layer in layers) / len(layers)
                for layers in blocks
            ],
            "lsa": [math.fsum(errors[layer] for layer in layers) for layers in blocks],
        }

    def _published(self, rule: str, statistics: Mapping[str, Sequence[float]]) -> dict[str, int]:
        rules = {"owl": owl, "dlp": dlp, "alpha": alpha_pruning, "lsa": lsa}
        return self._by_block(rules[rule](statistics[rule], self._block_sizes(), self.sparsity))

    def _block_sizes(self) -> list[int]:
        return [sum(layer.weight.numel() for layer in layers) for layers in self._blocks().values()]

    def _by_block(self, sparsities: Sequence[float]) -> dict[str, int]:
        wished = {
            layer.name: value
            for layers, value in zip(self._blocks().values(), sparsities, strict=True)
            for layer in layers
        }
        return apportioned(self.counts, wished, self.budget)

    def _atp(self) -> Plan:
        """Try the slopes of ATP and return the best."""
        sizes = self._block_sizes()
        slopes = atp_slopes(self.sparsity, len(sizes))
        # The authors' step is a search over dozens of prunings; these are as many as a trial's noise can tell apart.
        tried = [slopes[round(index * (len(slopes) - 1) / 7)] for index in range(8)]
        self._expect(len(set(tried)))
        best, least = self.uniform, math.inf
        for slope in dict.fromkeys(tried):
            counts = self._by_block(atp(len(sizes), sizes, self.sparsity, slope))
            candidate = _Candidate(counts, self._trial(f"slope {slope:.3g}", counts))
            self.candidates[f"slope {slope:.3g}"] = candidate
            if candidate.loss < least:
                best, least = counts, candidate.loss
        return self._plan("atp", best)

    def _evo(self, database: Database) -> Plan:
        """Search the levels of the database by evolution, on models composed of it."""
        names = list(self.counts)
        grid = [database.measured(self.layers[name]) for name in names]
        start = [_nearest_index(levels, self.uniform[name]) for name, levels in zip(names, grid, strict=True)]
        steps = [Divergence(self.model, self.singles[:size]) for size in (2, 8, len(self.singles))]

        def evaluate(candidates: Sequence[Sequence[int]], step: int) -> list[float]:
            found = []
            for candidate in candidates:
                counts = {self.layers[n]: grid[i][candidate[i]] for i, n in enumerate(names)}
                with database.composed(counts):
                    found.append(float(steps[min(step, 2)].each(self.model).mean()))
            return found

        tell = self._part("evolution")
        generations = 40
        evolved = evolve(
            [len(levels) for levels in grid],
            [self.counts[name].step * self.counts[name].most for name in names],
            start,
            evaluate,
            generations=generations,
            offspring=16,
            seed=self.seed,
            progress=lambda done, total: tell(done / total),
        )
        chosen = {
            name: grid[index][level] for index, (name, level) in enumerate(zip(names, evolved.choice, strict=True))
        }
        return self._plan("evo", filled(self.counts, chosen, max(0, self.budget - self._kept(chosen))))

    # The result

    def _plan(self, rule: str, counts: Mapping[str, int], best: str | None = None) -> Plan:
        chosen = {**counts, **self.pinned_counts}
        details: dict[str, Any] = {}
        if rule:
            details = {
                "solver": repr(self.solver),
                "target": self.sparsity,
                "budget": self.budget,
                "kept": self._kept(counts),
                "fixed": self.pinned,
                "seconds": time.perf_counter() - self.began,
                **({} if best is None else {"chosen": best}),
                **({"sequences": self.sizes} if self.candidates else {}),
                **(
                    {"divergence": {name: candidate.loss for name, candidate in self.candidates.items()}}
                    if self.candidates
                    else {}
                ),
            }
        return Plan(
            self.pattern,
            {name: self.every[name].sparsity(chosen[name]) for name in self.layers},
            rule or "trial",
            details,
        )

    # Progress

    def _expect(self, parts: int) -> None:
        """Say how many parts of about equal length the work has."""
        self.planned, self.reached = float(parts), 0.0

    def _part(self, stage: str) -> Callable[[float], None]:
        """Begin a part of the work and return a function that takes the fraction of it that is done."""
        start = self.reached
        self.reached += 1.0

        def tell(fraction: float) -> None:
            if self.progress is not None:
                done = min(start + fraction, self.planned) / self.planned
                self.progress(AllocationProgress(stage, done))

        tell(0.0)
        return tell


def _array(values: Iterable[float]) -> np.ndarray:
    return np.asarray(list(values))


def _nearest(levels: Sequence[int], count: int) -> int:
    return min(levels, key=lambda level: abs(level - count))


def _nearest_index(levels: Sequence[int], count: int) -> int:
    return min(range(len(levels)), key=lambda index: abs(levels[index] - count))


def _clearly_less(one: _Candidate, other: _Candidate) -> bool:
    """Whether a candidate's losses are less than another's by more than the standard error of their differences."""
    assert one.losses is not None
    assert other.losses is not None
    difference = one.losses - other.losses
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()) + error < 0.0
