"""A plan: how sparse each layer of a model shall be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from maskopt.checks import real, shown
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, reason
from maskopt.oracles import Counts, MaskSet

__all__ = ["Plan", "load_plan", "overridden"]

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The sparsity of each layer.

    Parameters
    ----------
    pattern : str or mapping of str to str
        As for `maskopt.oracles.parse_masks`; of "n:m", n follows from a layer's sparsity. One for all layers, or one
        for each by full name.
    sparsities : mapping of str to float
        Fraction of the weights to prune, in [0, 1], by full layer name.
    rule : str
        Where it comes from.
    details : mapping
        What was measured, for people and for reports; anything that `json.dump` takes.

    Raises
    ------
    MaskoptError
        If there is no layer, a sparsity is no number in [0, 1], or the details are no mapping.

    Examples
    --------
    >>> plan = Plan("per-row", {"up": 0.5, "down": 0.75})
    >>> plan.masks({"up": (8, 4), "down": (4, 8)})
    {'up': PerRow(keep=2), 'down': PerRow(keep=2)}
    >>> plan.sparsity({"up": (8, 4), "down": (4, 8)})
    0.625
    """

    pattern: str | Mapping[str, str]
    sparsities: Mapping[str, float]
    rule: str = "by hand"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        patterns = self.pattern.values() if isinstance(self.pattern, Mapping) else (self.pattern,)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise MaskoptError(f"A plan's pattern is a word such as per-row or 2:4; got {shown(self.pattern)}.")
        if not isinstance(self.sparsities, Mapping) or not self.sparsities:
            raise MaskoptError(f"A plan needs a sparsity for each layer, by name; got {shown(self.sparsities)}.")
        for name, sparsity in self.sparsities.items():
            if not isinstance(name, str) or not real(0, 1).fits(sparsity):
                raise MaskoptError(f"The sparsity of {name} must lie between 0 and 1; got {shown(sparsity)}.")
        if not isinstance(self.details, Mapping):
            raise MaskoptError(f"The details of a plan must be a dict; got {shown(self.details)}.")
        # numpy's numbers and fractions are no JSON.
        object.__setattr__(self, "sparsities", {name: float(value) for name, value in self.sparsities.items()})

    @property
    def patterns(self) -> str:
        """Its patterns in words."""
        return ", ".join(dict.fromkeys([self.pattern] if isinstance(self.pattern, str) else self.pattern.values()))

    def counts(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Counts]:
        """Return the counts that each of these layers can have.

        Raises
        ------
        MaskoptError
            If a layer has no sparsity, a sparsity no layer, or the pattern does not fit a layer.
        """
        missing = [name for name in shapes if name not in self.sparsities]
        if missing:
            raise MaskoptError(f"The plan has no sparsity for {len(missing)} layers to prune, such as {missing[0]}.")
        unknown = [name for name in self.sparsities if name not in shapes]
        if unknown:
            raise MaskoptError(f"The plan names {len(unknown)} layers that are not to be pruned, such as {unknown[0]}.")
        return {name: fitting(pattern_of(self.pattern, name), name, shape) for name, shape in shapes.items()}

    def masks(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, MaskSet]:
        """Return the set of masks of each layer; layers with equal counts share one object.

        Parameters
        ----------
        shapes : mapping of str to (int, int)
            Rows and inputs of the layers to prune, by full name.

        Returns
        -------
        dict of str to MaskSet

        Raises
        ------
        MaskoptError
            As for `counts`.
        """
        made: dict[str, MaskSet] = {}
        found: dict[str, MaskSet] = {}
        for name, counts in self.counts(shapes).items():
            masks = counts.masks(counts.of(self.sparsities[name]))
            found[name] = made.setdefault(repr(masks), masks)
        return found

    def kept(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Return the number of weights that all layers keep together."""
        return sum(counts.step * counts.of(self.sparsities[name]) for name, counts in self.counts(shapes).items())

    def sparsity(self, shapes: Mapping[str, tuple[int, int]]) -> float:
        """Return the fraction of all weights that is pruned."""
        return 1 - self.kept(shapes) / sum(rows * columns for rows, columns in shapes.values())

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that `json.dump` takes and `load_plan` reads."""
        return {
            "maskopt_plan": _VERSION,
            "rule": self.rule,
            "pattern": self.pattern if isinstance(self.pattern, str) else dict(self.pattern),
            "sparsities": dict(self.sparsities),
            "details": dict(self.details),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, which people may edit and `load_plan` reads.

        Raises
        ------
        MaskoptError
            If `path` exists or cannot be written.
        """
        with atomic_path(path) as aside:
            aside.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that `Plan.save` or a person wrote.

    Parameters
    ----------
    path : path-like
        A JSON file with at least ``pattern`` and ``sparsities``, or the report.json of a pruned model.

    Raises
    ------
    MaskoptError
        If there is no such file or it holds no plan.

    Examples
    --------
    A file that a person could write::

        {"pattern": "per-row", "sparsities": {"model.layers.0.mlp.up_proj": 0.5, "model.layers.0.mlp.down_proj": 0.7}}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MaskoptError(f"The plan {os.fspath(path)} cannot be read: {reason(error)}.") from error
    if isinstance(content, dict) and isinstance(content.get("plan"), dict):
        content = content["plan"]
    if isinstance(content, dict) and "command" in content and "sparsities" not in content:
        raise MaskoptError(
            f"The report {os.fspath(path)} has no plan, because its run treated all layers alike; repeat that run's "
            f"options."
        )
    if not isinstance(content, dict) or not {"pattern", "sparsities"} <= content.keys():
        raise MaskoptError(f"The plan {os.fspath(path)} must have the entries pattern and sparsities.")
    if content.get("maskopt_plan", _VERSION) != _VERSION:
        raise MaskoptError(
            f"The plan {os.fspath(path)} is of another version than {_VERSION}, which this program reads."
        )
    try:
        return Plan(
            content["pattern"], content["sparsities"], str(content.get("rule", "by hand")), content.get("details", {})
        )
    except MaskoptError as error:
        raise MaskoptError(f"The plan {os.fspath(path)} is wrong: {error}") from error


def pattern_of(pattern: str | Mapping[str, str], name: str) -> str:
    """Return the pattern of a layer.

    Raises
    ------
    MaskoptError
        If there is none.
    """
    if isinstance(pattern, str):
        return pattern
    if name not in pattern:
        raise MaskoptError(f"There is no pattern for the layer {name}.")
    return pattern[name]


def fitting(pattern: str, name: str, shape: tuple[int, int], cost: int = 0) -> Counts:
    """Return the counts of a pattern in a layer, or say that they do not fit it."""
    try:
        return Counts(pattern, shape, cost)
    except MaskoptError as error:
        raise MaskoptError(f"The masks do not fit the layer {name}: {error}") from error


def overridden(names: Sequence[str], overrides: Mapping[str, float]) -> dict[str, float]:
    """Return the sparsities that patterns of names fix; the last pattern that matches a layer decides.

    Parameters
    ----------
    names : sequence of str
        Layers to prune.
    overrides : mapping of str to float
        Sparsity by pattern of `fnmatch` on full layer names.

    Raises
    ------
    MaskoptError
        If a sparsity is no number in [0, 1] or a pattern matches no layer.
    """
    fixed: dict[str, float] = {}
    for pattern, sparsity in overrides.items():
        if not real(0, 1).fits(sparsity):
            raise MaskoptError(f"The sparsity of {pattern!r} must lie between 0 and 1; got {shown(sparsity)}.")
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            like = f"; names look like {names[0]!r}" if names else ""
            raise MaskoptError(f"The pattern {pattern!r} matches no layer to prune{like}.")
        fixed.update(dict.fromkeys(matched, float(sparsity)))
    return fixed
