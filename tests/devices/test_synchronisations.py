"""How often the host waits for the device while a solver iterates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction, synthetic
from maskopt.solvers import ContinuationFrankWolfe, FrankWolfe, Result, Solver, SparseFW, Wanda, solve
from maskopt.weights import ADMM, ALPS, ConditionalADMM, LeastSquares
from tests.devices.pretend import DEVICE, Waits, pretend_device
from tests.helpers import ALL_SETS, SET_ENTRIES, thinned

SHAPE = (4, 24)
FEW, MANY = 10, 40

# The oracles of these sets need nothing of the host; others solve programs there, or settle ties without rounding.
SETS = [name for name, entry in SET_ENTRIES.items() if entry.matroid]
SETS += ["whole columns", "whole rows", "units", "vectors", "at most units", "product", "restricted product"]

METHODS: dict[str, Callable[[int], Solver]] = {
    "continuation": lambda n: ContinuationFrankWolfe(iterations=n, second=0.0, polish=False),
    "best": lambda n: ConditionalADMM(iterations=n),
    # A penalty that grows slowly, so that masks keep changing.
    "alps": lambda n: ALPS(iterations=n, penalty=0.01, growth=(1.002, 1.001, 1.0005)),
}
OTHERS: dict[str, Callable[[int], Solver]] = {
    "admm": lambda n: ADMM(iterations=n, selections=5),
    "sparsefw": lambda n: SparseFW(iterations=n),
    "conjugate gradients": lambda n: LeastSquares(solver=Wanda(), method="cg", steps=n),
}


def run(solver: Solver, kind: str) -> tuple[Result, Waits]:
    """Return a solver's result on the pretend device, and the waits."""
    instance = synthetic("correlated", *SHAPE, seed=0)
    with pretend_device():
        problem = LayerReconstruction(instance.weight.to(DEVICE), instance.gram.to(DEVICE))
    with pretend_device() as waits:
        result = solve(problem, ALL_SETS[kind](SHAPE, 0.5), solver)
    return result, waits


@pytest.mark.parametrize(
    ("name", "kind"),
    # Of whole rows ALPS finds the best ones at once, and ends.
    [pair for pair in thinned(2, METHODS, SETS) if pair != ("alps", "whole rows")],
)
def test_the_host_waits_at_most_once_in_ten_iterations(name: str, kind: str) -> None:
    (few, before), (many, after) = (run(METHODS[name](number), kind) for number in (FEW, MANY))
    assert many.iterations - few.iterations >= MANY - FEW, "the method ended on its own, so nothing is measured"
    assert after.total - before.total <= (MANY - FEW) / 10, after


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_do_not_wait_where_they_need_not(name: str) -> None:
    (_, before), (_, after) = (run(OTHERS[name](number), "per-row") for number in (FEW, MANY))
    assert after == before


def test_relinking_does_not_wait_either() -> None:
    solver = {n: ContinuationFrankWolfe(iterations=n, polish=False) for n in (FEW, MANY)}
    (few, before), (many, after) = (run(solver[n], "per-row") for n in (FEW, MANY))
    assert many.iterations - few.iterations > 1.5 * (MANY - FEW)
    assert after.total <= before.total


def test_the_loop_with_a_stopping_test_waits_once_in_an_iteration() -> None:
    solver = {n: FrankWolfe("conjugate", iterations=n, relative_gap=0.0, polish=False) for n in (FEW, MANY)}
    found = []
    for number in (FEW, MANY):
        _, waits = run(solver[number], "per-row")
        found.append(sum(count for place, count in waits.reads.items() if "maskopt.solvers.loop" in place))
    assert found == [FEW, MANY]


def test_groups_with_counts_of_their_own_do_not_make_the_oracle_wait() -> None:
    masks = ALL_SETS["block counts"](SHAPE, 0.5)
    assert isinstance(masks, PartitionMatroid)
    instance = synthetic("correlated", *SHAPE, seed=0)
    with pretend_device() as waits:
        cost = instance.weight.to(DEVICE)
        masks.lmo(cost)
        before = waits.total  # the counts have been copied to the device
        masks.lmo(cost)
        assert waits.total == before


@pytest.mark.parametrize("every", [1, 3, 25])
def test_alps_ends_at_the_same_check_on_both_devices(every: int) -> None:
    # It ends on its own, so that the host learns of it later than it happens.
    problem = synthetic("correlated", *SHAPE, seed=0).problem()
    masks, solver = ALL_SETS["per-row"](SHAPE, 0.5), ALPS(every=every, penalty=0.3, polish=0)
    here = solve(problem, masks, solver)
    there, waits = run(solver, "per-row")
    assert there.iterations == here.iterations < solver.iterations
    assert torch.equal(there.mask.cpu(), here.mask)
    assert there.weight is not None
    assert here.weight is not None
    assert torch.equal(there.weight.cpu(), here.weight)
    made = there.counters["products"] // 2
    assert here.iterations <= made < here.iterations + 10
    reads = sum(count for place, count in waits.reads.items() if "maskopt.weights.alps" in place)
    assert reads <= 2 + made / 10  # the eigenvalues, and a last reading
