"""Nothing false is claimed whatever the scales of the data: every set with every solver that proves anything.

To look for more: MASKOPT_EXPLORE=10 python -m pytest tests/properties/test_scales.py, or benchmarks/false_claims.py.
"""

import os

import pytest

from maskopt.solvers import DIRECTIONS
from maskopt.solvers.registry import SOLVERS
from tests import scales
from tests.helpers import ALL_SETS

_TIMES = max(1, int(os.environ.get("MASKOPT_EXPLORE", "0")))
SLOW = ("scip", "scip raw", "scip, wide gap", "shift bound", "cuts bound")
PROVERS = [name for name, claimant in scales.CLAIMANTS.items() if claimant.proves]


@pytest.mark.parametrize("solver", [*scales.CLAIMANTS, *scales.BOUNDS, scales.ORACLE])
def test_claims_are_true(solver: str) -> None:
    number = (12 if solver in SLOW else 200 if solver == scales.ORACLE else 40) * _TIMES
    findings = [scales.examine(7, index, solver) for index in range(number)]
    assert [found.where for found in findings if found.false] == []
    assert sum(found.refused for found in findings) <= number // 4


@pytest.mark.parametrize("scaling", scales.SCALINGS)
def test_branch_and_bound_proves_every_kind_of_scaling(scaling: str) -> None:
    findings = [scales.examine(8, index, "branch-and-bound", scaling) for index in range(10 * _TIMES)]
    assert [found.where for found in findings if found.false] == []
    asked = [found for found in findings if not found.refused]
    assert [found.where for found in asked if not found.proven] == []


def test_every_solver_that_proves_something_is_asked() -> None:
    greedy = {"magnitude", "wanda", "ria"}
    asked = {type(claimant.solver).__name__ for claimant in scales.CLAIMANTS.values()}
    assert {type(SOLVERS[name]()).__name__ for name in SOLVERS if name not in greedy} <= asked
    assert {f"frank-wolfe {name}" for name in DIRECTIONS} <= set(scales.CLAIMANTS)
    assert {name for claimant in scales.CLAIMANTS.values() for name in claimant.sets} == set(ALL_SETS)
