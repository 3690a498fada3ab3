"""How: algorithms that choose masks, one per file, with one shared loop and one Result."""

from maskopt.solvers.base import GapKind, Result, Solver, State, Status, Stop, solve
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.one_swap import OneSwap
from maskopt.solvers.registry import SOLVERS, make_solver
from maskopt.solvers.scores import RIA, Magnitude, Wanda
from maskopt.solvers.sparsefw import SparseFW

__all__ = [
    "RIA",
    "SOLVERS",
    "ContinuationFrankWolfe",
    "GapKind",
    "Magnitude",
    "OneSwap",
    "Result",
    "Solver",
    "SparseFW",
    "State",
    "Status",
    "Stop",
    "Wanda",
    "make_solver",
    "solve",
]
