"""Which weights of a layer may go, so that its output on calibration data changes least."""

import importlib
from typing import TYPE_CHECKING, Any

from maskopt.errors import MaskoptError
from maskopt.packed import registration

if TYPE_CHECKING:
    from maskopt.allocation import Plan
    from maskopt.models import PruneReport, RecoveryReport, allocate, prune, recover
    from maskopt.oracles import (
        NM,
        AtMost,
        Blocks,
        Budget,
        Columns,
        PartitionMatroid,
        PerRow,
        Product,
        Protected,
        Restricted,
        Rows,
        TransposableNM,
        Units,
        Unstructured,
    )
    from maskopt.problems import (
        BlockReconstruction,
        Function,
        LayerReconstruction,
        ModelDivergence,
        NetworkObjective,
        QuadraticForm,
        Saliency,
        load_instance,
        save_instance,
        synthetic,
    )
    from maskopt.recovery import Recovery
    from maskopt.shrinking import ShrinkReport, shrink
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

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "ALPS",
    "NM",
    "RIA",
    "AtMost",
    "BlockReconstruction",
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
    "ModelDivergence",
    "NetworkObjective",
    "OneSwap",
    "PartitionMatroid",
    "PerRow",
    "Plan",
    "Product",
    "Protected",
    "PruneReport",
    "QuadraticForm",
    "Recovery",
    "RecoveryReport",
    "Restricted",
    "Result",
    "Rows",
    "Saliency",
    "ShrinkReport",
    "SparseFW",
    "SparseGPT",
    "TransposableNM",
    "Units",
    "Unstructured",
    "Wanda",
    "allocate",
    "load_instance",
    "prune",
    "recover",
    "save_instance",
    "shrink",
    "solve",
    "synthetic",
]


# From light to heavy; from `bounds` on, each loads the ones before it.
_FOLDERS = (
    "oracles",
    "problems",
    "bounds",
    "solvers",
    "weights",
    "allocation",
    "recovery",
    "structured",
    "models",
    "shrinking",
)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import and transformers more: who asks for help or a version pays for neither.
    if name in _FOLDERS:
        return importlib.import_module(f"maskopt.{name}")
    if name in __all__:
        for folder in _FOLDERS:
            module = importlib.import_module(f"maskopt.{folder}")
            if name in module.__all__:
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module 'maskopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})


registration.register()
