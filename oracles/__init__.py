"""Feasible sets of masks, and the methods that solvers call on them."""

from maskopt.oracles.base import MaskSet, face_tolerance
from maskopt.oracles.budget import Budget
from maskopt.oracles.matroid import PartitionMatroid
from maskopt.oracles.milp import MilpFormulation
from maskopt.oracles.parse import Counts, parse_masks
from maskopt.oracles.patterns import NM, AtMost, Blocks, PerRow, Unstructured
from maskopt.oracles.product import Product
from maskopt.oracles.protocols import CanProject, CanRestrict, CanSwap, HasFaces, HasGroups
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
    "Counts",
    "HasFaces",
    "HasGroups",
    "MaskSet",
    "MilpFormulation",
    "PartitionMatroid",
    "PerRow",
    "Product",
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
