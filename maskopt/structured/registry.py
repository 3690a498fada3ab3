"""Methods for whole units, by name."""

from collections.abc import Callable

from maskopt.checks import constructed
from maskopt.errors import MaskoptError
from maskopt.structured.base import Structured
from maskopt.structured.exact_swaps import ExactSwaps
from maskopt.structured.osscar import OSSCAR
from maskopt.structured.scores import FASP, FLAP, ColumnMagnitude, NewtonColumns, RandomColumns
from maskopt.structured.spap import SPAP

__all__ = ["STRUCTURED", "make_structured"]

STRUCTURED: dict[str, Callable[..., Structured]] = {
    "random": RandomColumns,
    "magnitude": ColumnMagnitude,
    "flap": FLAP,
    "fasp": FASP,
    "osscar": OSSCAR,
    "spap": SPAP,
    "newton": NewtonColumns,
    "best": ExactSwaps,
}
"""Class of the solver by name."""


def make_structured(name: str, **settings: object) -> Structured:
    """Return a solver for whole units by its name.

    Parameters
    ----------
    name : str
        A name in `STRUCTURED`.
    **settings
        Of the method.

    Returns
    -------
    Structured

    Raises
    ------
    MaskoptError
        If there is no such method or setting.

    Examples
    --------
    >>> make_structured("osscar", batch=2).batch
    2
    """
    if name not in STRUCTURED:
        raise MaskoptError(f"There is no method {name!r} for units; choose one of {', '.join(STRUCTURED)}.")
    return constructed(STRUCTURED[name], f"The method {name}", settings)
