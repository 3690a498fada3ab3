"""Objectives: functions of a mask, with one narrow interface to solvers."""

from maskopt.problems.base import Direction, Point, Problem, Quadratic
from maskopt.problems.column_subset import ColumnSubset
from maskopt.problems.form import QuadraticForm
from maskopt.problems.function import Function
from maskopt.problems.generators import FAMILIES, synthetic
from maskopt.problems.instance import Instance, load_instance, save_instance
from maskopt.problems.layer import LayerReconstruction
from maskopt.problems.library import SolvedInstance, library
from maskopt.problems.network import BlockReconstruction, ModelDivergence, NetworkObjective
from maskopt.problems.saliency import Saliency
from maskopt.problems.shifted import Shifted, ShiftedQuadratic

if __name__ != "maskopt.problems":
    raise ImportError("Import maskopt.problems instead of problems, which would make a second copy of every class.")

__all__ = [
    "FAMILIES",
    "BlockReconstruction",
    "ColumnSubset",
    "Direction",
    "Function",
    "Instance",
    "LayerReconstruction",
    "ModelDivergence",
    "NetworkObjective",
    "Point",
    "Problem",
    "Quadratic",
    "QuadraticForm",
    "Saliency",
    "Shifted",
    "ShiftedQuadratic",
    "SolvedInstance",
    "library",
    "load_instance",
    "save_instance",
    "synthetic",
]
