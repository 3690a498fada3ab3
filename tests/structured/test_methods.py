"""All methods for whole units: errors, weights, fixed entries, targets, edge cases, stops and published scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskopt
from maskopt.errors import MaskoptError
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Status, Stop, solve_sets
from maskopt.structured import STRUCTURED, ExactSwaps, Structured, bias_change, make_structured
from tests.helpers import Layer, examples, layers
from tests.structured.test_best import random_layer, ridged

NAMES = sorted(STRUCTURED)


def directly(layer: Layer, weight: Tensor) -> Tensor:
    """Each row's error from the inputs themselves."""
    return ((layer.weight - weight.double()) @ layer.x).square().sum(1)


@pytest.mark.parametrize("name", NAMES)
@given(st.data(), layers(rows=(1, 5), d=(1, 8)))
@examples(30)
def test_results_are_what_they_say(name: str, data: st.DataObject, layer: Layer) -> None:
    width = data.draw(st.sampled_from([w for w in range(1, layer.shape[1] + 1) if layer.shape[1] % w == 0]))
    units = layer.shape[1] // width
    keep = data.draw(st.integers(0, units))
    masks = maskopt.Units(maskopt.Unstructured(keep), (None, width))
    result = maskopt.solve(layer.problem(), masks, make_structured(name))
    assert masks.contains(result.mask)
    assert int(result.mask[0].sum()) == keep * width
    weight = layer.weight * result.mask if result.weight is None else result.weight
    assert not weight[~result.mask].any()
    size = float((layer.weight @ layer.x).square().sum()) + float((weight @ layer.x).square().sum())
    torch.testing.assert_close(result.objective, directly(layer, weight), rtol=1e-9, atol=1e-12 * (size + 1e-300))
    assert bool((result.objective <= result.kept_objective).all() if result.kept_objective is not None else True)
    if keep == units:
        assert result.total <= 1e-20 * size


@pytest.mark.parametrize("name", [*NAMES, "draft"])
@pytest.mark.parametrize("counts", [(9, 7, 4), (4, 9, 7)])
def test_several_numbers_of_units_are_solved_as_each_alone(name: str, counts: tuple[int, ...]) -> None:
    layer = random_layer(4, 5, 24)
    solver = ExactSwaps(enumerate=0).draft if name == "draft" else make_structured(name)
    sets = [maskopt.Units(maskopt.Unstructured(count), (None, 2)) for count in counts]
    for masks, result in zip(sets, solve_sets(layer, sets, solver), strict=True):
        alone = maskopt.solve(layer, masks, solver)
        assert torch.equal(result.mask, alone.mask)
        torch.testing.assert_close(result.objective, alone.objective, rtol=1e-9, atol=0)


def test_several_sets_with_other_fixed_units_or_widths_are_solved_as_each_alone() -> None:
    layer, solver = random_layer(4, 5, 24), ExactSwaps(enumerate=0)
    plain, wide = maskopt.Columns(12), maskopt.Units(maskopt.Unstructured(5), (None, 2))
    first = maskopt.solve(layer, plain, solver).mask
    sets = [plain, maskopt.Columns(14).restrict(kept=~first), wide, maskopt.Columns(10).restrict(pruned=first)]
    for masks, result in zip(sets, solve_sets(layer, sets, solver), strict=True):
        assert torch.equal(result.mask, maskopt.solve(layer, masks, solver).mask)


def test_greedy_removal_goes_on_from_one_number_of_units_to_the_next() -> None:
    layer = random_layer(4, 5, 24)
    sets = [maskopt.Columns(count) for count in (20, 12, 6)]
    first, second, third = solve_sets(layer, sets, ExactSwaps(enumerate=0).draft)
    assert first.counters["removals"] == 18, "not 4 + 12 + 18"
    for more, fewer in ((first, second), (second, third)):
        assert bool((more.mask | ~fewer.mask).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [-20, 20])
def test_scales_change_no_choice(name: str, power: int) -> None:
    layer = random_layer(3, 5, 16)
    scaled = LayerReconstruction(layer.weight * 2.0**power, layer.gram * 4.0 ** (-power // 2))
    one, other = (maskopt.solve(p, maskopt.Columns(6), make_structured(name)) for p in (layer, scaled))
    assert torch.equal(one.mask, other.mask)
    if one.weight is not None and other.weight is not None:
        torch.testing.assert_close(other.weight, one.weight * 2.0**power, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-6, 1e12])
def test_inputs_of_very_different_sizes(name: str, scale: float) -> None:
    layer = random_layer(5, 4, 10)
    size = torch.ones(10, dtype=torch.float64)
    size[::3] = scale
    problem = LayerReconstruction(layer.weight / size, layer.gram * size * size.unsqueeze(1))
    result = maskopt.solve(problem, maskopt.Columns(5), make_structured(name))
    assert bool(result.objective.isfinite().all())
    if name in ("best", "osscar", "spap", "random", "fasp"):  # whose choices depend on outputs alone
        plain = maskopt.solve(layer, maskopt.Columns(5), make_structured(name))
        assert torch.equal(plain.mask, result.mask)
        torch.testing.assert_close(result.objective, plain.objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dead_and_equal_inputs(name: str) -> None:
    layer = random_layer(6, 4, 9)
    gram = layer.gram.clone()
    gram[2], gram[:, 2] = 0.0, 0.0
    gram[5], gram[:, 5] = gram[4], gram[:, 4]
    gram[5, 5] = gram[4, 4]
    result = maskopt.solve(LayerReconstruction(layer.weight, gram), maskopt.Columns(7), make_structured(name))
    assert bool(result.objective.isfinite().all())
    if name in ("best", "osscar"):  # the two that are worth nothing go
        assert result.relative_error < 1e-3
        assert not result.mask[0, 2]
        assert int(result.mask[0, 4:6].sum()) == 1


@pytest.mark.parametrize("name", ["best", "osscar", "spap", "newton"])
@pytest.mark.parametrize("size", [1.0, 1e6, 1e12])
def test_weights_on_inputs_that_are_always_zero_keep_no_unit(name: str, size: float) -> None:
    layer = random_layer(6, 4, 9)
    live = torch.tensor([column for column in range(9) if column not in (2, 5)])
    weight, gram = layer.weight.clone(), torch.zeros_like(layer.gram)
    weight[:, [2, 5]] *= size
    gram[live.unsqueeze(1), live] = layer.gram[live.unsqueeze(1), live]
    expected = maskopt.solve(
        LayerReconstruction(weight[:, live], gram[live][:, live]), maskopt.Columns(4), make_structured(name)
    )
    result = maskopt.solve(LayerReconstruction(weight, gram), maskopt.Columns(4), make_structured(name))
    assert torch.equal(result.mask[:, live], expected.mask)
    torch.testing.assert_close(result.objective, expected.objective, rtol=1e-6, atol=0)
    # Where there is room for them they stay as they were.
    most = maskopt.solve(LayerReconstruction(weight, gram), maskopt.Columns(8), make_structured(name))
    assert most.weight is not None
    for dead in (2, 5):
        if most.mask[0, dead]:
            assert torch.equal(most.weight[:, dead], weight[:, dead])


@pytest.mark.parametrize("name", NAMES)
def test_fixed_units_are_respected(name: str) -> None:
    layer = random_layer(7, 4, 12)
    kept, pruned = torch.zeros(4, 12, dtype=torch.bool), torch.zeros(4, 12, dtype=torch.bool)
    plain = maskopt.solve(layer, maskopt.Units(maskopt.Unstructured(3), (None, 2)), make_structured(name)).mask
    kept[0, int((~plain[0]).nonzero()[0])] = True
    pruned[1, int(plain[0].nonzero()[0])] = True
    masks = maskopt.Units(maskopt.Unstructured(3), (None, 2)).restrict(kept=kept, pruned=pruned)
    for solver in (make_structured(name), ExactSwaps(enumerate=0)):
        result = maskopt.solve(layer, masks, solver)
        assert bool(result.mask[kept].all())
        assert not result.mask[pruned].any()
        assert int(result.mask[0].sum()) == 6


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_what_weights_are_fitted_to(name: str) -> None:
    layer = random_layer(8, 4, 10)
    target = layer.weight + 0.3 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = LayerReconstruction(layer.weight, layer.gram, target=target)
    everything = maskopt.solve(problem, maskopt.Columns(10), make_structured(name))
    assert torch.equal(everything.weight, target)
    assert everything.total == 0.0
    result = maskopt.solve(problem, maskopt.Columns(6), replace(make_structured(name), refit=True))
    kept = result.mask[0]
    expected = ridged(problem).refit(kept)
    torch.testing.assert_close(result.weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_refit_weights_stay(name: str) -> None:
    layer = random_layer(9, 4, 10)
    result = maskopt.solve(layer, maskopt.Columns(6), replace(make_structured(name), refit=False))
    assert result.weight is None
    refitted = maskopt.solve(layer, maskopt.Columns(6), replace(make_structured(name), refit=True))
    assert torch.equal(result.mask, refitted.mask)
    assert refitted.total < result.total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_single_rows_columns_and_types(name: str, dtype: torch.dtype) -> None:
    layer = LayerReconstruction(torch.tensor([[2.0]], dtype=dtype), torch.tensor([[3.0]], dtype=dtype))
    for keep, error in ((0, 12.0), (1, 0.0)):
        result = maskopt.solve(layer, maskopt.Columns(keep), make_structured(name))
        assert result.total == error
        assert result.weight is None or result.weight.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_stops_leave_a_choice(name: str) -> None:
    layer = random_layer(10, 4, 200, torch.float32)
    for after in (0, 2):
        calls = iter(range(after))
        result = maskopt.solve(
            layer,
            maskopt.Columns(80),
            make_structured(name),
            callback=lambda state, calls=calls: Stop.STOP if next(calls, None) is None else None,
        )
        assert int(result.mask[0].sum()) == 80
        if name in ("best", "osscar", "spap"):
            assert result.status is Status.STOPPED


@pytest.mark.parametrize("solver", [make_structured(name) for name in NAMES], ids=NAMES)
def test_sets_that_do_not_fit_are_refused(solver: Structured) -> None:
    layer = random_layer(11, 4, 8)
    with pytest.raises(MaskoptError, match="must be a Units"):
        maskopt.solve(layer, maskopt.PerRow(4), solver)
    with pytest.raises(MaskoptError, match="keeps whole columns"):
        maskopt.solve(layer, maskopt.Rows(2), solver)
    with pytest.raises(MaskoptError, match="one count for all columns"):
        maskopt.solve(layer, maskopt.Units(maskopt.NM(keep=2, group=4), (None, 1)), solver)


def test_settings_and_names_are_checked() -> None:
    with pytest.raises(MaskoptError, match="no method 'worst' for units; choose one of random, magnitude"):
        make_structured("worst")
    for name, settings in (
        ("best", {"enumerate": -1}),
        ("best", {"ridge": -1.0}),
        ("osscar", {"batch": 0}),
        ("spap", {"first": 0.0}),
        ("random", {"seed": 0.5}),
        ("flap", {"refit": 1}),
    ):
        with pytest.raises(MaskoptError):
            make_structured(name, **settings)
    with pytest.raises(MaskoptError, match="has no setting 'batch'"):
        make_structured("fasp", batch=3)


# Published scores, written out


def kept_of(name: str, layer: LayerReconstruction, keep: int) -> list[int]:
    return maskopt.solve(layer, maskopt.Columns(keep), make_structured(name)).mask[0].nonzero().flatten().tolist()


def largest(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:keep])


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_the_published_ones(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 40, generator=random, dtype=torch.float64) + torch.randn(7, 1, generator=random)
    weight = torch.randn(3, 7, generator=random, dtype=torch.float64)
    layer = LayerReconstruction(weight, x @ x.T, 40, mean=x.mean(1))
    columns = range(7)
    fasp = [sum(abs(float(weight[i, j])) for i in range(3)) * float(x[j].norm()) for j in columns]
    flap = [float(x[j].var()) * float(weight[:, j].norm()) ** 2 for j in columns]
    moments = [float(x[j].square().mean()) * float(weight[:, j].norm()) ** 2 for j in columns]
    norms = [float(weight[:, j].norm()) for j in columns]
    assert kept_of("fasp", layer, 4) == largest(fasp, 4)
    assert kept_of("flap", layer, 4) == largest(flap, 4)
    assert kept_of("magnitude", layer, 4) == largest(norms, 4)
    assert kept_of("flap", LayerReconstruction(weight, x @ x.T, 40), 4) == largest(moments, 4)


def test_the_newton_step_solves_its_equations() -> None:
    layer = random_layer(12, 3, 6)
    gram = layer.gram + 0.01 * torch.diag(layer.gram.diagonal())
    hessian = gram * (layer.weight.T @ layer.weight)
    system = torch.ones(7, 7, dtype=torch.float64)
    system[:6, :6], system[6, 6] = 2 * hessian, 0.0
    right = torch.zeros(7, dtype=torch.float64)
    right[6] = 2.0  # two units are removed
    step = torch.linalg.solve(system, right)[:6]
    assert kept_of("newton", layer, 4) == largest((-step).tolist(), 4)


def test_random_choices_depend_on_the_seed_alone() -> None:
    one, two = random_layer(1, 3, 30), random_layer(2, 5, 30)
    masks = [
        maskopt.solve(p, maskopt.Columns(15), make_structured("random", seed=s)).mask[0]
        for p, s in ((one, 0), (two, 0), (one, 1))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_bias_changes_keep_the_mean_output() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, generator=random, dtype=torch.float64) + 1.0
    weight = torch.randn(4, 6, generator=random, dtype=torch.float64)
    layer = LayerReconstruction(weight, x @ x.T, 50, mean=x.mean(1))
    for solver in (make_structured("flap"), make_structured("best")):
        result = maskopt.solve(layer, maskopt.Columns(3), solver)
        kept = weight * result.mask if result.weight is None else result.weight
        bias = bias_change(layer, kept)
        torch.testing.assert_close((kept @ x).mean(1) + bias, (weight @ x).mean(1))
    assert torch.equal(layer.rows(slice(1, 3)).mean, layer.mean)
    assert torch.equal(layer.double().mean, layer.mean)
    with pytest.raises(MaskoptError, match="needs the means of the inputs"):
        bias_change(LayerReconstruction(weight, x @ x.T), weight)
    with pytest.raises(MaskoptError, match=r"mean must have shape \(6,\)"):
        LayerReconstruction(weight, x @ x.T, mean=torch.ones(5))


def test_better_methods_have_smaller_errors_on_average() -> None:
    errors = dict.fromkeys(NAMES, 0.0)
    for seed in range(6):
        layer = random_layer(20 + seed, 12, 40)
        for name in NAMES:
            solver = replace(make_structured(name), refit=True)
            errors[name] += maskopt.solve(layer, maskopt.Columns(20), solver).relative_error
    assert min(errors, key=lambda name: errors[name]) == "best"
    assert max(errors, key=lambda name: errors[name]) == "random"
    assert errors["osscar"] < min(errors["fasp"], errors["magnitude"], errors["flap"])


@pytest.mark.parametrize("width", [1, 2])
def test_one_turn_of_spap_keeps_what_costs_most_to_remove_alone(width: int) -> None:
    layer = random_layer(30, 5, 12)
    masks = maskopt.Units(maskopt.Unstructured(6 // width), (None, width))
    result = maskopt.solve(layer, masks, make_structured("spap", turns=1))
    costs = ridged(layer).removal_costs(torch.ones(12, dtype=torch.bool)).view(-1, width).sum(1).tolist()
    assert result.mask[0, ::width].nonzero().flatten().tolist() == largest(costs, 6 // width)


def test_turns_of_spap_are_penalised_regressions() -> None:
    layer, turns = random_layer(31, 5, 12), 10
    subset = ridged(layer)
    target, gram = subset.target, subset.gram
    penalty = torch.zeros(12, dtype=torch.float64)
    for turn in range(turns):
        inverse = torch.linalg.inv(gram + torch.diag(penalty))
        weight = target @ gram @ inverse
        own = 1.0 / inverse.diagonal() - penalty
        removed = round(min(1.0, (turn + 1) / 7) * 6)
        kept = largest((own * weight.square().sum(0)).tolist(), 12 - removed)
        penalty = 100.0 ** (turn / (turns - 1)) * own
        penalty[kept] = 0.0
    result = maskopt.solve(layer, maskopt.Columns(6), make_structured("spap", turns=turns))
    assert result.mask[0].nonzero().flatten().tolist() == kept
