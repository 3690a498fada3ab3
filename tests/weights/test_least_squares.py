"""Least squares on a mask: the best weights on edge-case layers, and `LeastSquares` with a solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, Budget, MaskSet, PerRow, Unstructured
from maskopt.problems import LayerReconstruction, QuadraticForm, synthetic
from maskopt.solvers import (
    ContinuationFrankWolfe,
    FrankWolfe,
    GapKind,
    Magnitude,
    OneSwap,
    Solver,
    SparseFW,
    Status,
    Wanda,
    solve,
)
from maskopt.weights import ALPS, LeastSquares, SparseGPT, System, conjugate_gradients, exact_weights
from maskopt.weights.least_squares import definite_factor
from tests.helpers import ALL_SETS, SOLVERS, Layer, examples, feasible, layers, sets

EPS = torch.finfo(torch.float64).eps
UNITS = [(1.0, 1.0), (1e20, 1e-10), (1e-20, 1e20), (1e-30, 1e-30)]


@st.composite
def problems(draw: st.DrawFn, d: tuple[int, int] = (1, 10)) -> tuple[LayerReconstruction, Tensor]:
    """An edge-case layer in float64, in large, small or no units, and any mask: rows may keep nothing or all."""
    layer = draw(layers(d=d))
    weight_unit, root_unit = draw(st.sampled_from(UNITS))
    problem = Layer(layer.weight * weight_unit, layer.x * root_unit, layer.name).problem()
    kind = draw(st.sampled_from(["any", "any", "per-row", "unstructured", "n:m"]))
    if kind != "any":
        return problem, draw(sets(layer.shape, [kind])).lmo_mask(-problem.diagonal())
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    fraction = torch.tensor([0.0, 0.3, 0.7, 1.0])[torch.randint(4, (layer.shape[0], 1), generator=random)]
    return problem, torch.rand(layer.shape, generator=random) < fraction


def errors(system: System, v: Tensor) -> Tensor:
    """Return (w - v) H (w - v) of each row."""
    difference = system.weight - v
    return ((difference @ system.gram) * difference).sum(1)


def minimum(system: System, mask: Tensor) -> Tensor:
    """Return the minimum error of each row on its mask: numpy's least squares with a root of H."""
    values, vectors = np.linalg.eigh(system.gram.numpy())
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    found = []
    for w, kept in zip(system.weight.numpy(), mask.numpy(), strict=True):
        v = np.linalg.lstsq(root[:, kept], root @ w, rcond=1e-10)[0]
        found.append(np.square(root @ w - root[:, kept] @ v).sum())
    return torch.tensor(found, dtype=torch.float64)


def sizes(system: System, v: Tensor) -> Tensor:
    """Return the size of the terms that a row's error is summed from."""
    total = system.weight.abs() + v.abs()
    return ((total @ system.gram.abs()) * total).sum(1)


# The weights


@given(problems(), st.sampled_from([0.0, 1e-6, 0.01]))
@examples(200)
def test_exact_weights_are_the_best_on_the_mask(drawn: tuple[LayerReconstruction, Tensor], ridge: float) -> None:
    problem, mask = drawn
    system = System.of(problem, ridge)
    v = exact_weights(system, mask)
    assert bool(torch.isfinite(v).all())
    assert not bool(v[~mask].any())
    gradient = ((system.weight - v) @ system.gram) * mask
    size = (system.weight.abs() + v.abs()) @ system.gram.abs()
    assert bool((gradient.abs() <= 1e-10 * size).all())
    assert bool((errors(system, v) - minimum(system, mask) <= 1e-9 * sizes(system, system.weight)).all())


@given(problems(), st.sampled_from([1e-4, 0.01, 1.0]))
@examples(100)
def test_converged_conjugate_gradients_find_the_same(drawn: tuple[LayerReconstruction, Tensor], ridge: float) -> None:
    problem, mask = drawn
    system = System.of(problem, ridge)
    v = conjugate_gradients(system, mask, system.weight * mask, 200)
    assert not bool(v[~mask].any())
    gradient = ((system.weight - v) @ system.gram) * mask
    assert bool((gradient.abs() <= 1e-7 * (system.weight.abs() @ system.gram.abs()).amax(1, keepdim=True)).all())
    size = float(system.weight.abs().max())
    torch.testing.assert_close(
        v / max(size, 1e-300), exact_weights(system, mask) / max(size, 1e-300), rtol=0, atol=1e-6
    )


@given(problems(), st.sampled_from([0.0, 0.01]))
@examples(60)
def test_weights_do_not_depend_on_the_memory(drawn: tuple[LayerReconstruction, Tensor], ridge: float) -> None:
    problem, mask = drawn
    system = System.of(problem, ridge)
    whole = errors(system, exact_weights(system, mask))
    for memory in (1, 4 * 8 * problem.shape[1] ** 2 * 2, 2**40):
        v = exact_weights(system, mask, memory)
        assert not bool(v[~mask].any())
        assert bool(((errors(system, v) - whole).abs() <= 1e-9 * sizes(system, system.weight)).all())


def test_rows_of_their_own_matrices_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = synthetic(rows=40, d=24).problem()
    mask = Unstructured(0.5).lmo_mask(-problem.diagonal())
    system, cholesky, seen = System.of(problem, 0.01), torch.linalg.cholesky_ex, list[torch.Size]()

    def spy(matrices: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrices.shape)
        return cholesky(matrices)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spy)
    counts = mask.sum(1)
    assert len(counts.unique()) > 3
    for memory in (1, 40_000, 2**28):
        seen.clear()
        exact_weights(system, mask, memory)
        assert sum(number for number, *_ in seen) == 40
        assert all(number == 1 or number * kept**2 * 8 <= memory for number, kept, _ in seen)
        # Rows with similar counts are batched: they are not padded to the largest count of all.
        assert len(seen) == 1 or seen[0][1] < seen[-1][1] == int(counts.max())
        assert len(seen) == {1: 40, 2**28: 1}.get(memory, len(seen))
    seen.clear()
    assert not bool(exact_weights(system, torch.zeros_like(mask)).any())
    assert not seen


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (3, 5)])
def test_keeping_nothing_or_all_gives_zero_or_the_weight(shape: tuple[int, int], fraction: float) -> None:
    system = System.of(synthetic(rows=shape[0], d=shape[1]).problem(), 0.01)
    mask = torch.full(shape, bool(fraction))
    for v in (exact_weights(system, mask), conjugate_gradients(system, mask, system.weight * mask, 9)):
        torch.testing.assert_close(v, system.weight * fraction)


@given(st.data(), layers(d=(1, 10)))
@examples(200)
def test_singular_grams_in_float32_are_not_fitted_to_their_rounding(data: st.DataObject, layer: Layer) -> None:
    mask = data.draw(sets(layer.shape, ["per-row", "unstructured", "n:m"])).lmo_mask(-layer.problem().diagonal())
    narrow, wide = (System.of(layer.problem(dtype), 0.0) for dtype in (torch.float32, torch.float64))
    v = exact_weights(narrow, mask).double() / narrow.size * wide.size
    assert bool((errors(wide, v) - minimum(wide, mask) <= 1e-5 * sizes(wide, wide.weight)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["rank-deficient", "dead", "outliers"])
def test_without_a_ridge_layers_of_low_rank_lose_nothing_to_rounding(family: str, dtype: torch.dtype) -> None:
    instance = synthetic(family, rows=12, d=32, tokens=20)
    problem = LayerReconstruction(instance.weight.to(dtype), instance.gram.to(dtype))
    mask = solve(problem, PerRow(0.5), Wanda()).mask
    system = System.of(problem, 0.0)
    wide = System(system.weight.double(), system.gram.double(), system.size.double())
    after, before = errors(wide, exact_weights(wide, mask)).sum(), errors(wide, wide.weight * mask).sum()
    best = minimum(wide, mask).sum()
    assert float(after) <= float(best) + 1e-6 * float(before)


# The factors


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
@examples(60)
def test_factors_are_shifted_only_where_needed(number: int, d: int, seed: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, d + 1, (number,), generator=random)
    x = torch.randn((number, d, 2 * d), generator=random, dtype=torch.float64)
    x *= (torch.arange(d) < ranks.unsqueeze(1)).unsqueeze(2)
    turn = torch.linalg.qr(torch.randn((d, d), generator=random, dtype=torch.float64))[0]
    matrices = turn @ (x @ x.mT / (2 * d)) @ turn.T
    matrices = ((matrices + matrices.mT) / 2).to(dtype)
    matrices[::3] = torch.eye(d, dtype=dtype)
    factors, (plain, info) = definite_factor(matrices), torch.linalg.cholesky_ex(matrices)
    eps = torch.finfo(dtype).eps * d
    for matrix, factor, known, failed in zip(matrices, factors, plain, info, strict=True):
        if not failed:
            assert torch.equal(factor, known)
            continue
        off = factor @ factor.T - matrix
        # The shift is the first of its sequence for which the factorisation exists.
        shift = float(off.diagonal().mean())
        rounding = 4 * eps * float(matrix.abs().max())
        torch.testing.assert_close(off, shift * torch.eye(d, dtype=dtype), rtol=0.0, atol=rounding + 0.01 * abs(shift))
        shifts = [eps * 8.0**power for power in range(10)]
        works = [not int(torch.linalg.cholesky_ex(matrix + s * torch.eye(d, dtype=dtype))[1]) for s in shifts]
        assert shift <= shifts[works.index(True)] * (1 + eps) + rounding


def test_the_smallest_shift_is_found_on_known_eigenvalues() -> None:
    below = torch.tensor([1.0, 1.0, -3.0 * 8**6 * EPS], dtype=torch.float64).diag()
    fine = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).diag()
    factor = definite_factor(torch.stack([fine, below, fine]))
    torch.testing.assert_close(factor[[0, 2]], torch.stack([fine, fine]).sqrt(), rtol=0.0, atol=0.0)
    shift = 3 * EPS * 8**7  # 8^6 leaves the last eigenvalue at zero
    torch.testing.assert_close(factor[1].square().diagonal(), below.diagonal() + shift, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_factor_of_a_batch_with_what_is_not_finite(value: float) -> None:
    matrices = torch.eye(3).repeat(4, 1, 1)
    matrices[2, 1, 1] = value
    with pytest.raises(MaskoptError, match=r"must be finite to be factorised, but an entry is NaN or infinite[.]$"):
        definite_factor(matrices)


# The method with a solver


@given(st.data(), layers(rows=(1, 4), d=(1, 10)))
@pytest.mark.parametrize("name", SOLVERS)
@examples(20)
def test_the_solvers_mask_with_no_larger_error(name: str, data: st.DataObject, layer: Layer) -> None:
    solver, problem = SOLVERS[name], layer.problem()
    masks = data.draw(sets(layer.shape))
    alone = solve(problem, masks, solver)
    results = [solve(problem, masks, LeastSquares(solver=solver, method=method)) for method in ("cholesky", "cg")]
    for result in results:
        assert torch.equal(result.mask, alone.mask)
        assert feasible(masks, result.mask)
        assert result.weight is not None
        assert result.kept_objective is not None
        assert torch.equal(result.kept_objective, alone.objective)
        assert result.kept_error == alone.relative_error
        assert bool((result.objective <= result.kept_objective).all())
        assert not bool(result.weight[~result.mask].any())
        assert torch.equal(problem.error(result.weight), result.objective)
        # Proofs for a mask with unchanged weights do not hold for new weights.
        proven = alone.status in (Status.OPTIMAL, Status.WITHIN_GAP, Status.LOCAL_OPTIMUM)
        assert proven or result.status is alone.status
        assert not proven or result.status in (Status.COMPLETED, Status.CONVERGED, Status.ITERATION_LIMIT)
        assert (result.lower_bound, result.iterations) == (None, alone.iterations)
    slack = 1e-6 * float(problem.scale().sum())
    assert results[0].total == pytest.approx(results[1].total, rel=1e-6, abs=slack)


@pytest.mark.parametrize(
    "solver", [FrankWolfe(iterations=30), FrankWolfe("away", iterations=30), SparseFW(iterations=60)], ids=repr
)
def test_the_best_mask_recorded_is_the_one_refitted(solver: Solver) -> None:
    for seed in range(3):
        problem = synthetic(rows=6, d=16, seed=seed).problem()
        for masks in (PerRow(0.5), Unstructured(0.5)):
            alone, pair = solve(problem, masks, solver), solve(problem, masks, LeastSquares(solver=solver))
            assert torch.equal(alone.mask, pair.mask)
            assert alone.history.keys() == pair.history.keys()
            assert alone.sources == pair.sources
            # A bound on masks with unchanged weights is no bound on updated weights.
            assert (pair.lower_bound, pair.gap) == (None, None)
            assert pair.gap_kind is not GapKind.PROVEN


@pytest.mark.parametrize("method", ["auto", "cholesky", "cg"])
@pytest.mark.parametrize("masks", [PerRow(0.5), NM(keep=2, group=4)], ids=repr)
def test_rows_are_solved_one_by_one(method: str, masks: MaskSet) -> None:
    instance = synthetic(rows=7, d=16)
    problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
    pair = LeastSquares(solver=OneSwap(), method=method)
    whole = solve(problem, masks, pair)
    blocks = solve(problem, masks, pair, memory=1)
    assert torch.equal(whole.mask, blocks.mask)
    torch.testing.assert_close(whole.weight, blocks.weight, rtol=1e-9, atol=1e-9)
    for row in range(7):
        alone = solve(problem.rows(slice(row, row + 1)), masks, pair)
        assert torch.equal(alone.mask[0], whole.mask[row])
        torch.testing.assert_close(alone.objective[0], whole.objective[row], rtol=1e-9, atol=0.0)
        part = whole.part(slice(row, row + 1))
        assert part.weight is not None
        assert part.kept_objective is not None
        assert part.kept_error >= part.relative_error
        torch.testing.assert_close(part.weight, alone.weight, rtol=1e-9, atol=1e-9)


def test_without_a_ridge_nothing_on_the_mask_is_better() -> None:
    instance = synthetic("correlated", rows=5, d=12)
    problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
    result = solve(problem, PerRow(0.5), LeastSquares(ridge=0.0))
    assert result.weight is not None
    random = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        step = size * torch.randn((5, 12), generator=random, dtype=torch.float64) * result.mask
        assert bool((problem.error(result.weight + step) > result.objective).all())
    damped = solve(problem, PerRow(0.5), LeastSquares())
    assert result.total < damped.total < float(result.kept_objective.sum())


def test_wide_layers_use_conjugate_gradients() -> None:
    problem = synthetic(rows=3, d=520).problem()
    auto, cg, exact = (
        solve(problem, PerRow(0.5), LeastSquares(solver=Wanda(), method=method))
        for method in ("auto", "cg", "cholesky")
    )
    assert torch.equal(auto.weight, cg.weight)
    assert auto.counters["products"] == 101
    assert "products" not in exact.counters
    assert auto.total == pytest.approx(exact.total, rel=1e-5)
    few = solve(problem, PerRow(0.5), LeastSquares(solver=Wanda(), method="cg", steps=3))
    assert exact.total < few.total < few.kept_error * float(few.scale.sum())
    none = solve(problem, PerRow(0.5), LeastSquares(solver=Wanda(), method="cg", steps=0))
    assert none.relative_error == pytest.approx(none.kept_error, rel=1e-6)


def test_requirements_are_those_of_the_solver() -> None:
    problem, budget = synthetic(rows=4, d=8).problem(), Budget(torch.ones(4, 8), 16.0)
    for solver in (OneSwap(), FrankWolfe("dicg"), Wanda(), SparseGPT()):
        requirements = LeastSquares(solver=solver).requirements
        assert requirements.masks == solver.requirements.masks
        assert set(requirements.problem) == {*solver.requirements.problem, LayerReconstruction}
        assert len(requirements.problem) == len(set(requirements.problem))
        for masks in (PerRow(0.5), Unstructured(0.5)):
            assert LeastSquares(solver=solver).solves_rows_apart(masks) == solver.solves_rows_apart(masks)
    assert not LeastSquares(solver=ALPS()).solves_rows_apart(PerRow(0.5))
    sentences = []
    for solver in (OneSwap(), LeastSquares(solver=OneSwap())):
        with pytest.raises(MaskoptError, match=r"OneSwap: it must be a PartitionMatroid; it is a Budget") as caught:
            solve(problem, budget, solver)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1].replace("LeastSquares on ", "")
    form = QuadraticForm(torch.eye(8), torch.zeros(2, 8))
    with pytest.raises(
        MaskoptError, match=r"^QuadraticForm is not compatible with LeastSquares on .*: it must be a Layer"
    ):
        solve(form, PerRow(0.5), LeastSquares())


def test_it_starts_like_its_solver_or_from_the_given_mask() -> None:
    problem = synthetic(rows=6, d=16).problem()
    start = PerRow(0.5).lmo_mask(problem.diagonal())  # the worst
    pair = LeastSquares(solver=OneSwap(max_steps=0))
    assert torch.equal(solve(problem, PerRow(0.5), pair, start=start).mask, start)
    assert torch.equal(
        solve(problem, PerRow(0.5), pair, start=Magnitude()).mask, solve(problem, PerRow(0.5), Magnitude()).mask
    )
    assert torch.equal(solve(problem, PerRow(0.5), pair).mask, solve(problem, PerRow(0.5), OneSwap(max_steps=0)).mask)
    with pytest.raises(MaskoptError, match="not in the set"):
        solve(problem, PerRow(0.25), pair, start=start)


def test_shifts_change_nothing() -> None:
    problem = synthetic(rows=6, d=16).problem()
    shifted = problem.shifted(problem.diagonal(), 0.5)
    for method in (LeastSquares(solver=OneSwap()), ALPS()):
        plain, other = solve(problem, PerRow(0.5), method), solve(shifted, PerRow(0.5), method)
        assert torch.equal(plain.weight, other.weight)
        assert torch.equal(plain.objective, other.objective)


@pytest.mark.parametrize("settings", [{"method": "qr"}, {"steps": -1}, {"ridge": -0.1}, {"ridge": float("nan")}])
def test_bad_settings_are_refused_in_one_sentence(settings: dict[str, object]) -> None:
    with pytest.raises(MaskoptError, match=r"^LeastSquares needs .*; got .*[.]$"):
        LeastSquares(**settings)


@given(st.data(), layers(rows=(1, 4), d=(1, 8)))
@examples(60)
def test_weights_are_refitted_on_every_set(data: st.DataObject, layer: Layer) -> None:
    masks = data.draw(sets(layer.shape, list(ALL_SETS)))
    pair = LeastSquares(solver=ContinuationFrankWolfe(iterations=5, polish=False))
    for dtype in (torch.float32, torch.float64):
        problem = layer.problem(dtype)
        result = solve(problem, masks, pair)
        assert feasible(masks, result.mask)
        assert result.weight is not None
        assert result.weight.dtype == dtype
        assert bool(torch.isfinite(result.weight).all())
        assert result.relative_error <= result.kept_error
