"""Whole units of real layers: the error of every method over that of `best`, seconds, and what is proven of it.

    python benchmarks/columns.py [MODEL ...] [--instances FILE ...] [--keep 0.8,0.7,0.5] [--bounded 400]
        [--seconds 60]

Without arguments: the MLPs and attention outputs of the shipped demo model and synthetic layers. Of a model, a
transformers folder, the layers that consume MLP neurons (units of one column) and heads (units of head_dim columns) are
captured in the dense model; heads are kept to three quarters only. Layers wider than --bounded units get no bound. The
proven part is the bound over the error of `best`, both with the ridge that the weights are fitted with. Writes
benchmarks/results/columns.{md,json}.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from layers import Recorder

import maskopt
from maskopt.bounds import column_bound
from maskopt.demo.corpus import training_text
from maskopt.demo.run import MODEL
from maskopt.models import calibration_batches, load_model, prune
from maskopt.oracles import PerRow, Units, Unstructured
from maskopt.problems import FAMILIES, ColumnSubset, LayerReconstruction, load_instance, synthetic
from maskopt.solvers.base import Status
from maskopt.structured import STRUCTURED, make_structured

NEURONS = re.compile(r"(down_proj|fc2|dense_4h_to_h)$")
HEADS = re.compile(r"(o_proj|out_proj)$")
METHODS = [name for name in STRUCTURED if name != "best"]


@dataclass(frozen=True)
class Case:
    """A layer, the width of its units and the fraction of them to keep."""

    name: str
    layer: LayerReconstruction
    width: int
    keep: float


def layers_of(
    path: Path, text: str, samples: int, blocks: set[int] | None
) -> Iterator[tuple[str, LayerReconstruction, int]]:
    """Yield name, problem and width of a unit of the layers of a model whose inputs are neurons or heads."""
    model, tokenizer = load_model(path)
    model.float()
    config = model.config
    seqlen = min(256, config.max_position_embeddings)
    batches = calibration_batches(tokenizer, text, samples=samples, seqlen=seqlen)
    recorder = Recorder()
    outcome = prune(model, batches, PerRow(0.5), recorder, propagate="dense")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for record, problem in zip(outcome.layers, recorder.seen, strict=True):
        number = re.search(r"\.(\d+)\.", record.name)
        if blocks is not None and (number is None or int(number[1]) not in blocks):
            continue
        label = f"{path.name} {re.sub(r'^model.layers.', '', record.name)}"
        if NEURONS.search(record.name):
            yield label, problem, 1
        elif HEADS.search(record.name):
            yield label, problem, head


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield all cases."""
    models = [(Path(MODEL), training_text(800_000))]
    models += [(path, options.text.read_text(encoding="utf-8")) for path in options.models]
    for path, text in models:
        for name, layer, width in layers_of(path, text, options.samples, options.blocks):
            for keep in [0.75] if width > 1 else options.keep:
                yield Case(name, layer, width, keep)
    for family in FAMILIES:
        for keep in options.keep:
            yield Case(f"synthetic {family}", synthetic(family, rows=64, d=192).problem(), 1, keep)
    for path in options.instances:
        for keep in options.keep:
            yield Case(path.stem, load_instance(path).problem(), 1, keep)


def measured(case: Case, bounded: int, seconds: float | None) -> dict[str, Any]:
    """Return the figures of a case."""
    units = case.layer.shape[1] // case.width
    masks = Units(Unstructured(round(case.keep * units)), (None, case.width))
    results = {name: maskopt.solve(case.layer, masks, make_structured(name)) for name in STRUCTURED}
    subset = ColumnSubset.of(case.layer, torch.arange(case.layer.shape[1]) // case.width)
    reached = float(subset.objective(results["best"].mask[:1, :: case.width]))
    proven, began = None, time.perf_counter()
    if results["best"].status is Status.OPTIMAL:
        proven = 1.0
    elif units <= bounded and reached > 0:
        proven = column_bound(subset, round(case.keep * units), seconds=seconds).bound / reached
    return {
        "layer": case.name,
        "rows": case.layer.shape[0],
        "units": units,
        "width": case.width,
        "keep": case.keep,
        "status": results["best"].status.name,
        "errors": {name: result.relative_error for name, result in results.items()},
        "seconds": {name: result.seconds for name, result in results.items()},
        "proven": proven,
        "bound_seconds": time.perf_counter() - began,
    }


def row_of(figures: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    best = figures["errors"]["best"]
    ratios = [f"{figures['errors'][name] / best:.3f}" if best > 0 else "" for name in METHODS]
    proven = "" if figures["proven"] is None else f"{figures['proven']:.2f}"
    width = f"{figures['units']} x {figures['width']}"
    return [
        figures["layer"],
        width,
        f"{figures['keep']:g}",
        f"{best:.3g}",
        *ratios,
        f"{figures['seconds']['best']:.2f}",
        proven,
        f"{figures['bound_seconds']:.1f}" if figures["status"] != "OPTIMAL" and proven else "",
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, help="that models are calibrated with")
    parser.add_argument("--instances", nargs="*", type=Path, default=[])
    parser.add_argument("--keep", type=lambda text: [float(part) for part in text.split(",")], default=[0.8, 0.7, 0.5])
    parser.add_argument("--blocks", type=lambda text: {int(part) for part in text.split(",")}, help="of models; all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--bounded", type=int, default=400, help="units up to which bounds are computed")
    parser.add_argument("--seconds", type=float, help="time limit of each bound; none")
    parser.add_argument("--name", default="columns", help="of the files of results")
    options = parser.parse_args()
    if options.models and options.text is None:
        parser.error("models need --text")
    found = []
    for case in cases(options):
        found.append(measured(case, options.bounded, options.seconds))
        print(" ".join(row_of(found[-1])), flush=True)
    proven = [figures["proven"] for figures in found if figures["proven"] is not None]
    bounded = [f for f in found if f["proven"] is not None and not f["layer"].startswith("synthetic")]
    real, neurons = [f["proven"] for f in bounded], [f["proven"] for f in bounded if f["width"] == 1]
    ratios = {
        name: median(f["errors"][name] / f["errors"]["best"] for f in found if f["errors"]["best"] > 0)
        for name in METHODS
    }
    text = (
        "Errors over that of `best`, on the calibration tokens, with the weights that each method ends with (FLAP, as "
        "published, fits none). *Proven* is the lower bound on every choice over what `best` reaches, both with the "
        "ridge; choices among heads are enumerated. Methods minimise the error with the ridge, so that ratios may be "
        "slightly below one.\n\n"
        f"Median of the ratios: {', '.join(f'{name} {ratio:.3f}' for name, ratio in ratios.items())}. Median of what "
        f"is proven: {median(proven):.2f}; of real layers {median(real):.2f}, at least {min(real):.2f}. "
        f"Of the {len(neurons)} cases of neurons alone {median(neurons):.2f}.\n\n"
    )
    head = ["layer", "units", "kept", "error of best", *METHODS, "s", "proven", "s of the bound"]
    text += report.table(head, [row_of(figures) for figures in found])
    report.write(options.name, "Whole units of layers", text, {"rows": found})


if __name__ == "__main__":
    main()
