"""Models that become smaller: neurons, attention heads and experts are removed, and the folder loads as before."""

from maskopt.shrinking.cut import Cut, cut_model
from maskopt.shrinking.depth import DepthReport, drop_blocks
from maskopt.shrinking.experts import DroppedExperts, ExpertMethod, ExpertsReport, drop_experts
from maskopt.shrinking.proofs import UnitProof
from maskopt.shrinking.report import ShrinkReport, Width
from maskopt.shrinking.saving import save_shrunk
from maskopt.shrinking.shrink import Refit, Widths, shrink
from maskopt.shrinking.speed import Speed, cache_bytes, measure_speed
from maskopt.shrinking.units import Refused, Role, Site, Structure, find_units

__all__ = [
    "Cut",
    "DepthReport",
    "DroppedExperts",
    "ExpertMethod",
    "ExpertsReport",
    "Refit",
    "Refused",
    "Role",
    "ShrinkReport",
    "Site",
    "Speed",
    "Structure",
    "UnitProof",
    "Width",
    "Widths",
    "cache_bytes",
    "cut_model",
    "drop_blocks",
    "drop_experts",
    "find_units",
    "measure_speed",
    "save_shrunk",
    "shrink",
]
