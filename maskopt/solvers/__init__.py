"""How: algorithms that choose masks, one per file, with one shared loop and one Result."""

from maskopt.solvers.active import Away, BlendedPairwise, FullyCorrective, Lazy, Pairwise
from maskopt.solvers.base import Solver
from maskopt.solvers.blocks import better_of, block_errors, random_per_block
from maskopt.solvers.branch_and_bound import BranchAndBound, NodeLog
from maskopt.solvers.brute_force import BruteForce
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.directions import BlockCoordinate, Boosted, Conjugate, Momentum, Stochastic, Vanilla
from maskopt.solvers.frank_wolfe import DIRECTIONS, STEPS, FrankWolfe
from maskopt.solvers.history import COLUMNS
from maskopt.solvers.inface import BlendedInFace, InFace
from maskopt.solvers.loop import LoopResult, frank_wolfe
from maskopt.solvers.monitor import Callback, Monitor, State, Stop
from maskopt.solvers.one_swap import OneSwap
from maskopt.solvers.outcome import GapKind, Outcome, Result, Status
from maskopt.solvers.registry import SOLVERS, make_solver
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import DirectionRule, IterationState, RowBlocks, SearchDirection, StepRule
from maskopt.solvers.scip import Scip
from maskopt.solvers.scores import RIA, Magnitude, Wanda
from maskopt.solvers.solve import check_compatible, solve, solve_parts, solve_sets
from maskopt.solvers.sparsefw import SparseFW
from maskopt.solvers.steps import (
    AdaptiveStep,
    ExactStep,
    LogStep,
    MonotoneStep,
    OpenLoopStep,
    SecantStep,
    ShortStep,
)
from maskopt.solvers.swaps import SwapState

__all__ = [
    "COLUMNS",
    "DIRECTIONS",
    "RIA",
    "SOLVERS",
    "STEPS",
    "AdaptiveStep",
    "Away",
    "BlendedInFace",
    "BlendedPairwise",
    "BlockCoordinate",
    "Boosted",
    "BranchAndBound",
    "BruteForce",
    "Callback",
    "Conjugate",
    "ContinuationFrankWolfe",
    "DirectionRule",
    "ExactStep",
    "FrankWolfe",
    "FullyCorrective",
    "GapKind",
    "InFace",
    "IterationState",
    "Lazy",
    "LogStep",
    "LoopResult",
    "Magnitude",
    "Momentum",
    "Monitor",
    "MonotoneStep",
    "NodeLog",
    "OneSwap",
    "OpenLoopStep",
    "Outcome",
    "Pairwise",
    "Requirements",
    "Result",
    "RowBlocks",
    "Scip",
    "SearchDirection",
    "SecantStep",
    "ShortStep",
    "Solver",
    "SparseFW",
    "State",
    "Status",
    "StepRule",
    "Stochastic",
    "Stop",
    "SwapState",
    "Vanilla",
    "Wanda",
    "better_of",
    "block_errors",
    "check_compatible",
    "frank_wolfe",
    "make_solver",
    "random_per_block",
    "solve",
    "solve_parts",
    "solve_sets",
]
