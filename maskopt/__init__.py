"""Which weights of a layer may go, so that its output on calibration data changes least."""

from typing import TYPE_CHECKING, Any

from maskopt.errors import MaskoptError
from maskopt.oracles import (
    NM,
    AtMost,
    Blocks,
    Budget,
    Columns,
    PartitionMatroid,
    PerRow,
    Protected,
    Restricted,
    Rows,
    TransposableNM,
    Units,
    Unstructured,
)
from maskopt.problems import (
    Function,
    LayerReconstruction,
    QuadraticForm,
    Saliency,
    load_instance,
    save_instance,
    synthetic,
)
from maskopt.solvers import (
    RIA,
    ContinuationFrankWolfe,
    FrankWolfe,
    Magnitude,
    OneSwap,
    Result,
    SparseFW,
    Wanda,
    solve,
)
from maskopt.weights import ADMM, ALPS, ConditionalADMM, FISTAPruner, LeastSquares, SparseGPT

if TYPE_CHECKING:
    from maskopt.models import PruneReport, prune

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "ALPS",
    "NM",
    "RIA",
    "AtMost",
    "Blocks",
    "Budget",
    "Columns",
    "ConditionalADMM",
    "ContinuationFrankWolfe",
    "FISTAPruner",
    "FrankWolfe",
    "Function",
    "LayerReconstruction",
    "LeastSquares",
    "Magnitude",
    "MaskoptError",
    "OneSwap",
    "PartitionMatroid",
    "PerRow",
    "Protected",
    "PruneReport",
    "QuadraticForm",
    "Restricted",
    "Result",
    "Rows",
    "Saliency",
    "SparseFW",
    "SparseGPT",
    "TransposableNM",
    "Units",
    "Unstructured",
    "Wanda",
    "load_instance",
    "prune",
    "save_instance",
    "solve",
    "synthetic",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; only those who prune models pay for it.
    if name in ("prune", "PruneReport"):
        from maskopt import models

        return getattr(models, name)
    raise AttributeError(f"module 'maskopt' has no attribute {name!r}")
