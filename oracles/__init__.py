"""Over which masks: feasible sets and what solvers may ask of them."""

from maskopt.oracles.base import (
    CanProject,
    CanRestrict,
    CanSwap,
    HasFaces,
    HasGroups,
    MaskSet,
    face_tolerance,
)
from maskopt.oracles.budget import Budget
from maskopt.oracles.matroid import NM, AtMost, Blocks, PartitionMatroid, PerRow, Unstructured
from maskopt.oracles.milp import MilpFormulation
from maskopt.oracles.parse import parse_masks
from maskopt.oracles.restricted import Protected, Restricted
from maskopt.oracles.select import smallest
from maskopt.oracles.transposable import TransposableNM
from maskopt.oracles.units import Columns, Rows, Units

if __name__ != "maskopt.oracles":
    raise ImportError("Import maskopt.oracles instead of oracles, which would make a second copy of every class.")

__all__ = [
    "NM",
    "AtMost",
    "Blocks",
    "Budget",
    "CanProject",
    "CanRestrict",
    "CanSwap",
    "Columns",
    "HasFaces",
    "HasGroups",
    "MaskSet",
    "MilpFormulation",
    "PartitionMatroid",
    "PerRow",
    "Protected",
    "Restricted",
    "Rows",
    "TransposableNM",
    "Units",
    "Unstructured",
    "face_tolerance",
    "parse_masks",
    "smallest",
]
