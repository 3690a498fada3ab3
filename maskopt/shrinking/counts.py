"""How many units of each layer stay, of what users ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.errors import MaskoptError
from maskopt.models.blocks import find_blocks
from maskopt.shrinking.units import Kind, Refused, Site, Structure

__all__ = ["counts_of_budget", "counts_of_fractions", "counts_of_plan", "usable"]

_ALIGNED = 8  # units: grouped products of experts read rows that begin at multiples of 16 bytes, in half precision too
_MOST = 0.95  # fraction of the neurons that can be asked for


def counts_of_plan(structure: Structure, plan: Plan, round_to: int) -> dict[Site, int]:
    """Return how many units stay by a plan; experts of a site have the fraction of the first one."""
    sites = {layer.name: site for site in structure.sites for layer in site.layers}
    unknown = [name for name in plan.sparsities if name not in sites]
    if unknown:
        raise MaskoptError(f"The plan names {unknown[0]}, which is no layer whose inputs can be removed.")
    counts = {
        site: _rounded(site, 1 - plan.sparsities[site.layers[0].name], round_to)
        for site in structure.sites
        if site.layers[0].name in plan.sparsities
    }
    return _losing(counts)


def usable(structure: Structure, plain: bool) -> Structure:
    """Return what can be removed: heads only where the configuration can say it, unless widths are free."""
    sites, refused = [], list(structure.refused)
    for site in structure.sites:
        if not plain or site.role.kind == "neurons" or site.role.fields is not None:
            sites.append(site)
        else:
            reason = f"{structure.unsaid} fewer heads; with free widths the folder has a reader that can"
            refused.append(Refused(site.name, site.role.kind, reason))
    return replace(structure, sites=sites, refused=refused)


def counts_of_fractions(structure: Structure, wanted: Mapping[Kind, float], round_to: int) -> dict[Site, int]:
    """Return how many units stay where less than all do."""
    for kind, fraction in wanted.items():
        if fraction and not structure.of(kind):
            reason = next((each.reason for each in structure.refused if each.kind == kind), "there are none")
            raise MaskoptError(f"The model can lose no {kind}: {reason}.")
    counts = {site: _rounded(site, 1 - wanted[site.role.kind], round_to) for site in structure.sites}
    return _some({site: count for site, count in _losing(counts).items() if wanted[site.role.kind] > 0})


def counts_of_budget(model: PreTrainedModel, structure: Structure, params: float, round_to: int) -> dict[Site, int]:
    """Return how many units stay so that a fraction of the blocks' parameters goes."""
    seen = {id(each): each.numel() for block in find_blocks(model) for each in block.module.parameters()}
    budget = params * sum(seen.values())
    sizes = {site: site.size for site in structure.sites}
    heads = {site: _rounded(site, 1 - params, round_to) for site in structure.of("heads")}
    lost = sum((site.role.number - count) * sizes[site] for site, count in heads.items())
    whole_size = sum(site.role.number * sizes[site] for site in structure.of("neurons"))
    fraction = 0.0 if whole_size == 0 else (budget - lost) / whole_size
    if whole_size == 0 or fraction > _MOST:
        raise MaskoptError(
            f"The blocks cannot lose {params:.0%} of their parameters: all neurons and heads hold "
            f"{(whole_size + sum(s.role.number * sizes[s] for s in heads)) / sum(seen.values()):.0%} of them, and some "
            f"of each have to stay."
        )
    neurons = {site: _rounded(site, 1 - max(0.0, fraction), round_to) for site in structure.of("neurons")}
    counts = {**heads, **neurons}
    return _some(_losing({site: counts[site] for site in structure.sites}))


def _some(counts: dict[Site, int]) -> dict[Site, int]:
    if not counts:
        raise MaskoptError("The fractions are too small to remove a single unit, or units are rounded too coarsely.")
    return counts


def _losing(counts: Mapping[Site, int]) -> dict[Site, int]:
    """Return the counts of sites that lose units, where those that one entry of the configuration widens agree."""
    least: dict[tuple[str, str], int] = {}
    found = dict(counts)
    # Experts, whose counts have to be aligned, decide.
    for site in sorted(counts, key=lambda site: not site.role.experts):
        if site.role.fields is not None:
            for name in site.role.entries:
                value = site.role.fields.entries(counts[site])[name]
                found[site] = site.role.fields.units(name, least.setdefault((site.block.name, name), value))
    return {site: count for site, count in found.items() if count < site.role.number}


def _rounded(site: Site, fraction: float, round_to: int) -> int:
    """Return how many units of a site stay of a fraction, rounded to a multiple."""
    role = site.role
    step = round_to if role.kind == "neurons" else 1
    if role.experts:
        step = math.lcm(step, _ALIGNED)
    return min(role.number, step * max(1, round(fraction * role.number / step)))
