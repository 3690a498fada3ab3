"""Checks of arguments (settings, tensors, numbers), in one place so that all messages have the same form."""

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
    "FLOATS",
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
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights."""
SEEDS = (-(2**63), 2**64 - 1)
"""The range of seeds that torch's generators accept."""

_LARGEST = 2**53  # integers up to here are exact in float64


def shown(value: object, width: int = 60) -> str:
    """Return a value as text for a message: its repr, shortened where it is long.

    Parameters
    ----------
    value : object
    width : int
        Maximal length.

    Examples
    --------
    >>> shown(torch.zeros(2, 3))
    'a torch.float32 tensor of shape (2, 3)'
    >>> shown("a" * 30, width=10)
    "'aaaaaa..."
    """
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
    """The values that a setting may have.

    Attributes
    ----------
    kinds : tuple of type
        Allowed types; numbers must also lie between `low` and `high`.
    words : str
        The rule in messages; "{}" stands for the setting's name.
    low, high : float
        The range of numbers.
    open_low, open_high : bool
        Whether the end is excluded from the range.
    optional : bool
        Whether None is allowed.
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
    """Return the rule of an integer; True and False are none.

    Parameters
    ----------
    low, high : int
        The range, ends included.
    optional : bool
        Whether None is allowed.
    """
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
    """Return the rule of a real number.

    Parameters
    ----------
    low, high : float
        The range.
    above, below : bool
        Whether `low`, or `high`, is excluded.
    infinite : bool
        Whether infinity is allowed.
    optional : bool
        Whether None is allowed.

    Examples
    --------
    >>> rule = real(0, 1, above=True)
    >>> rule.words.format("ratio"), rule.fits(0.0), rule.fits(1)
    ('ratio in (0, 1]', False, True)
    """
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
    """Return the rule of one of some words.

    Parameters
    ----------
    options : iterable of str
        The words.
    also : tuple of type
        Types whose objects are allowed too.
    optional : bool
        Whether None is allowed.
    """
    known = tuple(options)
    return _Choice((str, *also), f"{{}} to be one of {', '.join(known)}", optional=optional, options=known)


@dataclass(frozen=True)
class _Choice(Rule):
    options: tuple[str, ...] = ()

    def fits(self, value: object) -> bool:
        return value in self.options if isinstance(value, str) else super().fits(value)


def instance_of(*kinds: type, example: str, optional: bool = False) -> Rule:
    """Return the rule of an object of some class.

    Parameters
    ----------
    *kinds : type
        Allowed classes.
    example : str
        How to make such an object, for messages.
    optional : bool
        Whether None is allowed.
    """
    return Rule(kinds, f"{{}} to be an object such as {example}", optional=optional)


@dataclass(frozen=True)
class _Numbers(Rule):
    count: int = 0

    def fits(self, value: object) -> bool:
        rule = Rule(self.kinds, "", self.low, self.high, self.open_low, self.open_high)
        return isinstance(value, Sequence) and len(value) == self.count and all(map(rule.fits, value))


def reals(count: int, each: Rule) -> Rule:
    """Return the rule of a sequence of numbers.

    Parameters
    ----------
    count : int
        Length of the sequence.
    each : Rule
        Of every number.
    """
    words = f"{{}} to be {count} numbers, each {each.words.format('x')}"
    return _Numbers(each.kinds, words, each.low, each.high, each.open_low, each.open_high, count=count)


def check_settings(owner: object, **rules: Rule) -> None:
    """Check the attributes of an object; called in the constructors of solvers, rules and sets.

    Parameters
    ----------
    owner : object
    **rules : Rule
        One for each attribute to check, by its name.

    Raises
    ------
    MaskoptError
        If an attribute does not follow its rule; the message has its name, the rule and its value.
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
    """Check that an argument is a dense floating-point tensor; return it detached from the autograd graph.

    Parameters
    ----------
    name : str
        Of the argument, for messages.
    value : object

    Returns
    -------
    Tensor

    Raises
    ------
    MaskoptError
        If it is not a tensor, or sparse, or not floating point of 16, 32 or 64 bits, or on the meta device.
    """
    if not isinstance(value, Tensor):
        raise MaskoptError(f"The {name} must be a torch tensor; got {_kind(value)}.")
    if value.layout != torch.strided or value.is_nested:
        raise MaskoptError(f"The {name} must be a dense tensor; got a {value.layout} one, so call to_dense() first.")
    if value.dtype not in FLOATS:
        small = value.dtype.itemsize == 1 and value.dtype != torch.bool
        hint = " (its scales lie elsewhere, so widen it first)" if small else ""
        raise MaskoptError(f"The {name} must be floating point, of 16, 32 or 64 bits; got {value.dtype}{hint}.")
    if value.device.type == "meta":
        raise MaskoptError(f"The {name} lies on the meta device, where tensors have no data; load it first.")
    return value.detach()


def sides(what: str, tile: Any) -> None:
    """Check the rows and columns of a tile.

    Parameters
    ----------
    what : str
        Subject of the message, such as "A tile".
    tile : object
        Should be a pair of positive integers or None, which stands for all rows or columns.

    Raises
    ------
    MaskoptError
        If it is not.
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
    """Call a class or function with settings given by name.

    Parameters
    ----------
    factory : callable
    subject : str
        Subject of the message, such as "The solver wanda".
    settings : mapping of str to object

    Raises
    ------
    MaskoptError
        If the factory has no such parameter. Errors raised by the factory are passed on.
    """
    known = list(inspect.signature(factory).parameters)
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise MaskoptError(f"{subject} has no setting {unknown!r}; it has {', '.join(known) or 'none'}.")
    return factory(**settings)
