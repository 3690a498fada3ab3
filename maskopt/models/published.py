"""Published rules for the sparsity of layers, measured on a model: OWL, DLP, AlphaPruning, LSA, ATP, EvoPress."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maskopt.allocation.evolution import evolve
from maskopt.allocation.rules import alpha_pruning, atp, atp_slopes, dlp, hill_exponent, lsa, outlier_share, owl
from maskopt.models.layers import Layer
from maskopt.models.trials import Candidate, Trials, nearest
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Result, Wanda

__all__ = ["BLOCK_RULES", "Statistics", "atp_counts", "block_counts", "evolved_counts", "measure_blocks"]

BLOCK_RULES = {"owl": owl, "dlp": dlp, "alpha": alpha_pruning, "lsa": lsa}
"""Rules that look at blocks: functions of a statistic of each, the blocks' sizes, and the mean sparsity."""
Statistics = Mapping[str, Sequence[float]]
"""What each rule measures of every block."""

_SLOPES = 8  # as many as trials can tell apart; the authors step through all
_GENERATIONS, _OFFSPRING = 40, 16  # a tenth of the authors' 400 x 64, at which a 135 M model would take days here
_STEPS = (2, 8)  # sequences in the first steps of the selection; the last has all


def blocks_of(work: Trials) -> list[list[Layer]]:
    """Return the free layers of each block, those outside the blocks one by one."""
    groups = [list(layers) for layers in work.selection.blocks.values()]
    groups += [[layer] for layer in work.selection.outside]
    free = [[layer for layer in layers if layer.name in work.counts] for layers in groups]
    return [layers for layers in free if layers]


def measure_blocks(work: Trials) -> Statistics:
    """Measure what the rules need on the dense model's states: Wanda's scores and errors at 50 %, and spectra.

    Parameters
    ----------
    work : Trials
    """
    scores: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def observe(layer: Layer, problem: LayerReconstruction, result: Result) -> None:
        values = problem.weight.abs() * problem.gram.diagonal().clamp_min(0.0).sqrt()
        scores[layer.name] = values.float().cpu()
        errors[layer.name] = result.total

    work.observe_dense("statistics of the layers", PerRow(0.5), Wanda(), observe)
    blocks = blocks_of(work)
    return {
        "owl": [outlier_share([scores[layer.name] for layer in layers]) for layers in blocks],
        "dlp": [float(torch.cat([scores[layer.name].flatten() for layer in layers]).median()) for layers in blocks],
        "alpha": [
            math.fsum(hill_exponent(layer.oriented(layer.weight.detach())) for layer in layers) / len(layers)
            for layers in blocks
        ],
        "lsa": [math.fsum(errors[layer.name] for layer in layers) for layers in blocks],
    }


def block_counts(work: Trials, rule: str, statistics: Statistics) -> dict[str, int]:
    """Return the counts of a rule that looks at blocks."""
    return _by_block(work, BLOCK_RULES[rule](statistics[rule], _sizes(work), work.sparsity))


def atp_counts(work: Trials) -> dict[str, int]:
    """Try slopes of ATP and return the counts of the best."""
    sizes = _sizes(work)
    slopes = atp_slopes(work.sparsity, len(sizes)) or [0.0]
    tried = dict.fromkeys(slopes[round(index * (len(slopes) - 1) / (_SLOPES - 1))] for index in range(_SLOPES))
    work.expect(len(tried))
    for slope in tried:
        name = f"slope {slope:.3g}"
        work.candidates[name] = Candidate(_by_block(work, atp(len(sizes), sizes, work.sparsity, slope)))
        work.try_out(name)
    return min(work.candidates.values(), key=lambda candidate: candidate.loss).counts


def evolved_counts(work: Trials, seed: int) -> dict[str, int]:
    """Search the levels of solved layers by evolution, on models composed of them."""
    work.expect(2)
    names = list(work.units)
    database = work.database(_even_levels(work))
    grid = [database.measured(work.layers[name]) for name in names]
    steps = [work.few(size) for size in _STEPS] + [work.singles]

    def counts_of(choice: Sequence[int]) -> dict[str, int]:
        return work.of_layers({name: counts[one] for name, counts, one in zip(names, grid, choice, strict=True)})

    def evaluate(candidates: Sequence[Sequence[int]], step: int) -> list[float]:
        found = []
        for candidate in candidates:
            with database.composed({work.layers[name]: count for name, count in counts_of(candidate).items()}):
                found.append(float(steps[min(step, len(_STEPS))].each(work.model).mean()))
        return found

    tell = work.part("evolution")
    evolved = evolve(
        [len(levels) for levels in grid],
        [work.units[name].cost * work.units[name].most for name in names],
        [levels.index(nearest(levels, work.uniform[name])) for name, levels in zip(names, grid, strict=True)],
        evaluate,
        generations=_GENERATIONS,
        offspring=_OFFSPRING,
        seed=seed,
        progress=lambda done, total: tell(done / total),
    )
    return work.within(counts_of(evolved.choice))


def _even_levels(work: Trials) -> dict[str, list[int]]:
    """Return counts at equal distances: raising one layer and lowering another of its size keeps the sum."""
    levels = {}
    for name, counts in work.counts.items():
        apart = max(1, round(0.05 * counts.most))
        wanted = range(work.uniform[name] % apart, counts.most, apart)
        levels[name] = [count for count in wanted if 0 < count < counts.most]
    return levels


def _sizes(work: Trials) -> list[int]:
    return [sum(layer.weight.numel() for layer in layers) for layers in blocks_of(work)]


def _by_block(work: Trials, sparsities: Sequence[float]) -> dict[str, int]:
    pairs = zip(blocks_of(work), sparsities, strict=True)
    wished = {layer.name: value for layers, value in pairs for layer in layers}
    return work.wished(wished)
