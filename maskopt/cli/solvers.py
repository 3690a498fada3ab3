"""Solvers from the words people type: `sparsefw`, `sparsefw:iterations=500;start=ria`."""

import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from maskopt.errors import MaskoptError
from maskopt.solvers import SOLVERS, Direction, Solver, Step, make_solver

__all__ = ["parse_solver", "parse_solvers"]

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_solvers(text: str) -> dict[str, Solver]:
    """Return the solvers of a comma-separated list, by what was typed for them.

    Raises
    ------
    MaskoptError
        If one is unknown, its settings are wrong, or it occurs twice.
    """
    specs = [spec.strip() for spec in text.split(",") if spec.strip()]
    if not specs:
        raise MaskoptError(f"At least one solver is needed; choose from {', '.join(SOLVERS)}.")
    for spec in specs:
        if specs.count(spec) > 1:
            raise MaskoptError(f"The solver {spec} is listed twice.")
    return {spec: parse_solver(spec) for spec in specs}


def parse_solver(spec: str, settings: Sequence[str] = ()) -> Solver:
    """Return a solver with some of its settings changed.

    Parameters
    ----------
    spec : str
        "name" or "name:key=value;key=value".
    settings : sequence of str
        More "key=value"; they win. Values are read as the setting's type says; where that is a solver, the value is
        such a spec.

    Raises
    ------
    MaskoptError
        If there is no such solver or setting, or a value is not of the setting's type.
    """
    name, _, rest = spec.partition(":")
    if name not in SOLVERS:
        return make_solver(name)  # raises the sentence that lists the names
    known = inspect.signature(SOLVERS[name], eval_str=True).parameters
    values: dict[str, Any] = {}
    for item in [*filter(None, rest.split(";")), *settings]:
        key, equals, text = (part.strip() for part in item.partition("="))
        key = key.replace("-", "_")
        if not equals:
            raise MaskoptError(f"A setting has the form key=value; got {item!r}.")
        if key not in known:
            raise MaskoptError(f"The solver {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
        try:
            values[key] = _read(text, known[key].annotation)
        except ValueError as error:
            if isinstance(error, MaskoptError):
                raise
            raise MaskoptError(f"The setting {key} of {name} takes {error}; got {text!r}.") from error
    return make_solver(name, **values)


def _read(text: str, kind: Any) -> Any:
    """Read a value of an annotated type; the ValueError of a misfit says what would fit."""
    kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    kinds = tuple(one for one in kinds if not _is_rule(one))
    for one in kinds:
        if one is NoneType and text.lower() == "none":
            return None
        if one is bool and text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        if one is str or (get_origin(one) is Literal and text in get_args(one)):
            return text
        if isinstance(one, type) and issubclass(one, Solver):
            return parse_solver(text)
        if one is int or one is float:
            try:
                return one(text)
            except ValueError:
                continue
    raise ValueError(" or ".join(_describe(one) for one in kinds))


def _is_rule(kind: Any) -> bool:
    """Whether values are objects that can only be made in Python."""
    return isinstance(kind, type) and issubclass(kind, (Direction, Step))


def _describe(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
    return words.get(kind) or " or ".join(map(str, get_args(kind))) or str(kind)
