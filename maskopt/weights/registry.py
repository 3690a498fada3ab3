"""Methods for the surviving weights, by name."""

from collections.abc import Callable

from maskopt.checks import constructed
from maskopt.errors import MaskoptError
from maskopt.solvers import ContinuationFrankWolfe, Solver
from maskopt.weights.admm import ADMM
from maskopt.weights.alps import ALPS
from maskopt.weights.base import Joint
from maskopt.weights.conditional import ConditionalADMM
from maskopt.weights.fista import FISTAPruner
from maskopt.weights.least_squares import LeastSquares
from maskopt.weights.sparsegpt import SparseGPT

__all__ = ["WEIGHTS", "make_weights"]

WEIGHTS: dict[str, Callable[..., Joint] | None] = {
    "keep": None,
    "lsq": LeastSquares,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
    "alps": ALPS,
    "fista": FISTAPruner,
    "best": ConditionalADMM,
}
"""Class of the solver by name; None where the weights are kept as they are."""


def make_weights(name: str, solver: Solver | None = None, **settings: object) -> Solver:
    """Return a solver by the name of its method for the surviving weights.

    Parameters
    ----------
    name : str
        A name in `WEIGHTS`. keep: `solver`, and weights stay as they are; lsq: `solver`, then least squares; the other
        methods choose the mask themselves.
    solver : Solver, optional
        Chooses the mask for keep and lsq; `ContinuationFrankWolfe()` by default.
    **settings
        Of the method.

    Returns
    -------
    Solver

    Raises
    ------
    MaskoptError
        If there is no such method or setting, or a solver is given to a method that chooses the mask itself.

    Examples
    --------
    >>> make_weights("alps", iterations=50).iterations
    50
    """
    if name not in WEIGHTS:
        raise MaskoptError(f"There is no method {name!r} for weights; choose one of {', '.join(WEIGHTS)}.")
    method = WEIGHTS[name]
    if method is None:
        if settings:
            raise MaskoptError(f"Weights that are kept have no setting {next(iter(settings))!r}.")
        return ContinuationFrankWolfe() if solver is None else solver
    if solver is not None:
        if name != "lsq":
            raise MaskoptError(f"The method {name} chooses the mask itself; leave the solver out, or refit with lsq.")
        settings["solver"] = solver
    return constructed(method, f"The method {name}", settings)
