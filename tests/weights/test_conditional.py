"""ConditionalADMM: members of every set, no digit depends on units, and how good it is."""

from __future__ import annotations

from statistics import mean, median

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, AtMost, MaskSet, PartitionMatroid, PerRow, TransposableNM, Unstructured
from maskopt.problems import FAMILIES, LayerReconstruction, QuadraticForm, synthetic
from maskopt.solvers import Result, Status, Stop, Wanda, solve
from maskopt.solvers.base import Monitor
from maskopt.weights import ADMM, ALPS, ConditionalADMM, LeastSquares, SparseGPT, System, conjugate_gradients
from maskopt.weights.conditional import _deviations
from tests.helpers import ALL_SETS, MATROIDS, Layer, every_mask, examples, feasible, layers, sets

DTYPES = [torch.float64, torch.float32]
METHOD = ConditionalADMM()
SEPARABLE = ["per-row", "n:m", "row counts", "protected rows", "at most rows", "at most n:m", "vectors"]


def unchecked(
    problem: LayerReconstruction, masks: MaskSet, method: ConditionalADMM = METHOD, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return mask and weights as the method makes them: `solve` would restore the rows that it made worse."""
    outcome = method.run(problem, masks, start, Monitor("test", None, None))
    assert outcome.weight is not None
    return outcome.mask, outcome.weight


def checked(problem: LayerReconstruction, masks: MaskSet, result: Result) -> None:
    assert feasible(masks, result.mask)
    assert result.weight is not None
    assert result.kept_objective is not None
    assert result.weight.dtype == problem.dtype
    assert bool(torch.isfinite(result.weight).all())
    assert not bool(result.weight[~result.mask].any())
    assert bool(torch.isfinite(result.objective).all())
    assert bool((result.objective <= result.kept_objective).all())
    assert torch.equal(problem.objective(result.mask), result.kept_objective)
    torch.testing.assert_close(problem.error(result.weight), result.objective)


def normal(rows: int, d: int, seed: int) -> LayerReconstruction:
    """A layer without ties, well-conditioned, in float64."""
    random = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((rows, d), (d, 4 * d)))
    mixing = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn((d, d), generator=random, dtype=torch.float64)
    return Layer(weight, mixing @ x, "normal").problem()


# Guarantees


@given(st.data(), layers(rows=(1, 5), d=(1, 16)), st.sampled_from([0.01, 0.0]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(150)
def test_members_with_finite_weights_and_no_worse_than_kept(
    dtype: torch.dtype, data: st.DataObject, layer: Layer, ridge: float
) -> None:
    masks = data.draw(sets(layer.shape, list(ALL_SETS)))
    problem, method = layer.problem(dtype), ConditionalADMM(ridge=ridge)
    weight, gram = problem.weight.clone(), problem.gram.clone()
    checked(problem, masks, solve(problem, masks, method))
    mask, updated = unchecked(problem, masks, method)
    assert feasible(masks, mask)
    assert bool(torch.isfinite(updated).all())
    assert not bool(updated[~mask].any())
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL_SETS)
def test_results_are_valid_on_every_set(name: str, dtype: torch.dtype) -> None:
    instance = synthetic(rows=8, d=12)
    problem = LayerReconstruction(instance.weight.to(dtype), instance.gram.to(dtype))
    for fraction in (0.0, 0.5, 1.0):
        masks = ALL_SETS[name]((8, 12), fraction)
        result = solve(problem, masks, METHOD)
        checked(problem, masks, result)
        if feasible(masks, torch.ones_like(result.mask)):
            assert bool(result.mask.all())
            assert result.relative_error <= 1e-9
        if fraction == 0.5 and bool((result.mask.any(1) & ~result.mask.all(1)).any()):
            # On every set, updated weights lower the error if rows are pruned in part.
            assert result.relative_error < 0.99 * result.kept_error


@pytest.mark.parametrize("base", [PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5), AtMost(PerRow(0.5))], ids=repr)
def test_fixed_entries_stay(base: PartitionMatroid) -> None:
    problem = synthetic(rows=8, d=16).problem()
    # The worst case for the method: the costliest entries forbidden, the cheapest protected.
    size = problem.diagonal()
    costly, cheap = NM(keep=1, group=4).lmo_mask(-size), NM(keep=1, group=4).lmo_mask(size)
    mask, weight = unchecked(problem, base.restrict(kept=cheap, pruned=costly))
    assert bool(mask[cheap].all())
    assert not bool(mask[costly].any())
    assert not bool(weight[costly].any())


@pytest.mark.parametrize("masks", [PerRow(0.5), Unstructured(0.4)], ids=repr)
def test_a_callback_ends_it_with_a_member(masks: PartitionMatroid) -> None:
    problem = synthetic(rows=6, d=16).problem()
    late = solve(problem, masks, METHOD, time_limit=1e-9)
    checked(problem, masks, late)
    assert late.status is Status.TIME_LIMIT
    assert late.iterations == 0
    for calls in (1, 2, 14, 27, 52):
        seen: list[float] = []

        def stop(state, seen=seen, calls=calls):
            seen.append(state.fraction)
            return Stop.STOP if len(seen) == calls else None

        result = solve(problem, masks, METHOD, callback=stop)
        checked(problem, masks, result)
        assert len(seen) == calls
        assert result.status is Status.STOPPED
        assert result.iterations == calls - 1
        assert seen == sorted(seen)
    whole = solve(problem, masks, METHOD)
    assert (whole.status, whole.iterations, whole.lower_bound) == (Status.COMPLETED, 52, None)


def test_it_starts_from_the_given_mask() -> None:
    problem = synthetic(rows=6, d=16).problem()
    start = PerRow(0.5).lmo_mask(problem.diagonal())  # the worst
    for from_start in (start, Wanda()):
        result = solve(problem, PerRow(0.5), METHOD, start=from_start, time_limit=1e-9)
        expected = start if isinstance(from_start, Tensor) else solve(problem, PerRow(0.5), from_start).mask
        assert torch.equal(result.mask, expected)
    # With more time the result differs from it.
    result = solve(problem, PerRow(0.5), METHOD, start=start)
    assert (
        result.relative_error < 0.5 * solve(problem, PerRow(0.5), LeastSquares(solver=Wanda()), start=start).kept_error
    )
    assert not torch.equal(result.mask, start)


# Invariances


@given(st.data(), layers(rows=(1, 4), d=(1, 12)), st.integers(-5, 5), st.integers(-3, 3))
@examples(60)
def test_powers_of_two_change_no_digit(data: st.DataObject, layer: Layer, weight_power: int, root_power: int) -> None:
    masks = data.draw(sets(layer.shape, MATROIDS))
    plain = layer.problem()
    # Above 2^24 the problem itself divides by a power of two, whose root may be no float.
    assume(4.0 ** max(0, root_power) * float(plain.gram.max()) < 2.0**24)
    factor = 2.0**weight_power
    scaled = LayerReconstruction(plain.weight * factor, plain.gram * 4.0**root_power)
    one, two = unchecked(plain, masks), unchecked(scaled, masks)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1] * factor, two[1])


@pytest.mark.parametrize("units", [(1e12, 1.0), (1e-12, 1.0), (1.0, 1e24), (1.0, 1e-24), (1e30, 1e30), (1e-30, 1e-30)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_change_little(dtype: torch.dtype, units: tuple[float, float]) -> None:
    instance = synthetic(rows=12, d=32)
    weight, gram = instance.weight.double(), instance.gram.double()
    plain = LayerReconstruction(weight.to(dtype), gram.to(dtype))
    scaled = LayerReconstruction((weight * units[0]).to(dtype), (gram * units[1]).to(dtype))
    for masks in (PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5)):
        one, two = solve(plain, masks, METHOD), solve(scaled, masks, METHOD)
        checked(scaled, masks, two)
        assert two.relative_error == pytest.approx(one.relative_error, rel=1e-6 if dtype == torch.float64 else 0.02)


@given(st.data(), st.integers(2, 6), st.integers(2, 20), st.integers(0, 999))
@examples(40)
def test_rows_are_independent(data: st.DataObject, rows: int, d: int, seed: int) -> None:
    problem = normal(rows, d, seed)
    masks = data.draw(sets((rows, d), SEPARABLE))
    together = solve(problem, masks, METHOD)
    blocks = solve(problem, masks, METHOD, memory=1)
    torch.testing.assert_close(blocks.objective, together.objective, rtol=1e-7, atol=0.0)
    for row in range(rows):
        index = slice(row, row + 1)
        alone = solve(problem.rows(index), masks.rows(index, (rows, d)), METHOD)
        assert torch.equal(alone.mask, together.mask[index])
        torch.testing.assert_close(alone.weight, together.weight[index], rtol=1e-8, atol=1e-8)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 999))
@examples(30)
def test_the_order_of_rows_and_inputs_does_not_matter(rows: int, groups: int, seed: int) -> None:
    d, random = 4 * groups, torch.Generator().manual_seed(seed)
    problem = normal(rows, d, seed)
    within = torch.randperm(d, generator=random)
    # Groups of four stay together.
    whole = (torch.randperm(groups, generator=random).unsqueeze(1) * 4 + torch.arange(4)).flatten()
    row = torch.randperm(rows, generator=random)
    for masks, column in ((PerRow(0.5), within), (Unstructured(0.4), within), (NM(keep=2, group=4), whole)):
        turned = LayerReconstruction(problem.weight[row][:, column], problem.gram[column][:, column])
        one, two = unchecked(problem, masks), unchecked(turned, masks)
        assert torch.equal(one[0][row][:, column], two[0])
        torch.testing.assert_close(one[1][row][:, column], two[1], rtol=1e-8, atol=1e-8)


@given(st.integers(1, 5), st.integers(2, 16), st.integers(0, 999))
@examples(40)
def test_the_units_of_single_inputs_do_not_matter_without_a_ridge(rows: int, d: int, seed: int) -> None:
    problem, method = normal(rows, d, seed), ConditionalADMM(ridge=0.0)
    unit = torch.logspace(-2, 2, d, dtype=torch.float64)[
        torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    ]
    gram = problem.gram * unit * unit.unsqueeze(1)
    scaled = LayerReconstruction(problem.weight / unit, (gram + gram.T) / 2)
    for masks in (PerRow(0.5), Unstructured(0.5)):
        one, two = unchecked(problem, masks, method), unchecked(scaled, masks, method)
        assert torch.equal(one[0], two[0])
        torch.testing.assert_close(one[1], two[1] * unit, rtol=1e-7, atol=1e-7)


def test_rows_of_zeros_and_dead_inputs_do_no_harm() -> None:
    instance = synthetic(rows=6, d=16)
    gram, weight = instance.gram.clone(), instance.weight.clone()
    gram[3], gram[:, 3], weight[:, 3], weight[2] = 0.0, 0.0, 1e3, 0.0
    problem = LayerReconstruction(weight, gram)
    result = solve(problem, PerRow(0.5), ConditionalADMM(ridge=0.0))
    others = [row for row in range(6) if row != 2]
    assert not bool(result.mask[others, 3].any())
    assert float(result.objective[2]) == 0.0
    rest = [column for column in range(16) if column != 3]
    without = LayerReconstruction(weight[others][:, rest], gram[rest][:, rest])
    same = solve(without, PerRow(8), ConditionalADMM(ridge=0.0))
    assert float(result.objective[others].sum()) == pytest.approx(same.total, rel=0.02)


@pytest.mark.parametrize("power", [3, 5, 7, 9, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_are_almost_zero_get_no_huge_weights(power: int, dtype: torch.dtype) -> None:
    """Neurons that hardly ever fire follow others; large weights on them would explode on other data."""
    random = torch.Generator().manual_seed(power)
    x = torch.randn((16, 200), generator=random, dtype=torch.float64)
    x[1:4] = 10.0**-power * (x[4:7] + 0.1 * x[1:4])
    weight = torch.randn((6, 16), generator=random, dtype=torch.float64)
    problem = LayerReconstruction(weight.to(dtype), (x @ x.T).to(dtype))
    for masks in (NM(keep=2, group=4), PerRow(0.75)):
        _, updated = unchecked(problem, masks)
        assert float(updated.abs().max()) < 30 * float(weight.abs().max())


@pytest.mark.parametrize("ridge", [0.01, 1e-6])
def test_float32_is_as_good_as_float64_on_ill_conditioned_layers(ridge: float) -> None:
    random = torch.Generator().manual_seed(5)
    x = torch.randn((96, 40), generator=random, dtype=torch.float64)
    x *= torch.logspace(-2, 2, 96, dtype=torch.float64)[torch.randperm(96, generator=random)].unsqueeze(1)
    x[7], x[50], x[90] = x[6], 0.0, x[91] * (1 + 1e-7)
    layer = Layer(torch.randn((20, 96), generator=random, dtype=torch.float64), x, "ill-conditioned")
    method = ConditionalADMM(ridge=ridge)
    for masks in (PerRow(0.4), NM(keep=2, group=4), Unstructured(0.4), TransposableNM(keep=2, group=4)):
        narrow, wide = (solve(layer.problem(dtype), masks, method) for dtype in (torch.float32, torch.float64))
        checked(layer.problem(torch.float32), masks, narrow)
        assert narrow.relative_error <= 1.1 * wide.relative_error + 1e-5


# What it computes


@pytest.mark.parametrize("noise", [1e-3, 0.1, 10.0])
def test_the_metric_is_the_variance_given_the_other_inputs(noise: float) -> None:
    problem = normal(1, 8, 3)
    gram = System.of(problem, 0.0).gram
    noisy = gram + noise * torch.eye(8, dtype=torch.float64)
    variances = []
    for j in range(8):
        rest = [i for i in range(8) if i != j]
        explained = noisy[j, rest] @ torch.linalg.solve(noisy[rest][:, rest], noisy[rest, j])
        variances.append(float(noisy[j, j] - explained) - noise)
    expected = torch.tensor(variances, dtype=torch.float64).sqrt()
    torch.testing.assert_close(_deviations(gram, noise), expected, rtol=1e-9, atol=0.0)
    # Independent inputs count with their whole variance.
    same = _deviations(torch.eye(8, dtype=torch.float64), noise)
    torch.testing.assert_close(same, torch.ones(8, dtype=torch.float64))


def test_independent_inputs_are_pruned_by_size() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((6, 16), generator=random, dtype=torch.float64)
    gram = torch.rand(16, generator=random, dtype=torch.float64).add_(0.5).diag()
    problem = LayerReconstruction(weight, gram)
    best = PerRow(0.5).lmo_mask(-problem.diagonal())
    mask, updated = unchecked(problem, PerRow(0.5), ConditionalADMM(ridge=0.0, penalty=(1.0, 1.0)))
    assert torch.equal(mask, best)
    torch.testing.assert_close(updated, weight * mask)
    # Penalties above one may end at other masks that are almost as good.
    assert solve(problem, PerRow(0.5), METHOD).total <= 1.1 * float(problem.objective(best).sum())


def test_it_converges_to_a_stationary_point() -> None:
    """At a fixed point, mask, dual and weights satisfy the stationarity conditions of the penalty."""
    problem = normal(6, 16, 1)
    long = ConditionalADMM(iterations=4000, polish=0, stages=1, penalty=(8.0, 8.0))
    mask, rough = unchecked(problem, PerRow(0.5), long)
    system = System.of(problem, 0.01, each=True)
    best = conjugate_gradients(system, mask, system.weight * mask, 200)
    torch.testing.assert_close(rough, system.finish(problem, best), rtol=1e-6, atol=1e-8)
    # Kept: |v|; pruned: the dual over rho, both in the metric.
    metric = _deviations(system.gram, 0.1)
    dual = ((system.weight - best) @ system.gram) / metric / 8.0
    size = torch.where(mask, best * metric, dual).abs()
    assert torch.equal(PerRow(0.5).lmo_mask(-size), mask)


def test_polishing_lowers_the_error_on_the_same_mask() -> None:
    problem = synthetic("correlated", rows=6, d=16, seed=3).problem()
    errors = []
    for polish in (0, 1, 6, 60):
        mask, weight = unchecked(problem, PerRow(0.5), ConditionalADMM(polish=polish))
        assert torch.equal(mask, unchecked(problem, PerRow(0.5))[0])
        errors.append(float(problem.error(weight).sum()))
    assert errors[0] > errors[1] > errors[2]
    system = System.of(problem, 0.01, each=True)
    exact = conjugate_gradients(system, mask, system.weight * mask, 200)
    assert errors[3] == pytest.approx(float(problem.error(system.finish(problem, exact)).sum()), rel=1e-4)


def test_settings_reach_the_loop() -> None:
    problem = synthetic("correlated", rows=6, d=16, seed=3).problem()
    assert solve(problem, PerRow(0.5), ConditionalADMM(iterations=7)).counters["products"] == 7 + 6 + 1
    # The number of stages is at most that of iterations.
    few, more = (unchecked(problem, PerRow(0.5), ConditionalADMM(iterations=3, stages=n)) for n in (3, 50))
    assert torch.equal(few[0], more[0])
    assert torch.equal(few[1], more[1])
    # A constant penalty, whatever the number of stages.
    one, four = (
        unchecked(problem, PerRow(0.5), ConditionalADMM(penalty=(0.3, 0.3), stages=n, iterations=40)) for n in (1, 4)
    )
    assert torch.equal(one[0], four[0])
    torch.testing.assert_close(one[1], four[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"ridge": -1.0},
        {"ridge": float("nan")},
        {"penalty": (0.0, 0.4)},
        {"penalty": (0.4, 0.2)},
        {"penalty": (0.4, float("inf"))},
        {"penalty": (float("nan"), 0.2)},
        {"penalty": (0.2,)},
        {"noise": 0.0},
        {"noise": -1.0},
        {"noise": float("nan")},
        {"stages": 0},
        {"iterations": 0},
        {"relaxation": 0.0},
        {"relaxation": 1.5},
        {"relaxation": float("nan")},
        {"polish": -1},
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings: dict[str, object]) -> None:
    with pytest.raises(MaskoptError, match=r"^ConditionalADMM needs [^.]*.*; got .*[.]$"):
        ConditionalADMM(**settings)


def test_problems_without_weights_are_refused() -> None:
    form = QuadraticForm(torch.eye(8), torch.zeros(2, 8))
    with pytest.raises(MaskoptError, match=r"^QuadraticForm is not compatible with Cond.*: it must be a Layer"):
        solve(form, PerRow(0.5), METHOD)


# Quality


@pytest.mark.parametrize("masks", [PerRow(0.5), PerRow(0.3), Unstructured(0.5), NM(keep=2, group=4)], ids=repr)
def test_errors_are_below_those_of_the_published_methods_on_average(masks: PartitionMatroid) -> None:
    others = {"alps": ALPS(), "admm": ADMM(), "sparsegpt": SparseGPT(), "lsq": LeastSquares()}
    ratios: dict[str, dict[str, float]] = {name: {} for name in others}
    for family in FAMILIES:
        problems = [synthetic(family, rows=24, d=64, seed=seed).problem() for seed in range(3)]
        ours = [solve(problem, masks, METHOD).relative_error for problem in problems]
        for name, method in others.items():
            errors = [solve(problem, masks, method).relative_error for problem in problems]
            ratios[name][family] = mean(our / error for our, error in zip(ours, errors, strict=True))
    for name in others:
        assert mean(ratios[name].values()) < 1.0, (name, ratios[name])
    # No kind of layer is much worse.
    assert max(ratios["alps"].values()) < 1.05, ratios["alps"]


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_errors_are_between_the_optimum_and_little_above_it(fraction: float) -> None:
    """Enumeration of all masks with the best weights on each, rows of eight inputs."""
    method, ratios = ConditionalADMM(ridge=0.0, polish=50), []
    for seed in range(6):
        problem = normal(6, 8, seed)
        masks = PerRow(fraction)
        result = solve(problem, masks, method)
        candidates = every_mask(masks, (1, 8))[:, 0]
        for row in range(6):
            w = problem.weight[row]
            minimum = min(float(_smallest_error(w, problem.gram, kept)) for kept in candidates)
            error = float(result.objective[row])
            assert error >= minimum * (1 - 1e-9)
            ratios.append(error / minimum)
    assert median(ratios) < 1.1
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 0.3 * len(ratios)


def _smallest_error(w: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Return the error of the best weights on a mask: the pruned weights in the metric of the Schur complement."""
    pruned = ~kept
    across = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, pruned])
    schur = gram[pruned][:, pruned] - gram[pruned][:, kept] @ across
    return w[pruned] @ schur @ w[pruned]
