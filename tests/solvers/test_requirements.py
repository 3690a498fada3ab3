"""Requirements of solvers are declared on their classes, agree with their signatures, and are checked first."""

import typing
from dataclasses import dataclass

import pytest
import torch

import maskopt
from maskopt.errors import MaskoptError
from maskopt.oracles import Budget, CanSwap, HasFaces, HasGroups, MaskSet, PartitionMatroid, PerRow
from maskopt.problems import Function, LayerReconstruction, Problem, Quadratic, QuadraticForm
from maskopt.solvers import (
    DIRECTIONS,
    SOLVERS,
    STEPS,
    ContinuationFrankWolfe,
    FrankWolfe,
    OneSwap,
    Requirements,
    Solver,
    SparseFW,
)
from maskopt.solvers.outcome import Outcome, Status
from maskopt.solvers.rounding import dependent
from maskopt.weights import WEIGHTS, SparseGPT


def layer() -> LayerReconstruction:
    return maskopt.synthetic("correlated", rows=4, d=8).problem()


def form() -> QuadraticForm:
    return QuadraticForm(torch.eye(8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64))


def budget() -> Budget:
    return Budget(torch.ones(4, 8), 16.0)


EVERY = {
    **{name: make() for name, make in SOLVERS.items()},
    **{name: make() for name, make in WEIGHTS.items() if make is not None},
}


@pytest.mark.parametrize("name", EVERY)
def test_the_types_in_run_are_the_declared_ones(name: str) -> None:
    solver = EVERY[name]
    hints = typing.get_type_hints(type(solver).run)
    requires = solver.requires
    for argument, base, declared in (("problem", Problem, requires.problem), ("masks", MaskSet, requires.masks)):
        assert hints[argument] is typing.Any or hints[argument] in (base, *declared), name
    # A mask that is never None is a start that `solve` requires.
    assert solver.needs_start or hints["start"] != torch.Tensor


@pytest.mark.parametrize("name", EVERY)
def test_every_solver_refuses_in_one_sentence_what_it_does_not_declare(name: str) -> None:
    solver = EVERY[name]
    function = Function(lambda x: (x**2).sum(1), (4, 8), convex=True)
    for problem, masks in ((function, PerRow(0.5)), (form(), budget()), (layer(), budget()), (form(), PerRow(0.5))):
        if solver.requirements.met(problem, masks):
            continue
        with pytest.raises(MaskoptError, match=r"^\S.* is not compatible with .*: it must (be a|implement) [^\n]*\.$"):
            maskopt.solve(problem, masks, solver)


def test_a_set_that_swaps_and_is_no_partition_matroid_is_refused_by_name_of_the_class() -> None:
    class Odd(MaskSet):
        """Rows that keep their first or their last entry."""

        def check(self, shape: object) -> None: ...

        def lmo(self, cost: torch.Tensor) -> torch.Tensor:
            first = torch.zeros_like(cost)
            first[:, 0] = 1.0
            return first

        def contains(self, mask: torch.Tensor) -> bool:
            return True

        def center(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return torch.full(shape, 0.5, dtype=dtype, device=device)

        def milp_constraints(self, shape: object) -> object:
            raise NotImplementedError

        def swap_groups(self, shape: tuple[int, int]) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        def __repr__(self) -> str:
            return "Odd()"

    assert isinstance(Odd(), CanSwap)
    with pytest.raises(MaskoptError, match=r"^Odd\(\) is not compatible with OneSwap: it must be a PartitionMatroid;"):
        maskopt.solve(layer(), Odd(), OneSwap())


def test_settings_may_require_more_than_the_class() -> None:
    assert SparseFW().requirements == Requirements()
    assert SparseFW(alpha=0.5).requirements.masks == (PartitionMatroid,)
    assert FrankWolfe("dicg", step="exact").requirements == Requirements((Quadratic,), (HasFaces,))
    with pytest.raises(MaskoptError, match="must be a PartitionMatroid"):
        maskopt.solve(layer(), budget(), SparseFW(alpha=0.5))
    with pytest.raises(MaskoptError, match="must be a PartitionMatroid"):
        maskopt.solve(layer(), budget(), SparseGPT())


@pytest.mark.parametrize("name", DIRECTIONS)
def test_rules_declare_what_they_need(name: str) -> None:
    """On a set with only an oracle a direction runs or is refused; it never fails inside."""
    rule = DIRECTIONS[name]()
    solver = FrankWolfe(rule, iterations=3, polish=False)
    if rule.requires.met(form(), budget()):
        assert budget().contains(maskopt.solve(form(), budget(), solver).mask)
    else:
        with pytest.raises(MaskoptError, match="it must"):
            maskopt.solve(form(), budget(), solver)


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_need_a_quadratic_are_refused_for_other_functions(name: str) -> None:
    function = Function(lambda x: ((x - 0.3) ** 4).sum(1), (4, 8), convex=True)
    solver = FrankWolfe("vanilla", step=name, iterations=3)
    if STEPS[name]().requires.problem:
        with pytest.raises(MaskoptError, match=r"Function is not compatible with .* it must be a Quadratic"):
            maskopt.solve(function, PerRow(0.5), solver)
    else:
        assert maskopt.solve(function, PerRow(0.5), solver).mask.sum() == 16


def test_rounding_says_which_methods_are_missing() -> None:
    with pytest.raises(MaskoptError, match=r"dependent rounding: it must implement groups, ungroup; missing: groups"):
        dependent(budget(), torch.full((4, 8), 0.5), torch.Generator())
    assert isinstance(PerRow(0.5), HasGroups)


def test_a_solver_that_needs_a_start_says_so() -> None:
    @dataclass(frozen=True)
    class Starts(Solver):
        needs_start = True

        def run(self, problem: Problem, masks: MaskSet, start: torch.Tensor, monitor: object) -> Outcome:
            return Outcome(start, Status.COMPLETED, 0)

    with pytest.raises(MaskoptError, match=r"^Starts needs a mask to start from; give solve\(..., start=...\)"):
        maskopt.solve(layer(), PerRow(0.5), Starts())
    assert maskopt.solve(layer(), PerRow(0.5), Starts(), start=ContinuationFrankWolfe(iterations=5)).mask.sum() == 16


def test_requirements_join_without_repetition() -> None:
    one, two = Requirements((Quadratic,), (HasFaces,)), Requirements((Quadratic, LayerReconstruction), (HasGroups,))
    assert one.joined(two) == Requirements((Quadratic, LayerReconstruction), (HasFaces, HasGroups))
    assert one.joined(two).met(layer(), PerRow(0.5))
    assert not one.joined(two).met(form(), PerRow(0.5))
