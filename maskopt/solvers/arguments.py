"""What `solve` is handed, checked in one place before any work."""

from __future__ import annotations

from torch import Tensor

from maskopt.checks import check_time_limit, shown, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import Instance, Problem
from maskopt.solvers.base import Solver

__all__ = ["check_arguments", "check_masks", "check_memory", "check_solver"]


_LONG = 2**63 - 1


def check_arguments(
    problem: object,
    masks: object,
    solver: object,
    start: object,
    callback: object,
    time_limit: object,
    memory: object,
    record: object,
) -> None:
    """Refuse what `solve` cannot work with, each in one sentence that says what would be right.

    Raises
    ------
    MaskoptError
        If an argument is of another kind, or a number is out of range.
    """
    if isinstance(problem, Instance):
        raise MaskoptError("solve needs a problem; this is an instance, whose problem() is one.")
    if not isinstance(problem, Problem):
        raise MaskoptError(f"solve needs a problem such as LayerReconstruction(weight, gram); got {shown(problem)}.")
    check_masks(masks)
    check_solver(solver, optional=True)
    if not (start is None or isinstance(start, Tensor | Solver)):
        raise MaskoptError(f"The start must be a boolean mask (a torch tensor) or a solver; got {shown(start)}.")
    if callback is not None and not callable(callback):
        raise MaskoptError(f"The callback must be a function that takes a State; got {shown(callback)}.")
    check_time_limit(time_limit)
    check_memory(memory)
    if not (record == "doubling" if isinstance(record, str) else whole(0, _LONG, optional=True).fits(record)):
        raise MaskoptError(f'record must be a number of iterations >= 0 or "doubling"; got {shown(record)}.')


def check_masks(masks: object) -> None:
    """Raise MaskoptError if this is no set of masks."""
    if isinstance(masks, str):
        raise MaskoptError(f"A set of masks is an object such as PerRow(0.5); parse_masks makes one of {shown(masks)}.")
    if not isinstance(masks, MaskSet):
        raise MaskoptError(f"A set of masks is an object such as PerRow(0.5); got {shown(masks)}.")


def check_solver(solver: object, *, optional: bool = False) -> None:
    """Raise MaskoptError if this is no solver."""
    if isinstance(solver, str):
        raise MaskoptError(f"A solver is an object such as Wanda(); make_solver makes one of {shown(solver)}.")
    if isinstance(solver, type):
        raise MaskoptError(f"A solver is an object such as Wanda(), with brackets; got the class {solver.__name__}.")
    if not (isinstance(solver, Solver) or (optional and solver is None)):
        raise MaskoptError(f"A solver is an object such as Wanda(); got {shown(solver)}.")


def check_memory(memory: object) -> None:
    """Raise MaskoptError if this is no number of bytes."""
    if not whole(1, _LONG).fits(memory):
        raise MaskoptError(f"The memory must be a positive whole number of bytes; got {shown(memory)}.")
