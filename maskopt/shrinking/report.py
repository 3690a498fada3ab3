"""What shrinking a model did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from maskopt.allocation import Plan
from maskopt.models.report import PruneReport
from maskopt.shrinking.cut import Cut
from maskopt.shrinking.depth import DepthReport
from maskopt.shrinking.experts import ExpertsReport
from maskopt.shrinking.proofs import UnitProof
from maskopt.shrinking.speed import Speed
from maskopt.shrinking.units import Kind, Refused

__all__ = ["ShrinkReport", "Width"]


@dataclass(frozen=True)
class Width:
    """What became of the units of a layer.

    Attributes
    ----------
    name : str
        Of the layer that reads the units' outputs, such as ``model.layers.0.mlp.down_proj``.
    kind : {"neurons", "heads"}
    before, after : int
        Units; heads that have keys and values in common count as one. Of each expert, where there are several.
    parameters : int
        Removed with the units.
    error : float
        Of the layer's output on its inputs, relative to that of removing everything, as in `LayerRecord`; the mean
        over experts. Before blocks are fitted.
    proof : UnitProof or None
        With `certify`, what is proven about every choice of as many units.
    """

    name: str
    kind: Kind
    before: int
    after: int
    parameters: int
    error: float
    proof: UnitProof | None = None


@dataclass
class ShrinkReport:
    """The result of `maskopt.shrink`.

    Attributes
    ----------
    widths : list of Width
        Of every layer that lost units.
    refused : list of Refused
        What could not lose units, and why.
    parameters : (int, int)
        Of the whole model before and after; shared ones count once.
    cache_bytes : (float, float) or None
        Keys and values of a token before and after, in bytes; None where the model keeps none.
    cut : Cut
        What the configuration says now.
    pruning : PruneReport
        Errors of all layers that were solved, times, and settings.
    kept : dict of str to Tensor
        The units that stay, boolean, by name of the layer; shape (units,) or (experts, units).
    plan : Plan or None
        Where blocks have different widths: the fraction of its units that each layer lost.
    speeds : dict of str to dict of str to Speed
        By batch and then "before" and "after", where it was measured.
    biases : dict of str to list of str, optional
        With a method that changes biases (FLAP): by name the layers whose bias "changed", and those "without" one.
    depth : DepthReport, optional
        Where whole blocks were dropped before: `parameters` and `cache_bytes` count those too.
    experts : ExpertsReport, optional
        Where whole experts were dropped before: likewise.
    seconds : float
    """

    widths: list[Width]
    refused: list[Refused]
    parameters: tuple[int, int]
    cache_bytes: tuple[float, float] | None
    cut: Cut
    pruning: PruneReport
    kept: Mapping[str, Tensor] = field(repr=False)
    plan: Plan | None = None
    speeds: dict[str, dict[str, Speed]] = field(default_factory=dict)
    biases: dict[str, list[str]] | None = None
    depth: DepthReport | None = None
    experts: ExpertsReport | None = None
    seconds: float = 0.0

    @classmethod
    def of_steps(
        cls,
        depth: DepthReport | None,
        experts: ExpertsReport | None,
        caches: tuple[float, float] | None,
        rest: ShrinkReport | None,
    ) -> ShrinkReport:
        """Return the report of dropping blocks, then experts, and then removing units, where that was done.

        Parameters
        ----------
        depth : DepthReport or None
        experts : ExpertsReport or None
        caches : (float, float) or None
            See `cache_bytes`.
        rest : ShrinkReport or None
            Of what came after.
        """
        steps = [each for each in (depth, experts, rest) if each is not None]
        if rest is None:
            cut = Cut() if experts is None else experts.cut
            rest = cls([], [], (0, 0), caches, cut, PruneReport(), {})
        return replace(
            rest,
            parameters=(steps[0].parameters[0], steps[-1].parameters[1]),
            cache_bytes=caches,
            depth=depth,
            experts=experts,
            seconds=sum(each.seconds for each in steps),
        )

    @property
    def loads_with(self) -> str:
        """What can load a folder in which the model is saved."""
        if not self.cut.uniform:
            return "transformers, after import maskopt or with trust_remote_code"
        if self.cut.becomes is None:
            return "transformers"
        return f"transformers, as {self.cut.becomes}, whose configuration allows these widths"

    def to_json(self) -> dict[str, Any]:
        """Return everything but the units as a dictionary that `json.dump` takes."""
        before, after = self.parameters
        return {
            "parameters": {"before": before, "after": after},
            "cache_bytes_per_token": None
            if self.cache_bytes is None
            else dict(zip(("before", "after"), self.cache_bytes, strict=True)),
            "loads_with": self.loads_with,
            "widths": [_as_json(each) for each in self.widths],
            "refused": [asdict(each) for each in self.refused],
            "configuration": self.cut.entries,
            "speed": {
                batch: {when: asdict(speed) for when, speed in found.items()} for batch, found in self.speeds.items()
            },
            "pruning": self.pruning.to_json() if self.pruning.layers else None,
            **({} if self.plan is None else {"plan": self.plan.to_json()}),
            **({} if self.biases is None else {"biases": self.biases}),
            **({} if self.depth is None else {"depth": self.depth.to_json()}),
            **({} if self.experts is None else {"experts": self.experts.to_json()}),
            "seconds": self.seconds,
        }


def _as_json(width: Width) -> dict[str, Any]:
    content = asdict(width)
    if width.proof is None:
        del content["proof"]
    else:
        content["proof"]["share"] = width.proof.share
    return content
