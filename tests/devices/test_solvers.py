"""Every solver and every method for weights on the pretend device: the CPU's results, on the device."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from maskopt.bounds import mask_bound
from maskopt.oracles import MaskSet, PartitionMatroid, PerRow
from maskopt.problems import LayerReconstruction, Problem, QuadraticForm, Saliency, synthetic
from maskopt.solvers import ContinuationFrankWolfe, FrankWolfe, OneSwap, Result, Solver, Wanda, solve
from maskopt.weights import WEIGHTS, LeastSquares, conditional_deviations, make_weights
from tests.devices.pretend import DEVICE, pretend_device
from tests.helpers import ALL_SETS, EXACT, FRANK_WOLFE, SOLVERS, thinned

SHAPE = (4, 8)
TINY = (2, 6)  # for exact solvers
LAYER = synthetic("correlated", *SHAPE, seed=1).problem()

SOME_SETS = ["per-row", "unstructured", "row counts", "restricted at most blocks", "units", "restricted transposable"]


def _quick(name: str) -> Solver:
    settings = {"lsq": {"solver": Wanda()}, "best": {"iterations": 12}, "fista": {"rounds": 4, "iterations": 5}}
    return make_weights(name, **settings.get(name, {}))  # type: ignore[arg-type]


def _short(solver: Solver) -> Solver:
    return replace(solver, iterations=8) if isinstance(solver, ContinuationFrankWolfe | FrankWolfe) else solver


METHODS: dict[str, Solver] = {
    **{name: _short(solver) for name, solver in SOLVERS.items()},
    **{name: _quick(name) for name in WEIGHTS if name != "keep"},
    "conjugate gradients": LeastSquares(solver=Wanda(), method="cg", steps=10),
}
RULES: dict[str, Solver] = {
    **{f"frank-wolfe {name}": _short(solver) for name, solver in FRANK_WOLFE.items()},
    **{f"step {name}": FrankWolfe(step=name, iterations=8) for name in ("short", "secant", "adaptive", "monotone")},
}


def pairs(
    solvers: dict[str, Solver], sets: list[str], problem: LayerReconstruction, one_in: int = 1
) -> list[tuple[str, str]]:
    """Return the names of solvers and of sets that they work on, `thinned`."""
    made = {name: ALL_SETS[name](problem.shape, 0.5) for name in sets}
    chosen = thinned(one_in, solvers, sets)
    return [(one, name) for one, name in chosen if solvers[one].requirements.met(problem, made[name])]


def elsewhere(layer: LayerReconstruction, device: torch.device = DEVICE) -> LayerReconstruction:
    target = layer.target.to(device) if layer.aims_elsewhere else None
    return LayerReconstruction(layer.weight.to(device), layer.gram.to(device), target=target)


def assert_same(here: Result, there: Result) -> None:
    """Check that results agree bit by bit, and that tensors are where they were computed."""
    for one in fields(Result):
        mine, other = getattr(here, one.name), getattr(there, one.name)
        if isinstance(mine, Tensor):
            assert other.device == DEVICE, one.name
            assert torch.equal(mine, other.cpu()), one.name
        elif one.name == "history":
            assert list(mine) == list(other)
            for column in set(mine) - {"seconds"}:
                torch.testing.assert_close(mine[column], other[column], rtol=0, atol=0, equal_nan=True)
        elif one.name not in ("seconds", "counters"):  # there ALPS may make some more products
            assert mine == other, one.name
    assert {**there.counters, "products": 0} == {**here.counters, "products": 0}


def compare(layer: LayerReconstruction, masks: MaskSet, solver: Solver, start: Tensor | None = None) -> None:
    here = solve(layer, masks, solver, start=start)
    with pretend_device():
        assert_same(here, solve(elsewhere(layer), masks, solver, start=start))


@pytest.mark.parametrize(("name", "kind"), pairs(METHODS, list(ALL_SETS), LAYER, one_in=4))
def test_methods_agree_with_the_cpu_on_every_set(name: str, kind: str) -> None:
    compare(LAYER, ALL_SETS[kind](SHAPE, 0.5), METHODS[name])


@pytest.mark.parametrize(("name", "kind"), pairs(RULES, SOME_SETS, LAYER, one_in=2))
def test_directions_and_steps_agree_with_the_cpu(name: str, kind: str) -> None:
    compare(LAYER, ALL_SETS[kind](SHAPE, 0.5), RULES[name])


@pytest.mark.parametrize(("name", "kind"), pairs(EXACT, ["per-row", "restricted at most blocks"], LAYER))
def test_exact_solvers_agree_with_the_cpu(name: str, kind: str) -> None:
    compare(synthetic("correlated", *TINY, seed=2).problem(), ALL_SETS[kind](TINY, 0.5), EXACT[name])


@pytest.mark.parametrize("name", ["continuation", "best", "sparsefw"])
def test_a_start_may_lie_on_the_cpu(name: str) -> None:
    masks = PerRow(0.5)
    compare(LAYER, masks, METHODS[name], start=solve(LAYER, masks, Wanda()).mask)


@pytest.mark.parametrize("kind", ["per-row", "row counts", "block counts", "protected rows", "at most counts"])
@pytest.mark.parametrize("solver", [ContinuationFrankWolfe(iterations=10), OneSwap()], ids=["continuation", "one-swap"])
def test_sets_that_were_made_on_the_device_work_there(kind: str, solver: Solver) -> None:
    masks = ALL_SETS[kind](SHAPE, 0.5)
    assert isinstance(masks, PartitionMatroid)
    here = solve(LAYER, masks, solver)
    with pretend_device():
        keep = masks.keep.to(DEVICE) if isinstance(masks.keep, Tensor) else masks.keep
        own = PartitionMatroid(keep, masks.tile, masks.name, at_most=masks.at_most)
        fixed = None if masks.protected is None else masks.protected.to(DEVICE)
        assert_same(here, solve(elsewhere(LAYER), own.restrict(fixed), solver))


@pytest.mark.parametrize("name", ["continuation", "one-swap", "best", "lsq", "fista"])
def test_targets_of_pruned_predecessors_stay_on_the_device(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    cross = LAYER.gram + 0.1 * torch.randn(LAYER.gram.shape, generator=random) * LAYER.gram.diagonal().mean()
    layer = LayerReconstruction.towards(LAYER.weight, LAYER.gram, cross)
    here = solve(layer, PerRow(0.5), METHODS[name])
    with pretend_device():
        data = (part.to(DEVICE) for part in (LAYER.weight, LAYER.gram, cross))
        assert_same(here, solve(LayerReconstruction.towards(*data), PerRow(0.5), METHODS[name]))


def _problems(device: torch.device) -> dict[str, Problem]:
    weight, gram = LAYER.weight.to(device), LAYER.gram.to(device)
    return {
        "quadratic form": QuadraticForm(gram, weight),
        "saliency": Saliency.wanda(weight, gram),
        "shifted": LayerReconstruction(weight, gram).shifted(weight.square()),
        "float64": LayerReconstruction(weight.double(), gram.double()),
    }


@pytest.mark.parametrize("name", _problems(torch.device("cpu")))
def test_other_objectives_agree_with_the_cpu(name: str) -> None:
    solver = FrankWolfe("conjugate", iterations=15)
    here = solve(_problems(torch.device("cpu"))[name], PerRow(0.5), solver)
    with pretend_device():
        assert_same(here, solve(_problems(DEVICE)[name], PerRow(0.5), solver))


@pytest.mark.parametrize("kind", ["sdp", "shift"])
def test_bounds_agree_with_the_cpu(kind: str) -> None:
    here = mask_bound(LAYER, PerRow(0.5), kind)
    with pretend_device():
        there = mask_bound(elsewhere(LAYER), PerRow(0.5), kind)
        assert there.device == DEVICE
        assert torch.equal(there.cpu(), here)


def test_conditional_deviations_agree_with_the_cpu() -> None:
    with pretend_device():
        assert torch.equal(conditional_deviations(LAYER.gram.to(DEVICE)).cpu(), conditional_deviations(LAYER.gram))


def test_a_layer_on_two_devices_is_refused() -> None:
    from maskopt.errors import MaskoptError

    with pretend_device(), pytest.raises(MaskoptError, match="put both on one device"):
        LayerReconstruction(LAYER.weight.to(DEVICE), LAYER.gram)


@pytest.mark.parametrize("name", ["scip", "brute-force"])
def test_exact_solvers_copy_a_layer_to_the_cpu_a_few_times_however_many_masks_they_compare(name: str) -> None:
    found = []
    for d in (4, 8):
        layer = synthetic("correlated", rows=1, d=d, seed=0).problem()
        with pretend_device():
            there = elsewhere(layer)
        with pretend_device() as waits:
            solve(there, PerRow(0.5), EXACT[name])
        found.append(waits.total)
    assert found[1] <= found[0] + 2, found
