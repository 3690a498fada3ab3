"""Structured pruning of a layer: whole units of its inputs are kept, and the weights on them fitted anew."""

from maskopt.structured.base import Selection, Structured, bias_change
from maskopt.structured.exact_swaps import ExactSwaps
from maskopt.structured.osscar import OSSCAR
from maskopt.structured.registry import STRUCTURED, make_structured
from maskopt.structured.scores import FASP, FLAP, ColumnMagnitude, NewtonColumns, RandomColumns
from maskopt.structured.spap import SPAP

__all__ = [
    "FASP",
    "FLAP",
    "OSSCAR",
    "SPAP",
    "STRUCTURED",
    "ColumnMagnitude",
    "ExactSwaps",
    "NewtonColumns",
    "RandomColumns",
    "Selection",
    "Structured",
    "bias_change",
    "make_structured",
]
