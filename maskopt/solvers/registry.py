"""Solvers by the names people type."""

from collections.abc import Callable
from functools import partial

from maskopt.checks import constructed
from maskopt.errors import MaskoptError
from maskopt.solvers.base import Solver
from maskopt.solvers.branch_and_bound import BranchAndBound
from maskopt.solvers.brute_force import BruteForce
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.frank_wolfe import DIRECTIONS, FrankWolfe
from maskopt.solvers.one_swap import OneSwap
from maskopt.solvers.scip import Scip
from maskopt.solvers.scores import RIA, Magnitude, Wanda
from maskopt.solvers.sparsefw import SparseFW

__all__ = ["SOLVERS", "make_solver"]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsefw": SparseFW,
    "one-swap": OneSwap,
    "branch-and-bound": BranchAndBound,
    "continuation": ContinuationFrankWolfe,
    "frank-wolfe": FrankWolfe,
    **{name: partial(FrankWolfe, direction=name) for name in DIRECTIONS if name != "vanilla"},
    "brute-force": BruteForce,
    "scip": Scip,
}


def make_solver(name: str, **settings: object) -> Solver:
    """Return the solver of that name with its defaults changed by `settings`.

    Parameters
    ----------
    name : str
        One of `SOLVERS`.
    **settings
        Fields of the solver's class.

    Raises
    ------
    MaskoptError
        If there is no such solver or it has no such setting.
    """
    if name not in SOLVERS:
        raise MaskoptError(f"There is no solver {name!r}; choose one of {', '.join(SOLVERS)}.")
    return constructed(SOLVERS[name], f"The solver {name}", settings)
