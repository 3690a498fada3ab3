"""What a method needs of a problem and of a set, as data: declared on its class, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import Problem

__all__ = ["Requirements"]


@dataclass(frozen=True)
class Requirements:
    """Types that a problem and a set must have.

    A type is a class (`LayerReconstruction`, `Quadratic`, `PartitionMatroid`) or a protocol (`HasFaces`, `CanSwap`),
    which any class with its methods satisfies.

    Parameters
    ----------
    problem, masks : tuple of type
        All of which the problem, or the set, must be an instance of.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import Budget, HasFaces, PerRow
    >>> needs = Requirements(masks=(HasFaces,))
    >>> needs.check_set(PerRow(0.5), "InFace")
    >>> needs.check_set(Budget(torch.ones(2, 2), 2.0), "InFace")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    maskopt.errors.MaskoptError: Budget(...) is not compatible with InFace: it must implement ...
    """

    problem: tuple[type, ...] = ()
    masks: tuple[type, ...] = ()

    def joined(self, other: Requirements) -> Requirements:
        """Return what both need."""
        return Requirements(
            tuple(dict.fromkeys((*self.problem, *other.problem))), tuple(dict.fromkeys((*self.masks, *other.masks)))
        )

    def met(self, problem: Problem, masks: MaskSet) -> bool:
        """Whether problem and set have all types."""
        return all(isinstance(problem, kind) for kind in self.problem) and all(
            isinstance(masks, kind) for kind in self.masks
        )

    def check(self, problem: Problem, masks: MaskSet, name: str) -> None:
        """Raise MaskoptError, with what is missing, unless the method called `name` works on problem and set."""
        for kind in self.problem:
            _check(problem, type(problem).__name__, kind, name, "maskopt.problems")
        self.check_set(masks, name)

    def check_set(self, masks: MaskSet, name: str) -> None:
        """Raise MaskoptError, with what is missing, unless the method called `name` works on the set."""
        for kind in self.masks:
            _check(masks, str(masks), kind, name, "maskopt.oracles")


def _check(thing: object, label: str, kind: type, name: str, module: str) -> None:
    if isinstance(thing, kind):
        return
    refusal = f"{label} is not compatible with {name}: it must "
    if not getattr(kind, "_is_protocol", False):
        raise MaskoptError(f"{refusal}be a {kind.__name__}; it is a {type(thing).__name__}.")
    methods = [method for method in vars(kind) if not method.startswith("_")]
    missing = [method for method in methods if not hasattr(thing, method)]
    raise MaskoptError(
        f"{refusal}implement {', '.join(methods)}; missing: {', '.join(missing)} (see {module}.{kind.__name__})."
    )
