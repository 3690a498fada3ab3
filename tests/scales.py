"""Layers of extreme scales and what solvers claim of them, held against enumeration in whole numbers.

Nothing here adds up floats to decide: data are turned into integers, and a claim is called false if it is wrong by more
than `ULPS` units in the last place of the number that is true. Shared by tests/properties/test_scales.py and
benchmarks/false_claims.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from maskopt.bounds import mask_bound
from maskopt.errors import MaskoptError
from maskopt.oracles import HasFaces, MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem, QuadraticForm, Saliency
from maskopt.solvers import (
    DIRECTIONS,
    BranchAndBound,
    BruteForce,
    ContinuationFrankWolfe,
    FrankWolfe,
    Magnitude,
    OneSwap,
    Result,
    Scip,
    Solver,
    SparseFW,
    Status,
    Wanda,
    solve,
)
from tests.helpers import ALL_SETS, MATROIDS, Shape, banned_of, every_mask, groups_of, held_of

ULPS = 8
SHARES = (0.5, 0.5, 0.34, 0.75, 0.0, 1.0)
SHAPES: tuple[Shape, ...] = ((1, 6), (1, 8), (1, 9), (2, 4), (2, 5), (3, 4), (2, 6), (1, 10), (4, 2), (3, 1), (1, 1))
TILES: tuple[Shape, ...] = ((4, 4), (3, 3), (2, 4), (3, 6), (2, 2))  # for transposable sets


# Whole numbers


def whole(values: Tensor) -> tuple[np.ndarray, Fraction]:
    """Return integers and a unit such that values = integers * unit exactly."""
    ratios = [float(value).as_integer_ratio() for value in values.flatten().tolist()]
    largest = max(denominator for _, denominator in ratios)
    numbers = np.empty(len(ratios), dtype=object)
    numbers[:] = [numerator * (largest // denominator) for numerator, denominator in ratios]
    return numbers.reshape(tuple(values.shape)), Fraction(1, largest)


def exact_errors(problem: Problem, members: Tensor) -> tuple[np.ndarray, Fraction]:
    """Return every row's objective of every member, shape (members, rows), as integers times a unit."""
    kept = members.numpy().astype(int).astype(object)
    if isinstance(problem, Saliency):
        scores, unit = whole(problem.scores)
        return ((1 - kept) * scores).sum(2), unit
    if isinstance(problem, QuadraticForm):
        (matrix, one), (linear, two) = whole(problem.quadratic), whole(problem.linear)
        unit = min(one, two)
        matrix, linear = matrix * int(one / unit), linear * int(two / unit)
        forms = np.stack([((kept[:, r] @ matrix) * kept[:, r]).sum(1) for r in range(kept.shape[1])], 1)
        return forms + (kept * linear).sum(2), unit
    assert isinstance(problem, LayerReconstruction)
    pair, unit = whole(torch.stack((problem.target, problem.weight)))
    gram, gram_unit = whole(problem.gram)
    off = pair[0] - kept * pair[1]
    forms = np.stack([((off[:, r] @ gram) * off[:, r]).sum(1) for r in range(off.shape[1])], 1)
    # A Gram may be indefinite by rounding; an error is not negative.
    return np.maximum(forms, 0), unit * unit * gram_unit


@functools.lru_cache(maxsize=4096)
def set_of(name: str, shape: Shape, fraction: float) -> tuple[MaskSet, Tensor] | None:
    """Return a set and its members; None where there are none."""
    try:
        masks = ALL_SETS[name](shape, fraction)
        masks.check(shape)
    except (MaskoptError, StopIteration):
        return None
    members = every_mask(masks, shape)
    return (masks, members) if len(members) else None


# Data


def _sizes(random: np.random.Generator, number: int) -> np.ndarray:
    return 10.0 ** random.choice([3, 5, 7, 8, 10, 12], number)


def _places(random: np.random.Generator, number: int, some: int) -> np.ndarray:
    return random.choice(number, min(number, some), replace=False)


def _one_weight(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w.flat[random.integers(w.size)] *= _sizes(random, 1)[0]


def _one_small_weight(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w.flat[random.integers(w.size)] /= _sizes(random, 1)[0]


def _some_weights(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    places = _places(random, w.size, int(random.integers(2, 5)))
    w.flat[places] *= _sizes(random, len(places)) ** random.choice([-1.0, 1.0, 1.0], len(places))


def _equal_large_weights(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    places = _places(random, w.size, int(random.integers(2, 4)))
    w.flat[places] = random.choice([-1.0, 1.0], len(places)) * _sizes(random, 1)[0]


def _all_weights(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w *= 10.0 ** random.integers(-12, 13, w.shape)


def _one_channel(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x[random.integers(len(x))] *= _sizes(random, 1)[0] ** random.choice([1.0, -1.0])


def _some_channels(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    places = _places(random, len(x), int(random.integers(2, 5)))
    x[places] *= (_sizes(random, len(places)) ** random.choice([-1.0, 1.0], len(places)))[:, None]


def _counterweight(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    """A large channel with small weights: products are ordinary."""
    place, size = random.integers(len(x)), _sizes(random, 1)[0]
    x[place] *= size
    w[:, place] /= size


def _one_row(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w[random.integers(len(w))] *= _sizes(random, 1)[0] ** random.choice([1.0, -1.0])


def _cancelling(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    """Two large weights of opposite signs on copies, or near copies, of one input."""
    if len(x) < 2:
        return
    one, two = random.choice(len(x), 2, replace=False)
    x[two] = x[one] * (1.0 + random.choice([0.0, 1e-9, 1e-4]))
    w[:, one] *= _sizes(random, 1)[0]
    w[:, two] = -w[:, one] * (1.0 + random.choice([0.0, 1e-12, 1e-6]))


def _copies(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x[random.integers(len(x))] = x[random.integers(len(x))]
    w[:, random.integers(w.shape[1])] = w[:, random.integers(w.shape[1])]


def _dead(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x[_places(random, len(x), int(random.integers(1, 3)))] = 0.0


def _zeros(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w.flat[_places(random, w.size, int(random.integers(1, 4)))] = 0.0


def _ties(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w[:], x[:] = np.round(w), np.round(x)


def _low_rank(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x[:, int(random.integers(1, 3)) :] = 0.0


def _nearly_singular(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x[:, 1:] *= 10.0 ** -random.choice([4.0, 6.0, 8.0, 12.0])


def _huge(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w *= 10.0 ** random.choice([15, 18, 100, 140])


def _tiny(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    w *= 10.0 ** -float(random.choice([15, 20, 40, 100, 150, 300]))


def _tiny_inputs(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    x *= 10.0 ** -float(random.choice([10, 19, 22, 60, 150]))


def _nothing(random: np.random.Generator, w: np.ndarray, x: np.ndarray) -> None:
    pass


SCALINGS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], None]] = {
    "ordinary": _nothing,
    "one weight larger": _one_weight,
    "one weight smaller": _one_small_weight,
    "some weights": _some_weights,
    "equal large weights": _equal_large_weights,
    "all weights": _all_weights,
    "one channel": _one_channel,
    "some channels": _some_channels,
    "channel against weight": _counterweight,
    "one row": _one_row,
    "cancelling weights": _cancelling,
    "copies": _copies,
    "dead inputs": _dead,
    "zero weights": _zeros,
    "ties": _ties,
    "low rank": _low_rank,
    "nearly singular": _nearly_singular,
    "huge": _huge,
    "tiny": _tiny,
    "tiny inputs": _tiny_inputs,
    "asymmetric": _nothing,
}


def _asymmetric(random: np.random.Generator, gram: np.ndarray) -> np.ndarray:
    """Return the Gram with an asymmetry that is accepted still: everywhere, or in one entry."""
    size = np.abs(gram).max() * 10.0 ** -float(random.choice([4.2, 5.0, 6.0, 7.0, 9.0]))
    if random.random() < 0.5:
        noise = random.uniform(-1.0, 1.0, gram.shape)
        return gram + size * (noise - noise.T) / 4
    changed = gram.copy()
    changed[random.integers(len(gram)), random.integers(len(gram))] += size * 0.1
    return changed


def layer_of(random: np.random.Generator, shape: Shape, scaling: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight and a Gram, float64."""
    d = shape[1]
    weight = random.standard_normal(shape)
    x = random.standard_normal((d, int(random.integers(max(1, d // 2), 2 * d + 2))))
    x += random.choice([0.0, 1.0, 3.0]) * random.standard_normal((1, x.shape[1]))
    SCALINGS[scaling](random, weight, x)
    if random.random() < 0.25:  # two kinds at once
        SCALINGS[str(random.choice(list(SCALINGS)))](random, weight, x)
    gram = x @ x.T
    return weight, _asymmetric(random, gram) if scaling == "asymmetric" else gram


def problem_of(random: np.random.Generator, shape: Shape, scaling: str, kind: str) -> Problem | None:
    """Return a problem; None where the data are refused."""
    with np.errstate(all="ignore"):
        weight, gram = layer_of(random, shape, scaling)
    dtype = torch.float32 if random.random() < 0.3 else torch.float64
    w, g = torch.from_numpy(weight).to(dtype), torch.from_numpy(gram).to(dtype)
    try:
        if kind == "saliency":
            scores = w.abs() * g.diagonal().clamp_min(0).sqrt() if random.random() < 0.5 else w
            return Saliency(scores) if bool(scores.isfinite().all()) else None
        if kind == "form":
            form = g if random.random() < 0.7 else g - g.diagonal().mean() * torch.eye(len(g), dtype=dtype)
            return QuadraticForm(form, w)
        if kind == "target":
            change = random.standard_normal(shape) * weight * random.choice([1e-3, 1.0, 1e6])
            return LayerReconstruction(w, g, target=w + torch.from_numpy(change).to(dtype))
        if kind == "towards":
            cross = g + torch.from_numpy(random.standard_normal(gram.shape)).to(dtype) * 0.1 * g.diagonal().mean()
            return LayerReconstruction.towards(w, g, cross)
        return LayerReconstruction(w, g)
    except MaskoptError:
        return None


# Solvers


@dataclass(frozen=True)
class Claimant:
    """A solver, the gap with which it may call a mask optimal, and what it goes together with."""

    solver: Solver
    gap: float
    sets: tuple[str, ...]
    kinds: tuple[str, ...] = ("layer",)
    proves: bool = False
    weight: float = 1.0
    """How often it is drawn, relatively: slow ones less often."""


def _sets(*parts: str, among: list[str] | None = None) -> tuple[str, ...]:
    return tuple(name for name in (among or ALL_SETS) if not parts or any(part in name for part in parts))


_EVERY = ("layer", "layer", "target", "towards", "saliency", "form")
_SWAPS = tuple(name for name in MATROIDS)
_FACES = tuple(name for name in ALL_SETS if name not in ("budget", "bytes"))
CLAIMANTS: dict[str, Claimant] = {
    "branch-and-bound": Claimant(BranchAndBound(start=Wanda()), 1e-9, tuple(MATROIDS), proves=True),
    "branch-and-bound from magnitude": Claimant(
        BranchAndBound(start=Magnitude()), 1e-9, tuple(MATROIDS), proves=True, weight=0.5
    ),
    "branch-and-bound, few nodes": Claimant(
        BranchAndBound(start=Wanda(), nodes=3, batch=1, iterations=3), 1e-9, tuple(MATROIDS), weight=0.5
    ),
    "branch-and-bound, wide gap": Claimant(
        BranchAndBound(start=Magnitude(), gap=0.1), 0.1, tuple(MATROIDS), proves=True, weight=0.3
    ),
    "scip": Claimant(Scip(start=Wanda()), 1.01e-4, tuple(ALL_SETS), ("layer", "target"), proves=True, weight=0.3),
    "scip raw": Claimant(Scip(form="raw", start=Wanda()), 1.01e-4, tuple(ALL_SETS), proves=True, weight=0.3),
    "scip, wide gap": Claimant(Scip(start=Magnitude(), gap=0.2), 0.21, tuple(ALL_SETS), proves=True, weight=0.2),
    "brute-force": Claimant(BruteForce(), 1.1e-10, tuple(ALL_SETS), _EVERY, proves=True, weight=3.0),
    "one-swap": Claimant(OneSwap(start=Magnitude()), 0.0, _SWAPS, ("layer", "layer", "target", "towards"), weight=3.0),
    "continuation": Claimant(
        ContinuationFrankWolfe(iterations=8), 0.0, tuple(ALL_SETS), ("layer", "layer", "target"), weight=0.5
    ),
    "sparsefw": Claimant(SparseFW(iterations=12), 0.0, tuple(ALL_SETS), ("layer", "layer", "target", "towards")),
}
for _name in DIRECTIONS:
    _faces = _name in ("dicg", "blended-dicg")
    _groups = _name == "block-coordinate"
    CLAIMANTS[f"frank-wolfe {_name}"] = Claimant(
        FrankWolfe(_name, iterations=12, relative_gap=0.0, polish=False),
        0.0,
        _FACES if _faces else tuple(MATROIDS) if _groups else tuple(ALL_SETS),
        _EVERY,
        weight=0.5,
    )
BOUNDS = {"shift bound": 0.4, "sdp bound": 0.7, "cuts bound": 0.15}
ORACLE = "oracle"


def bound_sets() -> tuple[str, ...]:
    """Return the sets with a fixed number of entries in every row."""
    names = ("per-row", "n:m", "row counts", "protected rows", "restricted rows")
    return tuple(name for name in names if name in ALL_SETS)


# Judging claims


@dataclass
class Finding:
    """What was found of one instance."""

    masks: str
    solver: str
    scaling: str
    kind: str
    false: list[str] = field(default_factory=list)
    proves: bool = False
    proven: bool = False
    refused: bool = False
    status: str = ""

    @property
    def where(self) -> str:
        return f"{self.solver} / {self.masks} / {self.scaling} / {self.kind}: {', '.join(self.false)} ({self.status})"


def above(one: Fraction, other: Fraction, relative: float = 0.0) -> bool:
    """Whether one number is larger than another by more than a fraction of it and a few units in the last place."""
    return one > other + abs(other) * (Fraction(relative) + Fraction(ULPS, 2**53)) + Fraction(5e-324) * ULPS


def check_bound(bound: Tensor, best: list[Fraction], found: list[str], name: str = "bound") -> None:
    """Note it if a bound is above the optimum of its row block."""
    if bool(bound.isnan().any()):
        found.append(f"{name} is NaN")
        return
    pairs = zip(bound.tolist(), best, strict=True)
    if any(above(Fraction(value), minimum) for value, minimum in pairs if value > -math.inf):
        found.append(name)


def check_result(
    problem: Problem, masks: MaskSet, members: Tensor, result: Result, claimant: Claimant, finding: Finding
) -> None:
    """Hold every claim of a result against the errors of all members."""
    height = masks.row_block(problem.shape)
    errors, unit = exact_errors(problem, members)
    blocks = errors.reshape(len(members), -1, height).sum(2)
    best = [int(value) * unit for value in blocks.min(0)]
    place = (members == result.mask).flatten(1).all(1).nonzero().flatten().tolist()
    if not place:
        finding.false.append("mask outside the set")
        return
    mine = [int(value) * unit for value in blocks[place[0]]]
    reported = result.objective.view(-1, height).sum(1)
    if any(not math.isfinite(value) for value in reported.tolist()):
        finding.false.append("objective")
        return
    sizes = [int(value) * unit for value in np.abs(errors[place[0]]).reshape(-1, height).sum(1)]
    for value, truth, size in zip(reported.tolist(), mine, sizes, strict=True):
        # Rows whose terms cancel may lose some digits, not most of them.
        if abs(Fraction(value) - truth) > size * Fraction(1, 2**30) + Fraction(5e-324) * ULPS:
            finding.false.append("objective")
            break
    if result.lower_bound is not None:
        check_bound(result.lower_bound, best, finding.false)
    finding.status = result.status.name
    finding.proven = result.status in (Status.OPTIMAL, Status.WITHIN_GAP)
    if finding.proven:
        gap = claimant.gap
        for value, truth in zip(mine, best, strict=True):
            if above(value - gap * abs(value) if gap else value, truth):
                finding.false.append(result.status.name)
                break
        if result.lower_bound is None:
            finding.false.append("no bound")
        elif any(
            value - bound > (gap + ULPS * 2.0**-53) * float(size) + ULPS * 5e-324
            for value, bound, size in zip(reported.tolist(), result.lower_bound.tolist(), sizes, strict=True)
        ):
            finding.false.append("gap")
    if result.status is Status.LOCAL_OPTIMUM:
        assert isinstance(masks, PartitionMatroid)
        if improving_swap(problem, masks, result.mask):
            finding.false.append("LOCAL_OPTIMUM")


def improving_swap(problem: Problem, masks: PartitionMatroid, mask: Tensor) -> bool:
    """Whether an exchange within a group lowers the error, in whole numbers."""
    fixed = held_of(masks) | banned_of(masks)
    flat, others = mask.flatten(), []
    for group in groups_of(masks, (mask.shape[0], mask.shape[1])):
        free = [place for place in group if place not in fixed]
        for old in (place for place in free if flat[place]):
            for new in (place for place in free if not flat[place]):
                other = flat.clone()
                other[old], other[new] = False, True
                others.append(other.view(mask.shape))
    if not others:
        return False
    errors, unit = exact_errors(problem, torch.stack([mask, *others]))
    totals = errors.sum(1)
    return above(int(totals[0]) * unit, int(totals[1:].min()) * unit)


def cost_of(random: np.random.Generator, shape: Shape) -> Tensor:
    """Return costs of any scale."""
    cost = random.standard_normal(shape)
    kind = random.integers(7)
    if kind == 1:
        cost = np.round(2 * cost)
    if kind == 2:
        cost *= 10.0 ** random.integers(-12, 13, shape)
    if kind == 3:
        places = _places(random, cost.size, int(random.integers(1, 4)))
        cost.flat[places] *= _sizes(random, len(places)) ** random.choice([-1.0, 1.0], len(places))
    if kind == 4:
        cost = np.round(2 * cost) * 5e-324
    if kind == 5:
        cost *= 10.0 ** random.choice([-300, -45, 30, 200])
    if kind == 6:
        cost = np.round(2 * cost) + 1e10 * np.round(random.standard_normal(shape))
    found = torch.from_numpy(cost)
    return found.float().clamp(-3e38, 3e38) if random.random() < 0.3 else found


def check_oracle(random: np.random.Generator, masks: MaskSet, members: Tensor, finding: Finding) -> None:
    """Hold oracle, bound and in-face oracle against the costs of all members."""
    shape = (members.shape[1], members.shape[2])
    cost = cost_of(random, shape)
    numbers, unit = whole(cost)
    height = masks.row_block(shape)

    def totals(chosen: Tensor) -> np.ndarray:
        return (chosen.numpy().astype(int).astype(object) * numbers).reshape(len(chosen), -1, height * shape[1]).sum(2)

    def compare(vertex: Tensor, among: Tensor, name: str) -> None:
        if not bool((vertex.bool() == members).flatten(1).all(1).any()):
            finding.false.append(f"{name} outside the set")
        elif masks.exact:
            size = abs(numbers).reshape(-1, height * shape[1]).sum(1)
            chosen, minimum = totals(vertex.bool().unsqueeze(0))[0], totals(among).min(0)
            # A unit's cost is a sum of floats, rounded; so is that of a run.
            noise = 2**48 if "unit" in finding.masks or finding.masks in _SUMMED else None
            if any(c > b + (0 if noise is None else s // noise) for c, b, s in zip(chosen, minimum, size, strict=True)):
                finding.false.append(name)

    compare(masks.lmo(cost), members, "vertex")
    minimum = [int(value) * unit for value in totals(members).min(0)]
    bound = masks.lmo_bound(cost)
    if any(Fraction(float(value)) > low for value, low in zip(bound, minimum, strict=True)):
        size = [int(value) * unit for value in abs(numbers).reshape(-1, height * shape[1]).sum(1)]
        slack = 2**48 if "unit" in finding.masks or finding.masks in _SUMMED else None
        if slack is None or any(
            Fraction(float(value)) > low + s / slack for value, low, s in zip(bound, minimum, size, strict=True)
        ):
            finding.false.append("least")
    if isinstance(masks, HasFaces) and "at most" not in finding.masks:
        chosen = members[torch.from_numpy(random.integers(len(members), size=3))]
        at = chosen.to(cost.dtype).mean(0)
        face = members[((members | ~chosen.all(0)) & (~members | chosen.any(0))).flatten(1).all(1)]
        compare(masks.inface(cost, at), face, "inface")


_SUMMED = ("whole columns", "whole rows", "units", "vectors", "at most units", "restricted columns", "runs")


def examine(seed: int, number: int, solver: str | None = None, scaling: str | None = None) -> Finding:
    """Make the instance with this number, ask a solver about it, and return what is false about its answer."""
    random = np.random.default_rng([seed, number])
    names = [*CLAIMANTS, *BOUNDS, ORACLE]
    if solver is None:
        weights = np.array([*(c.weight for c in CLAIMANTS.values()), *BOUNDS.values(), 5.0])
        solver = str(random.choice(names, p=weights / weights.sum()))
    scaling = scaling or str(random.choice(list(SCALINGS)))
    claimant = CLAIMANTS.get(solver)
    among = claimant.sets if claimant else bound_sets() if solver in BOUNDS else tuple(ALL_SETS)
    while True:
        name = str(random.choice(among))
        shapes = TILES if "transposable" in name else SHAPES
        found = set_of(name, shapes[random.integers(len(shapes))], float(random.choice(SHARES)))
        if found is not None:
            break
    masks, members = found
    kind = str(random.choice(claimant.kinds)) if claimant else "layer"
    finding = Finding(name, solver, scaling, kind if solver != ORACLE else "costs")
    finding.proves = claimant is not None and claimant.proves
    if solver == ORACLE:
        check_oracle(random, masks, members, finding)
        return finding
    problem = problem_of(random, (members.shape[1], members.shape[2]), scaling, kind)
    if problem is None:
        finding.refused = True
        return finding
    try:
        if claimant is None:
            assert isinstance(problem, LayerReconstruction)
            bound = mask_bound(problem, masks, solver.split()[0])  # type: ignore[arg-type]
            errors, unit = exact_errors(problem, members)
            check_bound(bound, [int(value) * unit for value in errors.min(0)], finding.false)
        else:
            start = members[int(random.integers(len(members)))] if random.random() < 0.3 else None
            needs = kind in ("saliency", "form") and claimant.solver.start is not None
            start = members[0] if needs and start is None else start
            with torch.no_grad():
                result = solve(problem, masks, claimant.solver, start=start)
            check_result(problem, masks, members, result, claimant, finding)
    except MaskoptError as error:
        finding.refused = True
        finding.status = str(error)
    except Exception as error:
        finding.false.append(f"{type(error).__name__}: {str(error)[:80]}")
    return finding
