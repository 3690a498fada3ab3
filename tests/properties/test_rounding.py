"""Rounding on every set and edge-case layers: membership, quality and the proven slack, against enumeration."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.solvers import rounding
from maskopt.solvers.base import Monitor
from maskopt.solvers.one_swap import descend
from tests.helpers import (
    SETS,
    errors_of,
    every_mask,
    examples,
    feasible,
    layers,
    magnitudes,
    minimum_errors,
    sets,
    shapes,
)

DTYPES = [torch.float64, torch.float32]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def members(masks: MaskSet, shape: tuple[int, int], seed: int, number: int) -> Tensor:
    cost = torch.randn((number, *shape), generator=seeded(seed), dtype=torch.float64)
    return torch.stack([masks.lmo_mask(one) for one in cost])


def mixed(masks: MaskSet, shape: tuple[int, int], seed: int, number: int = 5) -> Tensor:
    """Return a random convex combination of random masks."""
    fraction = torch.rand(number, generator=seeded(seed + 1), dtype=torch.float64).square()
    return torch.einsum("n,nrd->rd", fraction / fraction.sum(), members(masks, shape, seed, number).double())


def eighths(masks: MaskSet, shape: tuple[int, int], seed: int) -> Tensor:
    """Return the mean of eight masks: full of ties, and exact in every type."""
    return members(masks, shape, seed, 8).double().mean(0)


def iterate(problem: LayerReconstruction, masks: PartitionMatroid, steps: int) -> Tensor:
    """Return the relaxed mask after plain Frank-Wolfe steps from the center."""
    point = problem.evaluate(masks.center(problem.shape, problem.dtype, problem.device))
    for step in range(steps):
        direction = problem.hvp(masks.lmo(point.gradient) - point.x)
        problem.advance(point, direction, torch.full((problem.shape[0], 1), 2.0 / (step + 3), dtype=problem.dtype))
    return point.x


def relaxed(problem: LayerReconstruction, masks: PartitionMatroid, kind: str, seed: int) -> Tensor:
    shape = problem.shape
    if kind == "center":
        return masks.center(shape, problem.dtype, problem.device)
    if kind == "mask":
        return members(masks, shape, seed, 1)[0].to(problem.dtype)
    if kind == "iterate":
        return iterate(problem, masks, 12)
    return (mixed if kind == "mixed" else eighths)(masks, shape, seed).to(problem.dtype)


kinds = st.sampled_from(["center", "mask", "iterate", "mixed", "eighths"])
seeds = st.integers(0, 999)


def roundings(
    problem: LayerReconstruction, masks: PartitionMatroid, x: Tensor, gradient: Tensor, seed: int
) -> dict[str, Tensor]:
    return {
        "top-k": rounding.top_k(masks, x),
        "gradient": rounding.gradient_aware(masks, x, gradient),
        "much gradient": rounding.gradient_aware(masks, x, gradient, 3.0),
        "best weight": rounding.best_weight(problem, masks, x, gradient),
        "dependent": rounding.dependent(masks, x, seeded(seed)),
        "ordered": rounding.dependent(masks, x, seeded(seed), order=gradient),
        "best of": rounding.best_of(problem, masks, x, 4, seeded(seed)),
    }


@given(st.data(), layers(rows=(1, 5), d=(1, 12)), kinds, seeds)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETS)
@examples(8)
def test_roundings_are_members_reproducible_and_polish_helps(
    name: str, dtype: torch.dtype, data: st.DataObject, layer: object, kind: str, seed: int
) -> None:
    masks, problem = data.draw(sets(layer.shape, [name])), layer.problem(dtype)
    x = relaxed(problem, masks, kind, seed)
    gradient, copy = problem.evaluate(x).gradient, x.clone()
    found = roundings(problem, masks, x, gradient, seed)
    again = roundings(problem, masks, x, gradient, seed)
    for rule, mask in found.items():
        assert mask.shape == x.shape
        assert masks.contains(mask), rule
        assert feasible(masks, mask), rule
        assert torch.equal(mask, again[rule]), rule
        polished = descend(problem, masks, mask, Monitor("test", None, None))[0]
        before, after = problem.objective(mask), problem.objective(polished)
        assert bool((after <= before).all() if masks.separable else after.sum() <= before.sum()), rule
        if kind == "mask":
            assert torch.equal(mask, x.bool()), rule
    assert torch.equal(x, copy)
    errors = {rule: problem.objective(mask).view(-1, masks.row_block(x.shape)).sum(1) for rule, mask in found.items()}
    for rule in ("best weight", "best of"):
        assert bool((errors[rule] <= errors["top-k"]).all()), rule
    assert bool((errors["best weight"] <= errors["gradient"]).all())


@given(st.data(), seeds, st.sampled_from([1e-7, 1e-6, 0.3, 40.0]))
@examples(150)
def test_dependent_masks_are_members_whatever_the_point(data: st.DataObject, seed: int, noise: float) -> None:
    """Rounding may move a point out of the hull; the masks are members even for much larger errors."""
    shape = data.draw(shapes(6, 24))
    masks = data.draw(sets(shape))
    error = torch.randn(shape, generator=seeded(seed + 2), dtype=torch.float64) * noise
    x = (mixed(masks, shape, seed) + error).to(data.draw(st.sampled_from([*DTYPES, torch.bfloat16])))
    for mask in rounding.dependent(masks, x, seeded(seed), samples=3):
        assert feasible(masks, mask)


@given(st.data(), seeds, st.sampled_from(DTYPES))
@examples(100)
def test_decided_entries_stay(data: st.DataObject, seed: int, dtype: torch.dtype) -> None:
    shape = data.draw(shapes(6, 24))
    masks = data.draw(sets(shape))
    x = mixed(masks, shape, seed, 3).to(dtype)
    kept, pruned = x > 1 - 1e-9, x < 1e-9
    # Noise of a few units in the last place changes no decision.
    x += 4 * torch.finfo(dtype).eps * (torch.rand(shape, generator=seeded(seed), dtype=dtype) - 0.5) * (kept | pruned)
    for mask in rounding.dependent(masks, x, seeded(seed), samples=5):
        assert feasible(masks, mask)
        assert bool((mask | ~kept).all())
        assert not bool((mask & pruned).any())
    noisy = (kept | pruned).all()
    if noisy:
        assert torch.equal(rounding.gradient_aware(masks, x, x.flip(1) * 3 - x.flip(0), 100.0), kept)


@given(st.data(), seeds, st.sampled_from([0.0, 1 / 64, 1.0]))
@examples(80)
def test_equal_values_of_any_type_give_equal_masks(data: st.DataObject, seed: int, weight: float) -> None:
    shape = data.draw(shapes(5, 16))
    masks = data.draw(sets(shape))
    x = eighths(masks, shape, seed)
    gradient = torch.randn(shape, generator=seeded(seed)).double()
    drawn = rounding.dependent(masks, x, seeded(seed), samples=2)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(rounding.top_k(masks, x), rounding.top_k(masks, x.to(dtype)))
        assert torch.equal(drawn, rounding.dependent(masks, x.to(dtype), seeded(seed), samples=2))
    wide, narrow = (
        rounding.gradient_aware(masks, x.to(dtype), gradient.to(dtype), weight)
        for dtype in (torch.float64, torch.float32)
    )
    # Entries within the tolerance of the type count as decided, so only the rule without weight is equal bit for bit.
    if weight == 0.0:
        assert torch.equal(wide, narrow)
    assert float((wide.double() * x).sum()) == pytest.approx(float((narrow.double() * x).sum()), abs=1e-4 * x.numel())


def model(x: Tensor, gradient: Tensor, row_block: int, weight: float, chosen: Tensor) -> Tensor:
    """Return eta <g, m> + |m - x|^2 / 2 of masks (number, rows, d), by the definition; also 0 where no eta is."""
    value = 0.5 * (chosen.double() - x).square().sum((1, 2))
    for top in range(0, len(x), row_block):
        rows = slice(top, top + row_block)
        g, fraction = gradient[rows].flatten().tolist(), x[rows].flatten().tolist()
        undecided = [s * (1 - s) if 1e-9 < s < 1 - 1e-9 else 0.0 for s in fraction]
        whole = sum(undecided)
        if whole == 0.0:
            continue
        mean = sum(u * e for u, e in zip(undecided, g, strict=True)) / whole
        spread = sum(u * abs(e - mean) for u, e in zip(undecided, g, strict=True)) / whole
        if spread > 1e-12 * max(map(abs, g)):
            value += weight / spread * (chosen[:, rows] * gradient[rows]).sum((1, 2))
    return value


@given(st.data(), seeds, st.sampled_from([1 / 256, 1 / 16, 1.0, 20.0]), st.booleans())
@examples(200)
def test_gradient_aware_minimises_its_model(data: st.DataObject, seed: int, weight: float, ties: bool) -> None:
    shape = data.draw(shapes(4, 6))
    assume(shape[0] * shape[1] <= 14)
    masks = data.draw(sets(shape))
    x = (eighths if ties else mixed)(masks, shape, seed)
    gradient = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    mask = rounding.gradient_aware(masks, x, gradient, weight)
    value = model(x, gradient, masks.row_block(shape), weight, torch.cat((mask.unsqueeze(0), every_mask(masks, shape))))
    assert float(value[0]) <= float(value.min()) + 1e-9 * (1 + float(value.abs().max()))
    for factor in (2.0**-300, 1024.0, 2.0**300):
        assert torch.equal(mask, rounding.gradient_aware(masks, x, gradient * factor, weight))


@given(st.data(), seeds, st.booleans())
@examples(80)
def test_gradient_of_no_weight_is_top_k(data: st.DataObject, seed: int, ties: bool) -> None:
    shape = data.draw(shapes(5, 12))
    masks = data.draw(sets(shape))
    x = (eighths if ties else mixed)(masks, shape, seed)
    gradient = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    nearest = rounding.top_k(masks, x)
    assert torch.equal(rounding.gradient_aware(masks, x, gradient, 0.0), nearest)
    assert torch.equal(rounding.gradient_aware(masks, x, torch.full_like(x, 7.0), 5.0), nearest)
    # A small weight decides only among equal entries.
    little = rounding.gradient_aware(masks, x, gradient, 1e-10)
    assert float((x * little).sum()) == pytest.approx(float((x * nearest).sum()), abs=1e-6)


@given(st.data(), layers(rows=(1, 6), d=(1, 8), exact=True), seeds, st.integers(1, 6))
@examples(100)
def test_the_best_is_chosen_in_every_row_block(data: st.DataObject, layer: object, seed: int, number: int) -> None:
    masks, problem = data.draw(sets(layer.shape)), layer.problem()
    candidates = members(masks, layer.shape, seed, number)
    copy = candidates.clone()
    mask, index = rounding.best(problem, masks, *candidates)
    assert torch.equal(candidates, copy)
    assert feasible(masks, mask)
    row_block = masks.row_block(layer.shape)
    errors = errors_of(layer.weight, layer.gram, candidates)  # small integers: exact
    for start in range(0, layer.shape[0], row_block):
        rows = slice(start, start + row_block)
        totals = errors[:, rows].sum(1).tolist()
        chosen = int(index[start // row_block])
        assert chosen == totals.index(min(totals))
        assert torch.equal(mask[rows], candidates[chosen, rows])
    assert index.shape == (layer.shape[0] // row_block,)


@given(st.data(), layers(), kinds, seeds, st.sampled_from([1.0, 2.0**60, 2.0**-60]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(150)
def test_slack_is_proven(
    dtype: torch.dtype, data: st.DataObject, layer: object, kind: str, seed: int, unit: float
) -> None:
    assume(layer.weight.numel() <= 14)
    masks = data.draw(sets(layer.shape))
    problem = LayerReconstruction((layer.weight * unit).to(dtype), layer.gram.to(dtype))
    x = relaxed(problem, masks, kind, seed).double()
    slack = rounding.lemma2_slack(problem, masks, x)
    assert slack.dtype == torch.float64
    assert slack.shape == (layer.shape[0] // masks.row_block(layer.shape),)
    best = minimum_errors(problem.weight, problem.gram, masks)
    worse = problem.objective(rounding.top_k(masks, x)) - (best if masks.separable else 0.0)
    size = magnitudes(problem.weight, problem.gram)
    if not masks.separable:
        slack, worse, size = slack.sum(), worse.sum() - best.sum(), size.sum()
    rounded_off = (1e-13 if dtype == torch.float64 else 1e-6) * size  # x itself lies in the hull up to its type
    assert bool((worse <= slack + rounded_off).all())


@given(layers(rows=(1, 4), d=(2, 8)), seeds)
@examples(60)
def test_slack_is_the_formula(layer: object, seed: int) -> None:
    masks, problem = SETS["per-row"](layer.shape, 0.5), layer.problem()
    x = mixed(masks, layer.shape, seed)
    slack = rounding.lemma2_slack(problem, masks, x)
    for row in range(layer.shape[0]):
        weight, fraction = layer.weight[row], x[row]
        quadratic = weight.unsqueeze(1) * layer.gram * weight
        largest = float(quadratic.abs().sum(1).max())
        assert largest >= float(torch.linalg.eigvalsh(quadratic)[-1]) * (1 - 1e-9)
        order = fraction.sort(descending=True).values
        keep = round(float(fraction.sum()))
        tau, pruned = float(order[keep:].sum()), len(fraction) - keep
        gradient = -2 * quadratic @ (1 - fraction)
        gap = float(gradient @ fraction - gradient.sort().values[:keep].sum())
        want = gap + 2 * tau * largest + 2 * largest * (pruned * 2 * tau) ** 0.5
        assert float(slack[row]) == pytest.approx(want, rel=1e-6, abs=1e-6 * largest + 1e-9)
