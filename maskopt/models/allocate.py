"""How sparse each layer of a model should be, found by measuring what the model loses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from maskopt.allocation import Plan, allocate_levels, overridden
from maskopt.allocation.attenuation import attenuation
from maskopt.allocation.budget import interpolated, levels_of, separable_levels
from maskopt.allocation.separable import joined
from maskopt.checks import SEEDS, choice, real, shown, whole
from maskopt.errors import MaskoptError
from maskopt.models.batches import prepare_batches
from maskopt.models.checks import check_model, move_model
from maskopt.models.curves import DRAWS, Curves, expanded_losses, extended_losses, measured_losses
from maskopt.models.database import Database
from maskopt.models.layers import Layer
from maskopt.models.prune import CORRECTION, Propagate
from maskopt.models.published import BLOCK_RULES, atp_counts, block_counts, evolved_counts, measure_blocks
from maskopt.models.replay import evaluation_mode
from maskopt.models.residual import Target
from maskopt.models.selection import select_layers
from maskopt.models.store import Store
from maskopt.models.trials import AllocationProgress, Candidate, Trials, nearest
from maskopt.solvers import ContinuationFrankWolfe, Solver
from maskopt.solvers.arguments import check_memory, check_solver

__all__ = ["RULES", "AllocationProgress", "Rule", "allocate", "best_of"]

Rule = Literal["uniform", "auto", "owl", "dlp", "alpha", "lsa", "atp", "evo", "kl", "fisher"]
RULES: tuple[Rule, ...] = get_args(Rule)

# Levels at which layers are solved, around the mean sparsity. Solvers that correct errors upstream are slow, and models
# composed of their layers are not what they make of a model; others are composed at any level.
_COARSE = (-0.35, 0.25)
_FINE = tuple(0.05 * step for step in range(-9, 7))
_DENSEST, _SPARSEST = 0.05, 0.96
_FEW = 16  # counts of a layer that are all solved
_PASSES = 9  # runs of a block on every batch where a model is pruned with corrected errors
_SHARE = 1.2  # forwards for measured losses, at most, over those of pruning
_WINDOWS, _FEWEST = 8, 4  # sequences for measured losses, at most, and below which expansions take their place
_DRAWS = 128  # of labels for expansions that decide by themselves
_LEAST = 0.25  # of the way from uniform sparsity to the solution that is still tried, where more is no better
_ROUNDS, _RADIUS = 12, 0.2  # of improvements in context, and how far a sparsity moves in one


def allocate(
    model: PreTrainedModel,
    batches: Iterable[Any],
    pattern: str = "per-row",
    sparsity: float = 0.5,
    solver: Solver | None = None,
    *,
    rule: Rule = "auto",
    fixed: Mapping[str, float] | None = None,
    together: Sequence[str | Sequence[str]] = (),
    propagate: Propagate | None = None,
    correction: float = CORRECTION,
    target: Target = "stream",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    progress: Callable[[AllocationProgress], object] | None = None,
    cache: str | os.PathLike[str] | None = None,
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
    together : sequence of str or sequence of str
        Patterns of `fnmatch`; layers of one block that match one of an entry get the same sparsity, as kernels that
        fuse queries, keys and values may need: ``[["*.q_proj", "*.k_proj", "*.v_proj"]]``. They must have equal
        numbers of choices: of inputs per row, or m of "n:m".
    propagate, correction, target, include, exclude, device, memory
        As for `prune`.
    seed : int
        Of the labels that expansions draw, and of "evo".
    progress : callable, optional
        Called with an `AllocationProgress`.
    cache : path-like, optional
        A folder for what is measured, made if it is not there: solved layers, losses and trials. The same call goes on
        after the last of them that was finished; a folder of another model, other data or other settings is refused.

    Returns
    -------
    Plan
        To be given to `prune`; `details` tells the divergence of each candidate.

    Raises
    ------
    MaskoptError
        If an argument is wrong, a pattern fits no layer, there are too few sequences, the model predicts no tokens and
        the rule needs predictions, or the cache is of another allocation.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.models import calibration_batches, load_model
    >>> model, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=128)  # doctest: +SKIP
    >>> solver = maskopt.ConditionalADMM()  # doctest: +SKIP
    >>> plan = maskopt.allocate(model, batches, "per-row", 0.6, solver)  # doctest: +SKIP
    >>> report = maskopt.prune(model, batches, plan, solver)  # doctest: +SKIP
    """
    solver = ContinuationFrankWolfe() if solver is None else solver
    check_solver(solver)
    check_memory(memory)
    if not choice(RULES).fits(rule):
        raise MaskoptError(f"The rule must be one of {', '.join(RULES)}; got {shown(rule)}.")
    if not real(0, 1, below=True).fits(sparsity):
        raise MaskoptError(f"The mean sparsity must lie between 0 and 1, below 1; got {shown(sparsity)}.")
    if not isinstance(seed, int) or not whole(*SEEDS).fits(seed):
        raise MaskoptError(f"The seed must be an integer of at most 64 bits; got {shown(seed)}.")
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
    groups = [[entry] if isinstance(entry, str) else list(entry) for entry in together]
    options = {
        "propagate": propagate,
        "correction": correction,
        "target": target,
        "include": include,
        "exclude": exclude,
        "memory": memory,
    }
    prepared = prepare_batches(model, batches)
    with evaluation_mode(model):
        work = Trials(
            model, selection, prepared, pattern, float(sparsity), solver, pinned, options, progress, together=groups
        )
        if cache is not None:
            work.store = Store(cache, {**work.identity(), "rule": rule, "seed": seed})
        return _planned(work, rule, seed)


def _planned(work: Trials, rule: Rule, seed: int) -> Plan:
    if rule == "uniform" or not work.prunes:
        return work.plan(rule, work.uniform)
    if rule in BLOCK_RULES:
        return work.plan(rule, block_counts(work, rule, measure_blocks(work)))
    work.predict()
    if rule == "atp":
        return work.plan(rule, atp_counts(work))
    if rule == "evo":
        return work.plan(rule, evolved_counts(work, seed))
    if rule == "auto":
        return best_of(work, seed)
    work.expect(2)
    database = work.database(_levels(work))
    losses = _expanded(work, database, seed) if rule == "fisher" else _measured(work, database, work.sizes["losses"])
    work.candidates[rule] = _separable(work, losses)
    return work.plan(rule, work.candidates[rule].counts)


def best_of(
    work: Trials, seed: int, *, fractions: Sequence[float] = (1.0,), offsets: Sequence[float] | None = None
) -> Plan:
    """Try uniform sparsity and what the separable problem gives, with measured losses where they are few; choose.

    Parameters
    ----------
    work : Trials
        After `Trials.predict`.
    seed : int
    fractions : sequence of float
        How far candidates go from uniform sparsity to the solution of the separable problem with measured losses: what
        several changes lose together is more than their sum, or less.
    offsets : sequence of float, optional
        Levels at which layers are solved, less the mean sparsity; by default few where the solver is slow.
    """
    levels = _levels(work, offsets)
    composable = not work.solver.corrects
    work.expect(3 + len(fractions) + 4 * composable)  # trials among them
    work.candidates["uniform"] = Candidate(work.uniform)
    database = work.database(levels)
    if composable:
        work.candidates["fisher"] = _separable(work, _expanded(work, database, seed))
        _improve_in_context(work, database, seed)
    else:
        rule, losses = _losses(work, database, seed)
        work.try_out("uniform")
        behind = _behind(work)
        work.notes["attenuation"] = rate = _rate(work, database, losses, behind)
        attenuated = {
            layer: {count: loss * math.exp(-rate * behind[layer]) for count, loss in curve.items()}
            for layer, curve in losses.items()
        }
        solution = _separable(work, attenuated)
        for fraction in fractions:
            work.candidates[_named(rule, fraction)] = _between(work, solution, fraction)
    for name, candidate in work.candidates.items():
        if candidate.losses is None:
            work.try_out(name)
    best = _best(work)
    if not composable:
        # Losses are those of small changes by themselves: where all of them together are no better, some may be.
        fraction = min(fractions) / 2
        while best == "uniform" and fraction >= _LEAST:
            part = _named(rule, fraction)
            work.candidates[part] = _between(work, solution, fraction)
            work.try_out(part)
            best, fraction = _best(work), fraction / 2
    return work.plan("auto", work.candidates[best].counts, best)


def _best(work: Trials) -> str:
    """Return the name of the candidate of least loss; uniform sparsity unless that one is clearly better."""
    best = min(work.candidates, key=lambda name: work.candidates[name].loss)
    return best if work.candidates[best].clearly_better(work.candidates["uniform"]) else "uniform"


def _named(rule: str, fraction: float) -> str:
    return rule if fraction == 1.0 else f"{fraction:g} of {rule}"


def _levels(work: Trials, offsets: Sequence[float] | None = None) -> dict[str, list[int]]:
    """Return the counts to solve every free layer for: all if they are few, else some around the mean."""
    if offsets is None:
        offsets = _COARSE if work.solver.corrects else _FINE
    levels = {}
    for name, counts in work.counts.items():
        if counts.most <= _FEW:
            wanted: Iterable[int] = range(1, counts.most)
        else:
            wanted = (counts.of(min(_SPARSEST, max(_DENSEST, work.centres[name] + offset))) for offset in offsets)
        levels[name] = sorted({*wanted, work.uniform[name]} - {0, counts.most})
    return levels


def _losses(work: Trials, database: Database, seed: int) -> tuple[str, Curves]:
    """Return the losses of all levels and the name of how they came about: measured where that is quick."""
    probes = {}
    for name in work.counts:
        known = database.measured(work.layers[name])
        end = 1 if len(known) > 3 else 0
        probes[work.layers[name]] = sorted({known[end], known[-1 - end]})
    # Each loss takes half of a forward in the mean, from the layer's block on; the model's head makes up for the rest.
    affordable = int(_SHARE * _PASSES * work.sizes["all"] / sum(map(len, probes.values())))
    windows = min(_WINDOWS, work.sizes["losses"], affordable)
    if windows >= min(_FEWEST, work.sizes["losses"]):
        return "kl", extended_losses(_measured(work, database, windows, probes), database)
    return "fisher", extended_losses(_expanded(work, database, seed, probes, _DRAWS), database)


def _behind(work: Trials) -> dict[Layer, float]:
    """Return the share of the model's blocks behind each free layer: 1 in the first, 0 in the last and outside."""
    behind = {work.layers[name]: 0.0 for name in work.counts}
    last = len(work.selection.blocks) - 1
    for position, layers in enumerate(work.selection.blocks.values()):
        behind |= {
            work.layers[layer.name]: 1 - position / last for layer in layers if last and layer.name in work.counts
        }
    return behind


def _rate(work: Trials, database: Database, losses: Curves, behind: Mapping[Layer, float]) -> float:
    """Return how fast later blocks make up for what is lost before them, as the uniform trial shows.

    A layer's own loss is that of a model whose other layers are dense. A solver that corrects errors upstream takes
    a part of it away in every block behind the layer: exp(-a b) of it is taken to be left where a share b of the
    blocks is behind. The rate a is such that all losses together fall by as much as the uniform trial loses less than
    the model that is composed of the same levels, which nothing corrects.
    """
    uniform = {layer: nearest(database.measured(layer), work.uniform[layer.name]) for layer in losses}
    with database.composed(uniform):
        composed = float(work.held_out.each(work.model).mean())
    return attenuation(
        np.array([losses[layer][uniform[layer]] for layer in losses]),
        np.array([behind[layer] for layer in losses]),
        work.candidates["uniform"].loss / composed if composed > 0 else 1.0,
    )


def _expanded(
    work: Trials,
    database: Database,
    seed: int,
    levels: Mapping[Layer, Sequence[int]] | None = None,
    draws: int = DRAWS,
) -> Curves:
    tell = work.part("losses of layers, expanded")

    def measure() -> Curves:
        return expanded_losses(
            work.model,
            database,
            work.singles,
            first_order=False,
            seed=seed,
            memory=work.memory,
            levels=levels,
            draws=draws,
            progress=tell,
        )

    return work.remembered("losses-expanded", measure)


def _measured(
    work: Trials, database: Database, windows: int, levels: Mapping[Layer, Sequence[int]] | None = None
) -> Curves:
    tell = work.part("losses of layers, measured")
    blocks = {block: [x for x in layers if x.name in work.counts] for block, layers in work.selection.blocks.items()}
    outside = [layer for layer in work.selection.outside if layer.name in work.counts]

    def measure() -> Curves:
        return measured_losses(work.model, blocks, outside, database, work.few(windows), tell, levels)

    return work.remembered("losses-measured", measure)


def _separable(work: Trials, losses: Curves) -> Candidate:
    """Return the counts of least total loss within the budget."""
    units, grids = [], []
    for unit, names in work.members.items():
        parts = []
        for name in names:
            curve = losses[work.layers[name]]
            solved = sorted(curve)
            grid = levels_of(solved[0], solved[-1])  # that of all layers of a unit
            values = interpolated(solved, [curve[count] for count in solved], grid, positive=True)
            parts.append(separable_levels(name, work.counts[name], grid, values))
        units.append(joined(unit, parts))
        grids.append(grid)
    # Levels may not reach down to the budget where they are few.
    budget = max(work.budget, sum(min(unit.costs) for unit in units))
    choice = allocate_levels(units, budget)
    found = {unit: int(grid[i]) for unit, grid, i in zip(work.units, grids, choice.levels, strict=True)}
    return Candidate(work.within(work.of_layers(found)), separable=(choice.loss, choice.lower_bound))


def _between(work: Trials, solution: Candidate, fraction: float) -> Candidate:
    """Return counts on the line from uniform sparsity to a candidate, or beyond it."""
    if fraction == 1.0:
        return solution
    wished = {name: uniform + fraction * (solution.counts[name] - uniform) for name, uniform in work.uniform.items()}
    return Candidate(
        work.within({name: min(work.counts[name].most, max(1, round(wish))) for name, wish in wished.items()})
    )


def _improve_in_context(work: Trials, database: Database, seed: int) -> None:
    """Improve the best of the candidates and of the published rules around the model composed of solved layers.

    Sequential separable programming: the divergence is expanded to second order around the composed model, the
    separable problem is solved within a trust region, and what does not lower the divergence halves the region. One or
    two gradients of the model serve all layers and levels of a round.
    """
    statistics = measure_blocks(work)
    starts = {name: candidate.counts for name, candidate in work.candidates.items()}
    starts |= {rule: block_counts(work, rule, statistics) for rule in BLOCK_RULES}
    grid = {name: database.measured(work.layers[name]) for name in work.counts}
    composed = {
        start: {name: nearest(grid[name], count) for name, count in counts.items()} for start, counts in starts.items()
    }
    losses = {start: _composed_loss(work, database, counts) for start, counts in composed.items()}
    start = min(losses, key=lambda name: losses[name])
    work.candidates[start] = Candidate(starts[start])
    best, least, radius = composed[start], losses[start], _RADIUS
    tell = work.part("improvement in context")
    for number in range(_ROUNDS):
        near = {
            name: [count for count in grid[name] if abs(count - best[name]) <= (radius + 1e-9) * counts.most]
            for name, counts in work.counts.items()
        }
        with database.composed({work.layers[name]: count for name, count in best.items()}):
            curves = expanded_losses(
                work.model,
                database,
                work.singles,
                first_order=True,
                seed=(seed + number) % 2**63,
                memory=work.memory,
                levels={work.layers[name]: counts for name, counts in near.items()},
            )
        tell((number + 1) / _ROUNDS)
        trial = _within_region(work, near, curves)
        loss = math.inf if trial is None else _composed_loss(work, database, trial)
        if trial is not None and loss < least:
            best, least = trial, loss
            continue
        radius /= 2
        if all(len(counts) == 1 for counts in near.values()) or radius < 0.04:
            break
    work.candidates["in context"] = Candidate(work.within(best))


def _within_region(work: Trials, near: Mapping[str, Sequence[int]], curves: Curves) -> dict[str, int] | None:
    """Return the counts of least expanded loss among some; None where none of them meet the budget."""
    layers = {
        name: separable_levels(
            name, counts, np.array(near[name]), np.array([curves[work.layers[name]][count] for count in near[name]])
        )
        for name, counts in work.counts.items()
    }
    units = [joined(unit, [layers[name] for name in names]) for unit, names in work.members.items()]
    if sum(min(unit.costs) for unit in units) > work.budget:
        return None
    chosen = allocate_levels(units, work.budget).levels
    return work.of_layers({unit: near[unit][level] for unit, level in zip(work.units, chosen, strict=True)})


def _composed_loss(work: Trials, database: Database, counts: Mapping[str, int]) -> float:
    """Return the divergence of the model composed of solved layers."""
    with database.composed({work.layers[name]: count for name, count in counts.items()}):
        return float(work.singles.each(work.model).mean())
