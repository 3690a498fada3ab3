"""Layers whose target is the output of other weights than their own, as behind pruned layers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.bounds import sdp_bound
from maskopt.errors import MaskoptError
from maskopt.oracles import PerRow, Unstructured
from maskopt.problems import LayerReconstruction
from maskopt.solvers import BruteForce, ContinuationFrankWolfe, FrankWolfe, OneSwap, Scip, SparseFW, solve
from tests.helpers import Layer, every_mask, examples, layers


def aimed(layer: Layer, seed: int) -> tuple[LayerReconstruction, torch.Tensor]:
    random = np.random.default_rng(seed)
    target = layer.weight + torch.from_numpy(random.integers(-2, 3, layer.shape)).double()
    return LayerReconstruction(layer.weight, layer.gram, target=target), target


def error(layer: Layer, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((target - weight) @ layer.x).square().sum(1)


@given(layers(), st.integers(0, 99))
@examples(60)
def test_values_and_gradients_are_those_of_the_outputs(layer, seed):
    problem, target = aimed(layer, seed)
    x = torch.from_numpy(np.random.default_rng(seed).random(layer.shape)).requires_grad_()
    truth = error(layer, target, layer.weight * x)
    truth.sum().backward()
    truth = truth.detach()
    size = float(truth.sum()) + float(error(layer, target, -layer.weight).sum()) + 1.0
    for seen in (problem, problem.double(), problem.rows(slice(None)), problem.rows(torch.arange(len(x)))):
        point = seen.evaluate(x.detach().clone())
        torch.testing.assert_close(seen.value(point) * seen.unit, truth, rtol=0, atol=1e-12 * size)
        torch.testing.assert_close(seen.gradient(point) * seen.unit, x.grad, rtol=0, atol=1e-11 * size)
    mask = x.detach() > 0.5
    kept = layer.weight * mask
    for found in (problem.objective(mask), problem.error(kept)):
        torch.testing.assert_close(found, error(layer, target, kept), rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(problem.scale(), error(layer, target, 0 * kept), rtol=0, atol=1e-12 * size)
    direction = problem.hvp(torch.ones_like(kept))
    step_size = torch.full((len(kept),), 0.25, dtype=torch.float64)
    ahead = problem.evaluate(x.detach() + 0.25)
    torch.testing.assert_close(
        problem.unit * problem.slope(point, direction, step_size),
        problem.unit * ahead.gradient.sum(1),
        rtol=0,
        atol=1e-10 * size,
    )


@given(layers(), st.integers(0, 99))
@examples(40)
def test_a_target_that_is_the_weight_changes_nothing(layer, seed):
    plain, same = layer.problem(), LayerReconstruction(layer.weight, layer.gram, target=layer.weight.clone())
    assert not plain.aims_elsewhere
    assert same.aims_elsewhere
    mask = torch.from_numpy(np.random.default_rng(seed).random(layer.shape)) > 0.5
    assert torch.equal(plain.objective(mask), same.objective(mask))
    assert torch.equal(plain.evaluate(mask.double()).gradient, same.evaluate(mask.double()).gradient)
    assert torch.equal(plain.scale(), same.scale())


SOLVERS = [ContinuationFrankWolfe(), OneSwap(), SparseFW(iterations=50), FrankWolfe(iterations=50), BruteForce()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@given(data=st.data())
@examples(15)
def test_solvers_bring_errors_and_bounds_on_either_side_of_the_optimum(solver, data):
    layer = data.draw(layers(rows=(1, 2), d=(2, 6)))
    problem, target = aimed(layer, data.draw(st.integers(0, 9)))
    masks = data.draw(st.sampled_from([PerRow(0.5), PerRow(1), Unstructured(0.5)]))
    result = solve(problem, masks, solver)
    every = every_mask(masks, layer.shape)
    best = min(float(error(layer, target, layer.weight * mask).sum()) for mask in every)
    size = float(problem.scale().sum()) + float(layer.problem().scale().sum()) + 1.0
    truth = float(error(layer, target, layer.weight * result.mask).sum())
    assert result.total == pytest.approx(truth, abs=1e-11 * size)
    assert result.total >= best - 1e-11 * size
    if result.lower_bound is not None:
        assert float(result.lower_bound.sum()) <= best + 1e-11 * size
    if isinstance(solver, BruteForce):
        assert result.total == pytest.approx(best, abs=1e-11 * size)


def test_swaps_end_in_a_true_local_optimum():
    random = np.random.default_rng(3)
    layer = Layer(*(torch.from_numpy(random.standard_normal(shape)) for shape in ((3, 12), (12, 30))), "normal")
    problem, target = aimed(layer, 3)
    result = solve(problem, PerRow(0.5), OneSwap())
    for neighbour in PerRow(0.5).neighbours(result.mask):
        assert (error(layer, target, layer.weight * neighbour) >= result.objective * (1 - 1e-9)).all()


def test_scip_finds_the_optimum():
    pytest.importorskip("pyscipopt")
    random = np.random.default_rng(4)
    layer = Layer(*(torch.from_numpy(random.standard_normal(shape)) for shape in ((2, 8), (8, 20))), "normal")
    problem, _ = aimed(layer, 4)
    exact = solve(problem, PerRow(0.5), BruteForce())
    torch.testing.assert_close(solve(problem, PerRow(0.5), Scip()).objective, exact.objective, rtol=1e-6, atol=0)


@given(layers(rows=(1, 3), d=(1, 6)), st.integers(0, 99))
@examples(40)
def test_towards_aims_at_the_best_weights_on_the_new_inputs(layer, seed):
    random = np.random.default_rng(seed)
    new = layer.x + torch.from_numpy(random.standard_normal(layer.x.shape))
    gram, cross = new @ new.T, layer.x @ new.T
    target = LayerReconstruction.towards(layer.weight, gram, cross, ridge=1e-9).scaled_target
    wanted = layer.weight @ layer.x

    def lost(weight):
        return float((wanted - weight @ new).square().sum())

    best = np.linalg.lstsq(new.T.numpy(), wanted.T.numpy(), rcond=None)[0].T
    minimum, size = (
        lost(torch.from_numpy(best)),
        float(wanted.square().sum()) + float((layer.weight @ new).square().sum()),
    )
    assert lost(target) <= minimum + 1e-5 * (size + 1.0)
    # Without any difference between the inputs the weights are their own target.
    same = LayerReconstruction.towards(layer.weight, layer.gram, layer.gram)
    torch.testing.assert_close(same.scaled_target, layer.weight, rtol=0, atol=1e-12)


@given(layers(rows=(1, 3), d=(1, 6)), st.integers(0, 99))
@examples(40)
def test_towards_makes_up_for_what_was_lost_before(layer, seed):
    random = np.random.default_rng(seed)
    new = layer.x + torch.from_numpy(random.standard_normal(layer.x.shape))
    size = float((layer.weight @ layer.x).square().mean().sqrt()) + 1e-300
    missing = size * torch.from_numpy(random.standard_normal((layer.shape[0], layer.x.shape[1])))
    gram, cross, wanted = new @ new.T, layer.x @ new.T, missing + layer.weight @ layer.x
    aim = LayerReconstruction.towards(layer.weight, gram, cross, ridge=1e-9, lost=missing @ new.T).target
    best = torch.from_numpy(np.linalg.lstsq(new.T.numpy(), wanted.T.numpy(), rcond=None)[0].T)
    minimum = float((wanted - best @ new).square().sum())
    whole = float(wanted.square().sum()) + float((layer.weight @ new).square().sum())
    assert float((wanted - aim @ new).square().sum()) <= minimum + 1e-5 * (whole + 1e-300)


def test_what_was_lost_has_the_shape_of_the_weight():
    with pytest.raises(MaskoptError, match=r"lost needs the shape of the weight, \(2, 3\); got \(3, 2\)"):
        LayerReconstruction.towards(torch.ones(2, 3), torch.eye(3), torch.eye(3), lost=torch.ones(3, 2))
    with pytest.raises(MaskoptError, match="lost"):
        LayerReconstruction.towards(torch.ones(1, 1), torch.eye(1), torch.eye(1), lost=torch.tensor([[float("nan")]]))


def test_a_large_ridge_draws_the_target_towards_the_weight():
    random = np.random.default_rng(5)
    weight, x, new = (torch.from_numpy(random.standard_normal(shape)) for shape in ((2, 5), (5, 40), (5, 40)))
    far = [
        float((LayerReconstruction.towards(weight, new @ new.T, x @ new.T, ridge=ridge).scaled_target - weight).norm())
        for ridge in (1e-3, 1.0, 1e3)
    ]
    assert far[0] > far[1] > 100 * far[2]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_strength_is_the_part_of_the_way_to_the_target(strength):
    random = np.random.default_rng(7)
    weight, x, new = (torch.from_numpy(random.standard_normal(shape)) for shape in ((2, 5), (5, 40), (5, 40)))
    full = LayerReconstruction.towards(weight, new @ new.T, x @ new.T).target
    part = LayerReconstruction.towards(weight, new @ new.T, x @ new.T, strength=strength).target
    torch.testing.assert_close(part - weight, strength * (full - weight))


def test_targets_of_half_precision_weights_keep_their_digits():
    random = np.random.default_rng(6)
    weight, x, new = (torch.from_numpy(random.standard_normal(shape)) for shape in ((2, 5), (5, 40), (5, 40)))
    weight = weight.bfloat16()
    half = LayerReconstruction.towards(weight, (new @ new.T).float(), (x @ new.T).float())
    full = LayerReconstruction.towards(weight.double(), new @ new.T, x @ new.T)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.scaled_target.double(), full.scaled_target, rtol=1e-4, atol=1e-5)


def test_misfits_are_refused():
    weight, gram = torch.ones(2, 3), torch.eye(3)
    with pytest.raises(MaskoptError, match=r"The target must have the weight's shape \(2, 3\)"):
        LayerReconstruction(weight, gram, target=torch.ones(3, 3))
    with pytest.raises(MaskoptError, match="The target must be finite"):
        LayerReconstruction(weight, gram, target=torch.full((2, 3), torch.nan))
    with pytest.raises(MaskoptError, match="aims at its own weights' output"):
        sdp_bound(LayerReconstruction(weight, gram, target=2 * weight), torch.tensor([1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_handed_in_stays_as_it_is(dtype):
    """Also in float64, where nothing has to be converted, and with more inputs than one block of a product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 900, generator=generator, dtype=dtype)
    y = x + 0.1 * torch.randn(600, 900, generator=generator, dtype=dtype)
    weight = torch.randn(3, 600, generator=generator, dtype=dtype)
    gram, cross = y @ y.T, x @ y.T
    gram = (gram + gram.T) / 2
    before = weight.clone(), gram.clone(), cross.clone()
    problem = LayerReconstruction.towards(weight, gram, cross)
    pruned = weight * (weight.abs() > 0.5)
    errors = [problem.error(pruned) for _ in range(2)]
    assert torch.equal(*errors)
    assert all(torch.equal(now, then) for now, then in zip((weight, gram, cross), before, strict=True))
    change = (problem.target - pruned).double()
    torch.testing.assert_close(errors[0], torch.linalg.vecdot(change @ gram.double(), change))
