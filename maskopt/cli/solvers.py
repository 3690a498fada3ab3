"""Solvers from texts such as `sparsefw` and `sparsefw:iterations=500;start=ria`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.solvers import Solver

__all__ = ["parse_comparison", "parse_solver", "parse_solvers", "parse_weights"]

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_solvers(text: str) -> dict[str, Solver]:
    """Return the solvers of a comma-separated list, by their texts.

    Raises
    ------
    MaskoptError
        If one is unknown, its settings are wrong, or it occurs twice.
    """
    from maskopt.solvers import SOLVERS

    return {spec: parse_solver(spec) for spec in _split(text, "solver", SOLVERS)}


def parse_comparison(solvers: str, weights: str) -> dict[str, Solver]:
    """Return solvers by their texts: every solver with each of keep and lsq that is listed, and the joint methods.

    Parameters
    ----------
    solvers, weights : str
        Comma-separated lists; `weights` has names in `WEIGHTS`, with settings as for solvers.

    Raises
    ------
    MaskoptError
        If one is unknown, its settings are wrong, or it occurs twice.
    """
    from maskopt.solvers import SOLVERS
    from maskopt.weights import WEIGHTS

    methods: dict[str, Solver] = {}
    for spec in _split(weights, "method for weights", WEIGHTS):
        name = spec.partition(":")[0]
        if name not in ("keep", "lsq"):
            methods[spec] = parse_weights(spec)
            continue
        for solver in _split(solvers, "solver", SOLVERS):
            methods[solver if name == "keep" else f"{solver} + {spec}"] = parse_weights(spec, solver)
    return methods


def _split(text: str, noun: str, known: Iterable[str]) -> list[str]:
    specs = [spec.strip() for spec in text.split(",")]
    if not any(specs):
        raise MaskoptError(f"At least one {noun} is needed; choose from {', '.join(known)}.")
    if not all(specs):
        raise MaskoptError(f"One {noun} has no name in {text!r}; choose from {', '.join(known)}.")
    for spec in specs:
        if specs.count(spec) > 1:
            raise MaskoptError(f"The {noun} {spec} is listed twice.")
    return specs


def _spec(spec: str) -> tuple[str, list[str]]:
    """Return the name and the settings of "name" or "name:key=value;key=value"."""
    name, colon, rest = spec.partition(":")
    return name, rest.split(";") if colon else []


def parse_weights(spec: str, solver: str | None = None, settings: Sequence[str] = ()) -> Solver:
    """Return the solver of a method for the surviving weights.

    Parameters
    ----------
    spec : str
        "name" or "name:key=value;key=value", a name in `WEIGHTS`.
    solver : str, optional
        Text of the solver that chooses the mask, for keep and lsq.
    settings : sequence of str
        More "key=value": of the solver where the method is keep or lsq, else of the method.

    Raises
    ------
    MaskoptError
        If there is no such method, solver or setting, or the method chooses the mask itself and a solver is given.
    """
    from maskopt.weights import WEIGHTS, make_weights

    name, own = _spec(spec)
    chooses = name in ("keep", "lsq")
    first = None
    if solver is not None or (chooses and settings):
        first = parse_solver("continuation" if solver is None else solver, settings if chooses else ())
    method = WEIGHTS.get(name)
    if method is None or (first is not None and not chooses):
        return make_weights(name, first, **dict.fromkeys(own))  # or raises the error that fits
    values = _settings(f"method {name}", method, own if chooses else [*own, *settings])
    return make_weights(name, first, **values)


def parse_solver(spec: str, settings: Sequence[str] = ()) -> Solver:
    """Return a solver with some of its settings changed.

    Parameters
    ----------
    spec : str
        "name" or "name:key=value;key=value".
    settings : sequence of str
        More "key=value", which override those of `spec`. Values are read by the setting's type; where that is a solver,
        the value is such a text.

    Raises
    ------
    MaskoptError
        If there is no such solver or setting, or a value is not of the setting's type.
    """
    from maskopt.solvers import SOLVERS, make_solver

    name, own = _spec(spec)
    if name not in SOLVERS:
        return make_solver(name)  # raises an error that lists the names
    return make_solver(name, **_settings(f"solver {name}", SOLVERS[name], [*own, *settings]))


def _settings(what: str, make: Callable[..., Solver], items: Sequence[str]) -> dict[str, Any]:
    """Read "key=value" items by the types of a factory's parameters."""
    known = dict(inspect.signature(make, eval_str=True).parameters)
    known.pop("solver", None)  # has its own option
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        key = key.replace("-", "_")
        if not equals:
            raise MaskoptError(f"A setting has the form key=value; got {item!r}.")
        if key not in known:
            raise MaskoptError(f"The {what} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
        try:
            values[key] = _read(text, known[key].annotation)
        except ValueError as error:
            if isinstance(error, MaskoptError):
                raise
            raise MaskoptError(f"The setting {key} of {what.split()[-1]} takes {error}; got {text!r}.") from error
    return values


def _read(text: str, kind: Any) -> Any:
    """Read a value of an annotated type; a ValueError says what would be valid."""
    from maskopt.solvers import Solver

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
        if one is int and re.fullmatch(r"[+-]?[0-9]{1,30}", text):
            return int(text)
        if one is float:
            with suppress(ValueError):
                return float(text)
        if get_origin(one) is tuple and text.count("/") == len(get_args(one)) - 1:
            return tuple(_read(part, each) for part, each in zip(text.split("/"), get_args(one), strict=True))
    raise ValueError(" or ".join(_describe(one) for one in kinds))


def _is_rule(kind: Any) -> bool:
    """Whether values are direction or step rules, which have no text form."""
    from maskopt.solvers import DirectionRule, StepRule

    return isinstance(kind, type) and issubclass(kind, (DirectionRule, StepRule))


def _describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers with / between them"
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
    return words.get(kind) or " or ".join(map(str, get_args(kind))) or str(kind)
