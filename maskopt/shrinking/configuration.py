"""What a model's configuration has to say so that its class makes narrower blocks.

No architecture is known by name: values of the configuration that could mean the number of units are changed one
after the other, and the class tells, on the meta device, which parameters become narrower. What fits is then run: the
narrower block must compute what the block computes without the units.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maskopt.models.blocks import Block, find_blocks
from maskopt.models.quiet import without_bars
from maskopt.packed.shrunk import WIDTHS, listed_widths, take_buffers
from maskopt.shrinking.dependence import Probe, agree, skeleton_copy

if TYPE_CHECKING:
    from maskopt.shrinking.units import Role

__all__ = ["Fields", "Skeletons", "block_of", "fields_for", "fields_together", "works_narrower"]

_SUBSETS = 4  # fields that count heads, of which all subsets are tried


@dataclass(frozen=True)
class Fields:
    """Entries of a (text) configuration.

    Attributes
    ----------
    scaled : mapping of str to Fraction
        Those in proportion to the number of units: the value for each unit.
    fixed : mapping of str to int
        Those that have to be written out.
    """

    scaled: Mapping[str, Fraction] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)

    def entries(self, units: int) -> dict[str, int]:
        """Return the entries for a number of units."""
        return {**{name: int(each * units) for name, each in self.scaled.items()}, **self.fixed}

    def units(self, name: str, value: int) -> int:
        """Return the number of units that an entry stands for."""
        return int(value / self.scaled[name])


class Skeletons:
    """Models without data, of the class of a model and changed configurations.

    Parameters
    ----------
    model : PreTrainedModel
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self._kind = type(model)
        self._reads_on: bool | None = None  # of the unchanged configuration; filled on demand
        self.own, self.own_shapes = listed_widths(model)
        """Entries by block and shapes by parameter of a model whose blocks have different widths already."""

    @property
    def text(self) -> Any:
        """The configuration of the part that reads text."""
        return self.config.get_text_config()

    def values(self, block: str) -> dict[str, Any]:
        """Return all entries that hold for a block."""
        return {**self.text.to_dict(), **self.own.get(block, {})}

    def value(self, block: str, name: str) -> Any:
        """Return the entry that holds for a block, by the name that all architectures have for it, or None."""
        own = getattr(self.text, "attribute_map", {}).get(name, name)
        return self.own.get(block, {}).get(own, getattr(self.text, name, None))

    def make(self, entries: Mapping[str, Any]) -> nn.Module | None:
        """Return a model without data of the configuration with other entries; None where the class refuses."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        try:
            for name, value in entries.items():
                setattr(text, name, value)
            if self.own:
                widths = {name: {**own, **entries} for name, own in self.own.items()}
                setattr(config, WIDTHS, {"entries": widths, "shapes": dict(self.own_shapes)})
            with torch.device("meta"), without_bars():
                made: nn.Module = self._kind(config).eval()
                return made
        except Exception:  # whatever a class thinks of values it was never meant for
            return None

    def reads_on(self, model: nn.Module) -> bool:
        """Whether a model without data goes on from what it keeps of tokens that it has read.

        True where it cannot be told: where not even a model of the unchanged configuration does so without data.
        """
        if self._reads_on is None:
            whole = self.make({})
            self._reads_on = whole is not None and _reads_on(whole)
        return not self._reads_on or _reads_on(model)

    @property
    def unsaid(self) -> str:
        """How a reason begins why units of a kind cannot be removed."""
        return f"the configuration of {self._kind.__name__} cannot say that a block has"


def fields_for(skeletons: Skeletons, probe: Probe, block: Block, role: Role) -> Fields | None:
    """Return what the configuration has to say about the units of a role; None where there is nothing.

    Parameters
    ----------
    skeletons : Skeletons
    probe : Probe
        Of the block.
    block : Block
        One that has the role.
    role : Role
        Its fields are not known yet.
    """
    if role.number < 2:
        return None
    trial, buffers = _Trial(probe, {role: 1}), dict(block.module.named_buffers())
    for fields in _guesses(skeletons.values(block.name), role):
        model = skeletons.make(fields.entries(role.number - 1))
        twin = None if model is None else block_of(model, block.name)
        if model is None or twin is None or not trial.fits(twin) or take_buffers(twin, buffers) is not None:
            continue
        if trial.succeeds(twin) and skeletons.reads_on(model):
            return fields
    return None


def fields_together(skeletons: Skeletons, probe: Probe, block: Block, roles: Sequence[Role]) -> list[Fields | None]:
    """Return what the configuration has to say about roles that one of its entries widens together.

    Such are the experts of a block and those that see all tokens, which may be twice as wide.

    Parameters
    ----------
    skeletons, probe, block
        As for `fields_for`.
    roles : sequence of Role
        For which no entry could be found that speaks of them alone.

    Returns
    -------
    list of (Fields or None)
        For each of the roles.
    """
    found: list[Fields | None] = [None] * len(roles)
    whole = skeletons.values(block.name)
    values = {name: value for name, value in whole.items() if type(value) is int and value > 1}
    for name, value in values.items():
        open_ones = [number for number, fields in enumerate(found) if fields is None]
        model = skeletons.make({name: value - 1})
        twin = None if model is None else block_of(model, block.name)
        if len(open_ones) < 2 or twin is None:
            continue
        shapes = {key: each.shape for key, each in twin.named_parameters()}
        lost = {
            number: roles[number].number - shapes[roles[number].consumer][roles[number].column_axis]
            for number in open_ones
            if roles[number].consumer in shapes
        }
        lost = {number: count for number, count in lost.items() if 0 < count < roles[number].number}
        if len(lost) < 2 or take_buffers(twin, dict(block.module.named_buffers())) is not None:
            continue
        trial = _Trial(probe, {roles[number]: count for number, count in lost.items()})
        if model is not None and trial.fits(twin) and trial.succeeds(twin) and skeletons.reads_on(model):
            for number, count in lost.items():
                found[number] = Fields({name: Fraction(1, count)})
    return found


def works_narrower(skeletons: Skeletons, probe: Probe, block: Block, role: Role) -> bool:
    """Whether the modules of a block, as they are, compute with narrower weights what they do without the units.

    Parameters
    ----------
    skeletons, probe, block, role
        As for `fields_for`.
    """
    if role.number < 2:
        return False
    trial = _Trial(probe, {role: 1})
    if not trial.succeeds(skeleton_copy(block.module)):
        return False
    model = skeletons.make({})
    twin = None if model is None else block_of(model, block.name)
    if model is None or twin is None:
        return True
    trial.narrow(twin)
    return skeletons.reads_on(model)


class _Trial:
    """A block that loses a few units.

    Parameters
    ----------
    probe : Probe
    lost : mapping of Role to int
        How many units of each role.
    """

    def __init__(self, probe: Probe, lost: Mapping[Role, int]) -> None:
        whole = probe.parameters
        self._narrow, without = dict(whole), dict(whole)
        for role, count in lost.items():
            kept = torch.ones(max(1, role.experts), role.number, dtype=torch.bool)
            first = (role.number - count) // 2  # neither the first nor the last
            kept[:, first : first + count] = False
            kept = kept if role.experts else kept[0]
            self._narrow |= role.cut(self._narrow, kept)
            without[role.consumer] = whole[role.consumer] * role.columns(kept).to(torch.float32)
        self._probe = probe
        self._expected = probe.output(parameters=without)

    def fits(self, twin: nn.Module) -> bool:
        """Whether another block has parameters of the narrower shapes."""
        shapes = {name: each.shape for name, each in twin.named_parameters()}
        return shapes == {name: each.shape for name, each in self._narrow.items()}

    def narrow(self, twin: nn.Module) -> None:
        """Give another block without data parameters of the narrower shapes."""
        for name, parameter in twin.named_parameters():
            parameter.data = self._narrow[name].to("meta")

    def succeeds(self, twin: nn.Module) -> bool:
        """Whether another block computes with the narrower weights what the block does without the unit."""
        return agree(self._probe.tried(twin, self._narrow), self._expected)


def block_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return the block of a model that has a name."""
    return next((each.module for each in find_blocks(model) if each.name == name), None)


def _reads_on(model: nn.Module) -> bool:
    """Whether a causal model without data can read a few tokens, keep what it needs of them, and read another one."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            kept = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
            if kept is not None:
                model(input_ids=ids[:, :1], past_key_values=kept, use_cache=True)
    except Exception:  # whatever a class does without data
        return False
    return True


def _guesses(entries: Mapping[str, Any], role: Role) -> Iterator[Fields]:
    """Yield what may count the units of a role, of the entries that hold for its block."""
    values = {name: value for name, value in entries.items() if not isinstance(value, bool)}
    if role.kind == "neurons":
        equal = [name for name, value in values.items() if isinstance(value, int) and value == role.number]
        # Entries that are not set stand for a multiple of the hidden size.
        unset = [name for name, value in values.items() if value is None]
        for name in (*equal, *unset):
            yield Fields({name: Fraction(1)})
        return
    counts = {
        name: value
        for name, value in values.items()
        if "head" in name and "dim" not in name and isinstance(value, int) and value and value % role.number == 0
    }
    size = len(role.units) // max(counts.values(), default=role.number)
    for length in range(min(len(counts), _SUBSETS), 0, -1):
        for names in itertools.combinations(counts, length):
            scaled = {name: Fraction(counts[name] // role.number) for name in names}
            yield Fields(scaled)
            yield Fields(scaled, {"head_dim": size})
