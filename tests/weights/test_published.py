"""The published joint methods: guarantees, what each computes, and the figures of the originals."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, AtMost, Columns, MaskSet, PartitionMatroid, PerRow, Protected, Unstructured
from maskopt.problems import LayerReconstruction, synthetic
from maskopt.solvers import Result, Status, Stop, Wanda, solve
from maskopt.solvers.base import Monitor
from maskopt.weights import ADMM, ALPS, FISTAPruner, Joint, SparseGPT, System
from maskopt.weights.least_squares import conjugate_gradients, definite_factor
from tests.helpers import ALL_SETS, MATROIDS, Layer, examples, feasible, layers, sets

SHARED = Path(os.environ.get("MASKOPT_SHARED", Path(__file__).parents[2].parent / "shared"))
FIGURES = SHARED / "reference" / "results.json"
DTYPES = [torch.float64, torch.float32]

METHODS: dict[str, Joint] = {
    "sparsegpt": SparseGPT(),
    "sparsegpt small": SparseGPT(block=3),
    "admm": ADMM(),
    "admm at once": ADMM(gradual=False),
    "alps": ALPS(),
    "fista": FISTAPruner(rounds=6, iterations=8),
}


def known(method: Joint) -> list[str]:
    return MATROIDS if isinstance(method, SparseGPT) else list(ALL_SETS)


def unchecked(problem: LayerReconstruction, masks: MaskSet, method: Joint) -> tuple[Tensor, Tensor]:
    """Return mask and weights as the method makes them: `solve` would restore the rows that it made worse."""
    outcome = method.run(problem, masks, None, Monitor("test", None, None))
    assert outcome.weight is not None
    return outcome.mask, outcome.weight


def checked(problem: LayerReconstruction, masks: MaskSet, result: Result) -> None:
    assert feasible(masks, result.mask.cpu())
    assert result.weight is not None
    assert result.kept_objective is not None
    assert result.weight.dtype == problem.dtype
    assert bool(torch.isfinite(result.weight).all())
    assert not bool(result.weight[~result.mask].any())
    assert bool((result.objective <= result.kept_objective).all())
    assert bool(torch.isfinite(result.objective).all())


# Guarantees


@given(st.data(), layers(rows=(1, 5), d=(1, 16)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
@examples(60)
def test_members_with_finite_weights_and_no_worse_than_kept(
    name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer
) -> None:
    masks = data.draw(sets(layer.shape, known(METHODS[name])))
    problem = layer.problem(dtype)
    weight, gram = problem.weight.clone(), problem.gram.clone()
    checked(problem, masks, solve(problem, masks, METHODS[name]))
    mask, updated = unchecked(problem, masks, METHODS[name])
    assert feasible(masks, mask)
    assert bool(torch.isfinite(updated).all())
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)


@given(st.data(), layers(rows=(1, 4), d=(1, 12)))
@pytest.mark.parametrize("name", METHODS)
@examples(30)
def test_methods_work_without_a_ridge(name: str, data: st.DataObject, layer: Layer) -> None:
    method = type(METHODS[name])(ridge=0.0)
    masks = data.draw(sets(layer.shape, known(method)))
    for dtype in DTYPES:
        problem = layer.problem(dtype)
        checked(problem, masks, solve(problem, masks, method))
        assert bool(torch.isfinite(unchecked(problem, masks, method)[1]).all())


@pytest.mark.parametrize(
    ("weight_unit", "gram_unit"), [(1e12, 1.0), (1e-12, 1.0), (1.0, 1e24), (1.0, 1e-24), (1e30, 1e30), (1e-30, 1e-30)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_units_change_little(name: str, dtype: torch.dtype, weight_unit: float, gram_unit: float) -> None:
    instance = synthetic(rows=12, d=32)
    weight, gram = instance.weight.double(), instance.gram.double()
    plain = LayerReconstruction(weight.to(dtype), gram.to(dtype))
    scaled = LayerReconstruction((weight * weight_unit).to(dtype), (gram * gram_unit).to(dtype))
    for masks in (PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5)):
        one, two = solve(plain, masks, METHODS[name]), solve(scaled, masks, METHODS[name])
        checked(scaled, masks, two)
        assert two.relative_error == pytest.approx(one.relative_error, rel=0.05)


@given(st.data(), layers(rows=(1, 4), d=(1, 12)), st.integers(-5, 5), st.integers(-3, 3))
@pytest.mark.parametrize("name", METHODS)
@examples(30)
def test_powers_of_two_change_no_digit(
    name: str, data: st.DataObject, layer: Layer, weight_power: int, root_power: int
) -> None:
    masks = data.draw(sets(layer.shape, MATROIDS))
    plain = layer.problem()
    # Above 2^24 the problem itself divides by a power of two, whose root may be no float.
    assume(4.0 ** max(0, root_power) * float(plain.gram.max()) < 2.0**24)
    factor = 2.0**weight_power
    scaled = LayerReconstruction(plain.weight * factor, plain.gram * 4.0**root_power)
    one, two = unchecked(plain, masks, METHODS[name]), unchecked(scaled, masks, METHODS[name])
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1] * factor, two[1])


@pytest.mark.parametrize("name", METHODS)
def test_float32_is_as_good_as_float64_on_ill_conditioned_layers(name: str) -> None:
    random = torch.Generator().manual_seed(5)
    x = torch.randn((96, 40), generator=random, dtype=torch.float64)
    x *= torch.logspace(-2, 2, 96, dtype=torch.float64)[torch.randperm(96, generator=random)].unsqueeze(1)
    x[7], x[50], x[90] = x[6], 0.0, x[91] * (1 + 1e-7)
    layer = Layer(torch.randn((20, 96), generator=random, dtype=torch.float64), x, "ill-conditioned")
    for method in (METHODS[name], type(METHODS[name])(ridge=1e-6)):
        for masks in (PerRow(0.4), NM(keep=2, group=4), Unstructured(0.4)):
            narrow, wide = (solve(layer.problem(dtype), masks, method) for dtype in (torch.float32, torch.float64))
            checked(layer.problem(torch.float32), masks, narrow)
            assert narrow.relative_error <= 1.1 * wide.relative_error + 1e-5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_keeping_nothing_or_all_has_the_known_error(name: str, fraction: float) -> None:
    problem = synthetic(rows=5, d=12).problem()
    result = solve(problem, PerRow(fraction), METHODS[name])
    assert float(result.mask.double().mean()) == fraction
    assert result.relative_error == pytest.approx(1.0 - fraction, abs=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_dead_inputs_are_pruned_first(name: str) -> None:
    instance = synthetic(rows=6, d=16)
    gram, weight = instance.gram.clone(), instance.weight.clone()
    gram[3], gram[:, 3], weight[:, 3] = 0.0, 0.0, 1e3
    problem = LayerReconstruction(weight, gram)
    # Ridges give dead inputs a size; ADMM's is relative to each input's own, the start of FISTA is SparseGPT's.
    method = METHODS[name] if isinstance(METHODS[name], ADMM) else type(METHODS[name])(ridge=0.0)
    assert not bool(solve(problem, PerRow(0.5), method).mask[:, 3].any())


@pytest.mark.parametrize("name", ["admm", "alps", "fista", "sparsegpt"])
@pytest.mark.parametrize("base", [PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5), AtMost(PerRow(0.5))], ids=repr)
def test_fixed_entries_stay(name: str, base: PartitionMatroid) -> None:
    problem = synthetic(rows=8, d=16).problem()
    # The worst case for the method: the costliest entries forbidden, the cheapest protected.
    size = problem.diagonal()
    costly, cheap = NM(keep=1, group=4).lmo_mask(-size), NM(keep=1, group=4).lmo_mask(size)
    masks = base.restrict(kept=cheap, pruned=costly)
    mask, weight = unchecked(problem, masks, METHODS[name])
    assert bool(mask[cheap].all())
    assert not bool(mask[costly].any())
    assert not bool(weight[costly].any())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("masks", [PerRow(0.5), Unstructured(0.4)], ids=repr)
def test_a_callback_ends_every_method_with_a_member(name: str, masks: PartitionMatroid) -> None:
    problem = synthetic(rows=6, d=16).problem()
    late = solve(problem, masks, METHODS[name], time_limit=1e-9)
    checked(problem, masks, late)
    assert late.status is Status.TIME_LIMIT
    asked = 0
    for calls in (1, 2, 4, 9):
        seen: list[float] = []

        def stop(state, seen=seen, calls=calls):
            seen.append(state.fraction)
            return Stop.STOP if len(seen) == calls else None

        result = solve(problem, masks, METHODS[name], callback=stop)
        checked(problem, masks, result)
        if len(seen) == calls:
            asked += 1
            assert result.status is Status.STOPPED
        assert seen == sorted(seen)
    assert asked


@given(st.data(), st.integers(2, 6), st.integers(2, 20), st.integers(0, 999))
@pytest.mark.parametrize("name", ["sparsegpt", "sparsegpt small", "admm", "admm at once"])
@examples(15)
def test_a_batch_is_a_loop_over_rows(name: str, data: st.DataObject, rows: int, d: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((rows, d), (d, 2 * d)))
    problem = Layer(weight, x, "normal").problem()
    masks = data.draw(sets((rows, d), ["per-row", "n:m", "row counts", "protected rows"]))
    together = solve(problem, masks, METHODS[name])
    for row in range(rows):
        index = slice(row, row + 1)
        alone = solve(problem.rows(index), masks.rows(index, (rows, d)), METHODS[name])
        assert torch.equal(alone.mask, together.mask[index])
        torch.testing.assert_close(alone.weight, together.weight[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masks", [PerRow(0.5), Unstructured(0.5), NM(keep=2, group=4)], ids=repr)
def test_updating_weights_beats_keeping_them(masks: PartitionMatroid) -> None:
    problem = synthetic("correlated", rows=24, d=64, seed=2).problem()
    wanda = solve(problem, masks, Wanda()).relative_error
    error = {name: solve(problem, masks, method).relative_error for name, method in METHODS.items()}
    assert error["alps"] < error["admm"] < error["sparsegpt"] < wanda
    assert error["fista"] < error["sparsegpt"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (SparseGPT, {"block": 0}),
        (SparseGPT, {"ridge": -1.0}),
        (SparseGPT, {"ridge": float("inf")}),
        (ADMM, {"penalty": 0.0}),
        (ADMM, {"iterations": 0}),
        (ADMM, {"selections": 0}),
        (ALPS, {"penalty": 0.0}),
        (ALPS, {"growth": (1.3, 1.2)}),
        (ALPS, {"growth": (0.9, 1.2, 1.1)}),
        (ALPS, {"every": 0}),
        (ALPS, {"polish": -1}),
        (FISTAPruner, {"threshold": 0.0}),
        (FISTAPruner, {"rounds": 0}),
        (FISTAPruner, {"ridge": float("nan")}),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(method: type[Joint], settings: dict[str, object]) -> None:
    with pytest.raises(MaskoptError, match=f"^{method.__name__} needs .*; got .*[.]$"):
        method(**settings)


def test_sparsegpt_refuses_sets_without_groups() -> None:
    problem = synthetic(rows=4, d=8).problem()
    with pytest.raises(MaskoptError, match="SparseGPT: it must be a PartitionMatroid; it is a Units"):
        solve(problem, Columns(0.5), SparseGPT())


# What each computes


def best_on(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Return the weights of minimum (w - v)^T G (w - v) on each row's mask, row by row."""
    best = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
    return best


def damped(problem: LayerReconstruction, ridge: float) -> Tensor:
    gram = problem.gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return gram


@pytest.mark.parametrize("block", [1, 3, 4, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_sparsegpt_is_least_squares_input_by_input(block: int, group: int) -> None:
    instance = synthetic("correlated", rows=5, d=12, seed=1)
    problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
    gram, original = damped(problem, 0.01), problem.weight
    chosen, weight = unchecked(problem, NM(keep=(group + 1) // 2, group=group), SparseGPT(block=max(block, group)))
    v, d = original.clone(), 12
    expected = torch.ones_like(chosen)
    for j in range(d):
        if j % group == 0:
            cost = [v[:, i] ** 2 / torch.linalg.inv(gram[i:, i:])[0, 0] for i in range(j, j + group)]
            kept = torch.stack(cost, 1).topk((group + 1) // 2, dim=1).indices
            expected[:, j : j + group] = torch.zeros((5, group), dtype=torch.bool).scatter(1, kept, True)
        v[:, j] *= expected[:, j]
        later = slice(j + 1, d)
        # The later inputs minimise the error given the earlier ones' final weights.
        correction = (original - v)[:, : j + 1] @ gram[: j + 1, later]
        v[:, later] = original[:, later] + torch.linalg.solve(gram[later, later], correction.T).T
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weight, v, rtol=1e-8, atol=1e-10)


def test_sparsegpt_spreads_wide_groups_over_blocks() -> None:
    problem = synthetic(rows=6, d=20).problem()

    def per_block(mask: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in mask.split(8, dim=1)], 1)

    rows, _ = unchecked(problem, PerRow(0.25), SparseGPT(block=8))
    assert torch.equal(per_block(rows), torch.tensor([2, 2, 1]).expand(6, 3))
    whole, _ = unchecked(problem, Unstructured(0.25), SparseGPT(block=8))
    assert per_block(whole).sum(0).tolist() == [12, 12, 6]
    # Protected entries count; the other counts are spread over the blocks.
    protected = torch.zeros((6, 20), dtype=torch.bool)
    protected[:, 8:11] = True
    some, _ = unchecked(problem, Protected(PerRow(0.25), protected), SparseGPT(block=8))
    assert bool(some[protected].all())
    assert torch.equal(per_block(some), torch.tensor([1, 4, 0]).expand(6, 3))


def test_admm_ends_at_least_squares_on_its_mask() -> None:
    instance = synthetic("correlated", rows=6, d=16, seed=3)
    problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
    mask, weight = unchecked(problem, PerRow(0.5), ADMM(iterations=2000))
    gram = problem.gram.clone()
    gram.diagonal().mul_(1.1)
    torch.testing.assert_close(weight, best_on(problem.weight, gram, mask), rtol=1e-6, atol=1e-8)


def test_admm_prunes_gradually_and_fixes_its_mask() -> None:
    problem = synthetic("correlated", rows=6, d=16, seed=3).problem()
    fixed, _ = unchecked(problem, PerRow(0.5), ADMM())
    for iterations in (15, 18, 40):
        mask, _ = unchecked(problem, PerRow(0.5), ADMM(iterations=iterations))
        assert torch.equal(mask, fixed)
    methods = ADMM(), ADMM(gradual=False)
    gradual, at_once = (solve(problem, PerRow(0.5), method).relative_error for method in methods)
    assert gradual < at_once


def test_alps_polishes_to_least_squares_on_its_mask() -> None:
    instance = synthetic("correlated", rows=6, d=16, seed=3)
    problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
    mask, weight = unchecked(problem, PerRow(0.5), ALPS(polish=100))
    best = best_on(problem.weight, damped(problem, 0.01), mask)
    torch.testing.assert_close(weight, best, rtol=1e-7, atol=1e-9)
    same, rough = unchecked(problem, PerRow(0.5), ALPS(polish=0))
    assert torch.equal(same, mask)
    assert float(problem.error(rough).sum()) > float(problem.error(weight).sum())


def test_alps_starts_from_the_given_mask() -> None:
    problem = synthetic(rows=6, d=16).problem()
    start = PerRow(0.5).lmo_mask(problem.weight.abs())
    result = solve(problem, PerRow(0.5), ALPS(), start=start, time_limit=1e-9)
    assert torch.equal(result.mask, start)


def test_fista_solves_its_relaxation() -> None:
    instance = synthetic("correlated", rows=4, d=12, seed=1)
    weight, gram = instance.weight.double(), instance.gram.double()
    target, steepness = weight @ gram, float(torch.linalg.eigvalsh(gram)[-1])
    penalty = 0.1 * float(target.abs().max())
    method = FISTAPruner(iterations=20_000)
    v, taken = method._proximal(torch.zeros_like(weight), gram, target, steepness, penalty, lambda _: False)
    assert taken == 20_000
    # Optimality: the gradient is minus the penalty's subgradient.
    gradient = (v - weight) @ gram
    assert bool((v != 0).any())
    assert bool((v == 0).any())
    torch.testing.assert_close(gradient[v != 0], -penalty * v[v != 0].sign(), rtol=1e-6, atol=0.0)
    assert bool((gradient.abs() <= penalty * (1 + 1e-6)).all())


@given(st.data(), layers(rows=(1, 4), d=(1, 10)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(60)
def test_conjugate_gradients_lower_the_error_on_the_mask(dtype: torch.dtype, data: st.DataObject, layer: Layer) -> None:
    masks = data.draw(sets(layer.shape, ["per-row", "n:m", "unstructured"]))
    problem = layer.problem(dtype)
    system, mask = System.of(problem, 0.01), masks.lmo_mask(-problem.diagonal())

    def error(v: Tensor) -> Tensor:
        difference = (system.weight - v).double()
        return ((difference @ system.gram.double()) * difference).sum(1)

    v = system.weight * mask
    before = error(v)
    slack = 64 * torch.finfo(dtype).eps * ((system.weight.double() ** 2).sum(1) + before)
    for steps in (0, 1, 2, 5, 30):
        updated = conjugate_gradients(system, mask, v, steps)
        assert not bool(updated[~mask].any())
        assert bool((error(updated) <= before + slack).all())
        before = error(updated)
    if dtype == torch.float64:
        best = best_on(system.weight, system.gram, mask)
        assert bool((before <= error(best) + 1e-6 * (error(torch.zeros_like(best)) + slack)).all())


@given(layers(d=(1, 10)))
@examples(40)
def test_factors_of_anything_exist(layer: Layer) -> None:
    for dtype in DTYPES:
        gram = System.of(layer.problem(dtype), 0.0).gram
        factor = definite_factor(gram)
        assert bool(torch.isfinite(factor).all())
        assert bool((factor.diagonal() > 0).all())
        torch.testing.assert_close(factor @ factor.T, gram, rtol=0.0, atol=1e-3 if dtype == torch.float32 else 1e-10)


def test_no_factor_of_data_that_is_not_a_number() -> None:
    with pytest.raises(MaskoptError, match="must be finite"):
        definite_factor(torch.full((3, 3), torch.nan))


# The figures of the originals

LAYERS = ["l1_attn_query", "l1_attn_output", "l1_intermediate", "l1_output"]
ORIGINALS = [
    *(
        (name, fraction, method, masks(keep))
        for name, method, masks in (
            ("sparsegpt original", SparseGPT(), Unstructured),
            ("admm original (per row)", ADMM(), PerRow),
            ("admm original (whole matrix)", ADMM(gradual=False), Unstructured),
            ("alps original (whole matrix)", ALPS(), Unstructured),
        )
        for fraction, keep in (("50%", 0.5), ("60%", 0.4), ("70%", 0.3))
    ),
    ("sparsegpt original", "2:4", SparseGPT(), NM(keep=2, group=4)),
    ("admm original", "2:4", ADMM(), NM(keep=2, group=4)),
    ("alps original", "2:4", ALPS(), NM(keep=2, group=4)),
]


@pytest.mark.skipif(not FIGURES.is_file(), reason=f"no figures of the originals in {SHARED} (set MASKOPT_SHARED)")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "fraction", "method", "masks"), ORIGINALS, ids=[f"{name} {fraction}" for name, fraction, *_ in ORIGINALS]
)
def test_errors_are_those_of_the_originals(
    name: str, fraction: str, method: Joint, masks: PartitionMatroid, layer: str
) -> None:
    figure = json.loads(FIGURES.read_text())[layer][fraction][name]["relative_error"]
    tensors = load_file(SHARED / "layers" / f"{layer}.safetensors")
    result = solve(LayerReconstruction(tensors["weight"], tensors["gram"]), masks, method)
    assert result.relative_error == pytest.approx(figure, rel=0.01)


def test_admm_prunes_what_a_product_of_sets_forbids() -> None:
    masks = ALL_SETS["restricted product"]((4, 8), 0.5)
    assert masks.forbidden is not None
    result = solve(synthetic("correlated", 4, 8).problem(), masks, ADMM())
    assert feasible(masks, result.mask)
    assert not bool((result.mask.view_as(masks.forbidden) & masks.forbidden).any())
