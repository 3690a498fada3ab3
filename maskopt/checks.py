"""Checks of what callers hand in: settings, tensors, numbers. One place, so that all say the same in the same words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskopt.errors import MaskoptError

__all__ = [
    "SEEDS",
    "Rule",
    "check_settings",
    "check_time_limit",
    "choice",
    "constructed",
    "instance_of",
    "matrix",
    "real",
    "reals",
    "shown",
    "sides",
    "truth",
    "whole",
]

_Made = TypeVar("_Made")
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEEDS = (-(2**63), 2**64 - 1)
"""What torch's generators take."""

_LARGEST = 2**53  # whole numbers up to here are exact wherever they go


def shown(value: object, width: int = 60) -> str:
    """Return a value for a message: its repr, shortened where it is long, or its type where that has several lines."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType):
        return f"the function {value.__name__}"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Integral) and not -(10**width) < int(value) < 10**width:
        return f"a whole number of {int(value).bit_length()} bits"
    text = repr(value)
    if "\n" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes
    ----------
    kinds : tuple of type
        Types whose values are fine, within `low` and `high` if they are numbers.
    low, high : float
        The range of numbers.
    open_low, open_high : bool
        Whether an end does not belong to it.
    optional : bool
        Whether None is fine.
    words : str
        What messages say; "{}" stands for the setting's name.
    """

    kinds: tuple[type, ...]
    words: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    optional: bool = False

    def fits(self, value: object) -> bool:
        """Whether a setting may have this value."""
        if value is None:
            return self.optional
        if not isinstance(value, self.kinds) or (isinstance(value, bool) and bool not in self.kinds):
            return False
        return bool in self.kinds or not isinstance(value, Real) or self._within(value)

    def _within(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return bool(above and (value < self.high if self.open_high else value <= self.high))


def whole(low: int, high: int = _LARGEST, *, optional: bool = False) -> Rule:
    """Return the rule of a whole number; no flag is one."""
    words = f"{{}} >= {low}, a whole number" if high == _LARGEST else f"a whole number {{}} from {low} to {high}"
    return Rule((Integral,), words + (" or None" if optional else ""), low, high, optional=optional)


def real(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    infinite: bool = False,
    optional: bool = False,
) -> Rule:
    """Return the rule of a number, finite unless `infinite`; `above` and `below` leave the ends out."""
    if high < math.inf:
        words = f"{{}} in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    elif low == -math.inf:
        words = "a finite {}"
    else:
        words = f"{'' if infinite else 'a finite '}{{}} {'>' if above else '>='} {low:g}"
    below = below or (high == math.inf and not infinite)
    return Rule(
        (Real,), words + (" or None" if optional else ""), low, high, above or low == -math.inf, below, optional
    )


def truth() -> Rule:
    """Return the rule of a flag."""
    return Rule((bool,), "{} True or False")


def choice(options: Iterable[str], *, also: tuple[type, ...] = (), optional: bool = False) -> Rule:
    """Return the rule of one of some words, or an object of the types `also`, or None."""
    known = tuple(options)
    return _Choice((str, *also), f"{{}} to be one of {', '.join(known)}", optional=optional, options=known)


@dataclass(frozen=True)
class _Choice(Rule):
    options: tuple[str, ...] = ()

    def fits(self, value: object) -> bool:
        return value in self.options if isinstance(value, str) else super().fits(value)


def instance_of(*kinds: type, example: str, optional: bool = False) -> Rule:
    """Return the rule of an object of some class, of which messages give an example."""
    return Rule(kinds, f"{{}} to be an object such as {example}", optional=optional)


@dataclass(frozen=True)
class _Numbers(Rule):
    count: int = 0

    def fits(self, value: object) -> bool:
        rule = Rule(self.kinds, "", self.low, self.high, self.open_low, self.open_high)
        return isinstance(value, Sequence) and len(value) == self.count and all(map(rule.fits, value))


def reals(count: int, each: Rule) -> Rule:
    """Return the rule of so many numbers, each of which follows a rule."""
    words = f"{{}} to be {count} numbers, each {each.words.format('x')}"
    return _Numbers(each.kinds, words, each.low, each.high, each.open_low, each.open_high, count=count)


def check_settings(owner: object, **rules: Rule) -> None:
    """Check the attributes of an object by their rules; meant for the constructors of solvers, rules and sets.

    Raises
    ------
    MaskoptError
        If one does not fit: which, what would, and what it is.
    """
    for name, rule in rules.items():
        value = getattr(owner, name)
        if not rule.fits(value):
            raise MaskoptError(f"{type(owner).__name__} needs {rule.words.format(name)}; got {shown(value)}.")


def check_time_limit(seconds: object, name: str = "time limit") -> None:
    """Check a time limit.

    Parameters
    ----------
    seconds : float or None
        None: there is no limit.
    name : str
        What messages call it.

    Raises
    ------
    MaskoptError
        If it is no positive number.
    """
    if not real(0, above=True, infinite=True, optional=True).fits(seconds):
        raise MaskoptError(f"The {name} must be a positive number of seconds; got {shown(seconds)}.")


def matrix(name: str, value: Any) -> Tensor:
    """Return floating-point data as handed in, without its history of gradients.

    Raises
    ------
    MaskoptError
        If it is no tensor of ordinary floating-point numbers that are really there.
    """
    if not isinstance(value, Tensor):
        raise MaskoptError(f"The {name} must be a torch tensor; got {_kind(value)}.")
    if value.layout != torch.strided or value.is_nested:
        raise MaskoptError(f"The {name} must be a dense tensor; got a {value.layout} one, so call to_dense() first.")
    if value.dtype not in _TYPES:
        hint = " (its scales lie elsewhere, so widen it first)" if value.dtype.itemsize == 1 else ""
        raise MaskoptError(f"The {name} must be floating point, of 16, 32 or 64 bits; got {value.dtype}{hint}.")
    if value.device.type == "meta":
        raise MaskoptError(f"The {name} lies on the meta device, where tensors have no data; load it first.")
    return value.detach()


def sides(what: str, tile: Any) -> None:
    """Check the rows and columns of a tile, None standing for all of them.

    Raises
    ------
    MaskoptError
        If they are no pair of positive whole numbers or None.
    """
    rule = whole(1, optional=True)
    if not isinstance(tile, Sequence) or isinstance(tile, str) or len(tile) != 2 or not all(map(rule.fits, tile)):
        raise MaskoptError(f"{what} needs at least one row and one column, or None for all; got {shown(tile)}.")


def _kind(value: object) -> str:
    kind = type(value).__name__
    if type(value).__module__.partition(".")[0] == "numpy":
        return f"a numpy {kind}, which torch.from_numpy turns into one"
    return f"{shown(value)} ({kind})"


def constructed(factory: Callable[..., _Made], subject: str, settings: Mapping[str, object]) -> _Made:
    """Return what a class or function makes of settings by name.

    Parameters
    ----------
    factory : callable
    subject : str
        What messages call it, such as "The solver wanda".
    settings : mapping of str to object

    Raises
    ------
    MaskoptError
        If there is no such setting. Errors inside the factory are left as they are.
    """
    known = list(inspect.signature(factory).parameters)
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise MaskoptError(f"{subject} has no setting {unknown!r}; it has {', '.join(known) or 'none'}.")
    return factory(**settings)
