"""Over which masks: feasible sets and what solvers may ask of them."""

from maskopt.oracles.matroid import NM, PartitionMatroid, PerRow, Unstructured
from maskopt.oracles.parse import parse_masks
from maskopt.oracles.protected import Protected
from maskopt.oracles.select import smallest

__all__ = ["NM", "PartitionMatroid", "PerRow", "Protected", "Unstructured", "parse_masks", "smallest"]
