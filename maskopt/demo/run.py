"""The shipped model pruned with every solver: what `maskopt demo` shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from maskopt.demo.corpus import held_out_text, training_text
from maskopt.models import Progress, PruneReport, calibration_batches, default_seqlen, load_model, perplexity, prune
from maskopt.oracles import parse_masks
from maskopt.solvers import make_solver

__all__ = ["MODEL", "DemoResult", "DemoRow", "run_demo"]

MODEL = Path(__file__).with_name("model")
SETS: tuple[tuple[str, float | None], ...] = (("per-row", 0.6), ("2:4", None))
# Names and how long each takes, roughly, so that the time left can be told.
SOLVERS = {"magnitude": 1, "wanda": 1, "ria": 1, "sparsefw": 20, "one-swap": 3, "continuation": 8}
REFERENCE = "wanda"

# Enough for a clear ranking, little enough for two minutes on two cores.
_WINDOWS, _SEQLEN = 24, 512
_CALIBRATION_CHARACTERS = 1_000_000
_EVALUATION_CHARACTERS = 40_000


@dataclass(frozen=True)
class DemoRow:
    """One solver on one set.

    Parameters
    ----------
    masks, solver : str
        What was asked for.
    error_ratio : float
        Median over the layers of the relative error divided by Wanda's.
    perplexity : float
        On held-out text.
    seconds : float
        Spent choosing masks.
    """

    masks: str
    solver: str
    error_ratio: float
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """All rows, and the model before pruning.

    Parameters
    ----------
    dense_perplexity : float
        On the same held-out text.
    rows : list of DemoRow
        In the order of `SETS` and `SOLVERS`.
    settings : dict
        Texts, sizes and hashes.
    """

    dense_perplexity: float
    rows: list[DemoRow]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dictionary that `json.dump` takes."""
        return asdict(self)


def run_demo(
    progress: Callable[[str, float], object] | None = None, *, model: str | Path | None = None, device: str = "cpu"
) -> DemoResult:
    """Prune one model with every solver at 60 % per row and at 2:4; deterministic.

    Calibration text are source files of the standard library that the shipped model was trained on, evaluation text
    is files it has never seen.

    Parameters
    ----------
    progress : callable, optional
        Called with what is being done and the fraction of everything that is done.
    model : str or Path, optional
        Another causal language model than the shipped one.
    device : str
        Where to compute.

    Raises
    ------
    MaskoptError
        If the model cannot be loaded or this Python keeps no source files of its standard library.
    """
    model = MODEL if model is None else model
    dense, tokenizer = load_model(model, device=device)
    dense.float()  # stored as bfloat16, in which CPUs are slow
    seqlen = default_seqlen(dense, tokenizer, at_most=_SEQLEN)
    calibration = calibration_batches(
        tokenizer, training_text(_CALIBRATION_CHARACTERS), samples=_WINDOWS * _SEQLEN // seqlen, seqlen=seqlen
    )
    held_out = held_out_text(_EVALUATION_CHARACTERS)
    before = perplexity(dense, tokenizer, held_out, seqlen=seqlen)
    rows = []
    done, total = 0, len(SETS) * sum(SOLVERS.values())
    for pattern, sparsity in SETS:
        label = pattern if sparsity is None else f"{pattern} {100 * sparsity:g} %"
        reports: dict[str, PruneReport] = {}
        perplexities = {}
        for name, fraction in SOLVERS.items():

            def tell(at: Progress, what: str = f"{label}, {name}", done: int = done, fraction: int = fraction) -> None:
                assert progress is not None
                progress(what, (done + fraction * (at.done + at.fraction) / at.total) / total)

            pruned = copy.deepcopy(dense)
            # All on the inputs that the published ones are made for: what differs is the masks.
            reports[name] = prune(
                pruned,
                calibration,
                parse_masks(pattern, sparsity),
                make_solver(name),
                propagate="pruned",
                progress=progress and tell,
            )
            perplexities[name] = perplexity(pruned, tokenizer, held_out, seqlen=seqlen).perplexity
            done += fraction
        rows += [
            DemoRow(label, name, _error_ratio(report, reports[REFERENCE]), perplexities[name], report.solve_seconds)
            for name, report in reports.items()
        ]
    settings = {
        "model": str(model),
        "calibration": calibration.to_json(),
        "evaluation": before.to_json(),
        "reference": REFERENCE,
        "device": device,
    }
    return DemoResult(before.perplexity, rows, settings)


def _error_ratio(report: PruneReport, reference: PruneReport) -> float:
    """Return the median over the layers of one report's relative errors divided by another's."""
    pairs = zip(report.layers, reference.layers, strict=True)
    return median(layer.relative_error / other.relative_error for layer, other in pairs)
