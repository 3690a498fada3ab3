"""The report of a pruned model: one record per layer, totals, and everything that stayed dense."""

from __future__ import annotations

import platform
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import fmean, median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.models.masks import PackedMasks
from maskopt.models.selection import LeftDense

__all__ = ["Generalisation", "LayerRecord", "PruneReport", "RecoveryRecord", "RecoveryReport", "circumstances"]

_RATIO = 1.1  # of errors on held-out tokens over those on calibration tokens, at which there are enough


@dataclass(frozen=True)
class LayerRecord:
    """How one layer was pruned.

    Parameters
    ----------
    name : str
        Full module name.
    rows, columns : int
        Out and in features.
    relative_error : float
        ||W X - V X||^2 / ||W X||^2 on the calibration inputs X; V is M * W where the weights stay. Where errors of
        earlier layers are corrected, the first W is the target (`LayerReconstruction.towards`).
    kept_error : float
        The same with V = M * W: before any update of the surviving weights.
    objective : float
        ||W X - V X||^2, summed over the rows.
    lower_bound : float or None
        Bound on the objective of any mask of the set, where the solver proves one.
    gap_kind : str
        Kind of the bound: the name of a `GapKind`.
    sparsity : float
        Fraction of the weights pruned.
    nonzeros : int
        Number of weights kept.
    tokens : int
        Calibration tokens that it saw, padding excluded.
    iterations : int
        Of the solver.
    seconds : float
        Of the solver; layers that are solved together have their part by rows.
    status : str
        Why it stopped: the name of a `Status`.
    unfinished_rows : int
        Rows whose part of `lower_bound` holds although the time limit ended the proof early.
    held_out_error : float or None
        The relative error on the inputs of held-out batches, which neither mask nor weights were chosen on; None
        without any.
    pooled : bool
        Whether it is one of several stacked matrices and saw fewer tokens than it has inputs (perhaps none), so that
        tokens of the others stand for the missing ones in its Gram matrix (`GramCollector`), and in the errors.
    """

    name: str
    rows: int
    columns: int
    relative_error: float
    kept_error: float
    objective: float
    lower_bound: float | None
    gap_kind: str
    sparsity: float
    nonzeros: int
    tokens: int
    iterations: int
    seconds: float
    status: str
    unfinished_rows: int = 0
    held_out_error: float | None = None
    pooled: bool = False


@dataclass(frozen=True)
class RecoveryRecord:
    """What fitting a block, or the whole model, to the dense one changed.

    Parameters
    ----------
    name : str
        Of the block; "model" for the whole model.
    level : {"block", "model"}
    before, after : float
        Mean loss of the held-out windows. Of a block: squared error of its output relative to the dense block's output
        on the dense model's states, token by token. Of the model: Kullback-Leibler divergence from the dense model's
        predictions, nats per token.
    accepted : bool
        Whether the fit was kept; it is where it lowers the held-out loss by more than the standard error.
    changed : float
        Fraction of the kept weights that were pruned before.
    step_size : float
        Relative to each tensor, see `maskopt.recovery.fit`.
    steps : int
        Of the optimizer.
    parameters : int
        That were fitted.
    seconds : float
    """

    name: str
    level: str
    before: float
    after: float
    accepted: bool
    changed: float
    step_size: float
    steps: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Generalisation:
    """How the errors of layers on held-out tokens compare with those on the tokens they were pruned with.

    Attributes
    ----------
    mean_error : float
        Mean of the layers' relative errors on held-out batches.
    ratio : float
        It over the mean error of the same layers on the calibration data.
    largest_ratio : float
        Of a layer.
    layer : str
        Name of that layer.
    tokens : int
        Calibration tokens, the median over the layers.
    tokens_wanted : int
        About how many would lower `ratio` to 1.1; at most `tokens` where it is lower.

    Notes
    -----
    A least-squares fit of k weights to n tokens has errors in proportion to n - k on these and to n + k on others. The
    measured ratio r so stands for k = n (r - 1) / (r + 1), and the ratio is 1.1 at 21 k tokens.
    """

    mean_error: float
    ratio: float
    largest_ratio: float
    layer: str
    tokens: int
    tokens_wanted: int

    @classmethod
    def of(cls, layers: Sequence[LayerRecord]) -> Generalisation:
        """Return the comparison for layers with positive errors that were measured on held-out batches."""
        ratios = [(layer.held_out_error or 0.0) / layer.relative_error for layer in layers]
        error = fmean(layer.held_out_error or 0.0 for layer in layers)
        ratio = error / fmean(layer.relative_error for layer in layers)
        tokens = int(median(layer.tokens for layer in layers))
        fitted = tokens * max(0.0, ratio - 1.0) / (ratio + 1.0)
        wanted = (_RATIO + 1.0) / (_RATIO - 1.0) * fitted
        most = max(range(len(layers)), key=ratios.__getitem__)
        return cls(error, ratio, ratios[most], layers[most].name, tokens, round(wanted))


@dataclass
class RecoveryReport:
    """The result of `maskopt.recover`.

    Parameters
    ----------
    recovery : list of RecoveryRecord
        Of each block, and of the model.
    masks : dict of str to Tensor
        Per layer, boolean, True = kept, oriented as the layer's weight parameter, on the CPU.
    settings : dict
    seconds : float
    """

    recovery: list[RecoveryRecord] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is pruned; 0 where none is, as in narrower models."""
        weights = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / weights if weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything but the masks as a dictionary that `json.dump` takes."""
        return {
            "settings": self.settings,
            "sparsity": self.sparsity,
            "recovery_seconds": self.seconds,
            "recovery": [asdict(record) for record in self.recovery],
        }


@dataclass
class PruneReport:
    """The result of `maskopt.prune`.

    Parameters
    ----------
    layers : list of LayerRecord
        In the order of pruning.
    left_dense : list of LeftDense
        Every weight of two or more dimensions that was not pruned, with the reason.
    masks : PackedMasks
        Per layer, boolean, True = kept, oriented as the layer's weight parameter, on the CPU; a mapping that keeps one
        bit for each weight.
    settings : dict
        Arguments, calibration data and versions.
    plan : Plan or None
        The sparsity of each layer, where a plan said it.
    recovery : list of RecoveryRecord
        What fitting blocks and the model changed, in order. Errors in `layers` are those before it.
    calibration_seconds, solve_seconds, certify_seconds, recovery_seconds : float
        Time spent running the model, choosing masks, proving bounds, and fitting blocks and the model.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    left_dense: list[LeftDense] = field(default_factory=list)
    masks: MutableMapping[str, Tensor] = field(default_factory=PackedMasks, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    recovery: list[RecoveryRecord] = field(default_factory=list)
    calibration_seconds: float = 0.0
    solve_seconds: float = 0.0
    certify_seconds: float = 0.0
    recovery_seconds: float = 0.0

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers, zeros included."""
        return sum(layer.rows * layer.columns for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of them that is pruned."""
        return 1.0 - sum(layer.nonzeros for layer in self.layers) / self.weights

    @property
    def median_relative_error(self) -> float:
        """Median of the layers' relative errors."""
        return median(layer.relative_error for layer in self.layers)

    @property
    def held_out(self) -> Generalisation | None:
        """How errors on held-out batches compare with those on the calibration data; None without any."""
        layers = [layer for layer in self.layers if layer.held_out_error is not None and layer.relative_error > 0]
        return Generalisation.of(layers) if layers else None

    @property
    def mean_relative_error(self) -> float:
        """Mean of the layers' relative errors."""
        return fmean(layer.relative_error for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the masks as a dictionary that `json.dump` takes."""
        return {
            "settings": self.settings,
            "weights": self.weights,
            "sparsity": self.sparsity,
            "median_relative_error": self.median_relative_error,
            "mean_relative_error": self.mean_relative_error,
            **({} if self.held_out is None else {"held_out": asdict(self.held_out)}),
            "calibration_seconds": self.calibration_seconds,
            "solve_seconds": self.solve_seconds,
            "certify_seconds": self.certify_seconds,
            "recovery_seconds": self.recovery_seconds,
            **({} if self.plan is None else {"plan": self.plan.to_json()}),
            "layers": [asdict(layer) for layer in self.layers],
            **({"recovery": [asdict(record) for record in self.recovery]} if self.recovery else {}),
            "left_dense": [asdict(weight) for weight in self.left_dense],
        }


def circumstances(model: PreTrainedModel) -> dict[str, str]:
    """Return what a report says of the model, its place and the versions.

    Parameters
    ----------
    model : PreTrainedModel
    """
    return {
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "maskopt": version("maskopt"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
