"""The shipped model pruned by every method, for `maskopt demo`."""

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
from maskopt.weights import make_weights

__all__ = ["MODEL", "DemoResult", "DemoRow", "run_demo"]

MODEL = Path(__file__).with_name("model")
SETS: tuple[tuple[str, float | None], ...] = (("per-row", 0.6), ("2:4", None))
# Names, and rough relative times for the estimate of the time left. The default of `maskopt prune` comes first.
WEIGHTS = {"best": 8, "alps": 5, "sparsegpt": 5}
SOLVERS = {"continuation": 9, "one-swap": 5, "sparsefw": 20, "wanda": 4, "magnitude": 4}
# SparseFW takes most of the time, and one set suffices to compare it.
LEFT_OUT = {("2:4", "sparsefw")}
DEFAULT = "best"
REFERENCE = "wanda"

# Enough for a clear ranking within two minutes on two cores.
_WINDOWS, _SEQLEN = 12, 512
_CALIBRATION_CHARACTERS = 1_000_000
_EVALUATION_CHARACTERS = 40_000


@dataclass(frozen=True)
class DemoRow:
    """One method on one set.

    Parameters
    ----------
    masks, solver : str
        The set, and the name of the method.
    weights : {"updated", "kept"}
        Whether the method updates the surviving weights or chooses the mask alone.
    error_ratio : float
        Median over the layers of the relative error divided by Wanda's.
    perplexity : float
        On held-out text.
    seconds : float
        Time spent on masks and weights.
    """

    masks: str
    solver: str
    weights: str
    error_ratio: float
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Results of all methods, and of the model before pruning.

    Parameters
    ----------
    dense_perplexity : float
        On the same held-out text.
    rows : list of DemoRow
        In the order of `SETS`, and for each set of `WEIGHTS` and `SOLVERS`.
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
    """Prune one model by every method at 60 % per row and at 2:4; deterministic.

    Methods that update weights run with their defaults: published ones on the inputs that their authors use, `best`
    with corrected errors of earlier layers. Methods that choose masks alone all have the same inputs, so that only
    the masks differ.

    The calibration text consists of source files of the standard library on which the shipped model was trained, the
    evaluation text of files that were held out.

    Parameters
    ----------
    progress : callable, optional
        Called with a description of the current work and the fraction of everything that is done.
    model : str or Path, optional
        A causal language model instead of the shipped one.
    device : str
        Device of the computation.

    Returns
    -------
    DemoResult

    Raises
    ------
    MaskoptError
        If the model cannot be loaded or this Python has no source files of its standard library.
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
    work = [(pattern, sparsity, name, cost) for pattern, sparsity in SETS for name, cost in _methods(pattern)]
    done, total = 0, sum(cost for *_, cost in work)
    reports: dict[tuple[str, str], PruneReport] = {}
    perplexities: dict[tuple[str, str], float] = {}
    for pattern, sparsity, name, cost in work:

        def tell(at: Progress, what: str = f"{pattern}, {name}", done: int = done, cost: int = cost) -> None:
            assert progress is not None
            progress(what, (done + cost * (at.done + at.fraction) / at.total) / total)

        pruned = copy.deepcopy(dense)
        reports[pattern, name] = prune(
            pruned,
            calibration,
            parse_masks(pattern, sparsity),
            make_weights(name) if name in WEIGHTS else make_solver(name),
            propagate=None if name in WEIGHTS else "pruned",
            progress=progress and tell,
        )
        perplexities[pattern, name] = perplexity(pruned, tokenizer, held_out, seqlen=seqlen).perplexity
        done += cost
    for pattern, sparsity, name, _ in work:
        report = reports[pattern, name]
        rows.append(
            DemoRow(
                masks=pattern if sparsity is None else f"{pattern} {100 * sparsity:g} %",
                solver=name,
                weights="updated" if name in WEIGHTS else "kept",
                error_ratio=_error_ratio(report, reports[pattern, REFERENCE]),
                perplexity=perplexities[pattern, name],
                seconds=report.solve_seconds,
            )
        )
    settings = {
        "model": str(model),
        "calibration": calibration.to_json(),
        "evaluation": before.to_json(),
        "reference": REFERENCE,
        "default": DEFAULT,
        "device": device,
    }
    return DemoResult(before.perplexity, rows, settings)


def _methods(pattern: str) -> list[tuple[str, int]]:
    """Return the methods run on a set and the relative time each takes."""
    return [(name, cost) for name, cost in (WEIGHTS | SOLVERS).items() if (pattern, name) not in LEFT_OUT]


def _error_ratio(report: PruneReport, reference: PruneReport) -> float:
    """Return the median over the layers of one report's relative errors divided by another's."""
    pairs = zip(report.layers, reference.layers, strict=True)
    return median(layer.relative_error / other.relative_error for layer, other in pairs)
