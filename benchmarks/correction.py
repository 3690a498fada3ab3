"""Perplexity of models pruned with errors upstream corrected not at all, in part and in full.

    python benchmarks/correction.py [MODEL,CALIBRATION,TEXT ...] [--corrections layer:0,layer:0.7,stream:0.7]
        [--samples 16,128]

A correction is what layers aim at that add to the residual stream (`layer`: their own outputs, `stream`: the stream
behind them), and the strength.

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. Every cell prunes the
dense model anew with `best` and the same windows. Writes benchmarks/results/NAME.{md,json} after every cell; --resume
goes on where an interrupted run ended.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import report
from perplexity import Job
from study import Opened, Record, carry_out, numbers, parse, split_pattern, words

from maskopt.models import calibration_batches, prune
from maskopt.models.prune import CORRECTION
from maskopt.oracles import parse_masks
from maskopt.weights import ConditionalADMM

Cell = tuple[str, int, int, str, str]
FULL = "layer:1"  # what others are compared with


def key(record: Record) -> Cell:
    """Return model, seed, windows, pattern and correction of a record."""
    return record["model"], record["seed"], record["samples"], record["pattern"], record["correction"]


def cells(job: Job, options: argparse.Namespace) -> list[Cell]:
    """Return what is run of a model."""
    return [
        (job.name, seed, samples, pattern, correction)
        for seed in options.seeds
        for samples in options.samples
        for pattern in options.patterns
        for correction in options.corrections
    ]


def run(job: Job, todo: Sequence[Cell], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    before = data.perplexity(data.model)
    for name, seed, samples, pattern, correction in todo:
        target, strength = correction.split(":")
        batches = calibration_batches(data.tokenizer, job.calibration, samples, data.seqlen, seed=seed)
        model = copy.deepcopy(data.model)
        done = prune(
            model,
            batches,
            parse_masks(*split_pattern(pattern)),
            ConditionalADMM(),
            correction=float(strength),
            target=target,  # type: ignore[arg-type]  # checked by it
            held_out=batches.apart(max(1, samples // 8)),
        )
        assert done.held_out is not None
        finished(
            {
                "model": name,
                "seed": seed,
                "samples": samples,
                "pattern": pattern,
                "correction": correction,
                "seqlen": data.seqlen,
                "dense": before,
                "perplexity": data.perplexity(model),
                "error": done.mean_relative_error,
                "held_out_error": done.held_out.mean_error,
            }
        )


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    kinds = [kind for kind in options.corrections if any(record["correction"] == kind for record in records)]
    by_cell = {key(record): record for record in records}
    rows = []
    for cell in dict.fromkeys(key(record)[:4] for record in records):
        found = [by_cell.get((*cell, kind)) for kind in kinds]
        model, seed, samples, pattern = cell
        dense = next(record["dense"] for record in found if record is not None)
        figures = ["" if record is None else f"{record['perplexity']:.2f}" for record in found]
        rows.append([f"{model}, {pattern}, {samples} windows, draw {seed}", f"{dense:.2f}", *figures])
    parts = [
        "Perplexity on text the model was not calibrated with (lower is better), by what layers aim at that add to the "
        "residual stream (their own outputs, or the stream behind them) and the strength of the correction."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    parts.append(report.table(["model, masks, data", "dense", *kinds], rows))
    for base in (FULL, f"layer:{CORRECTION:g}"):
        over = [[kind, *_spread(by_cell, kind, base)] for kind in kinds]
        parts += [f"Over that of {base}.", report.table(["correction", "median", "least", "most"], over)]
    report.write(options.name, "How far errors upstream are corrected", "\n\n".join(parts), {"records": list(records)})


def _spread(by_cell: Mapping[Cell, Record], kind: str, base: str) -> list[str]:
    """Return the median, least and largest ratio of perplexities to those of another correction, as words."""
    ratios = [
        record["perplexity"] / by_cell[*cell[:4], base]["perplexity"]
        for cell, record in by_cell.items()
        if cell[4] == kind and (*cell[:4], base) in by_cell
    ]
    return [f"{each(ratios):.3f}" for each in (median, min, max)] if ratios else ["", "", ""]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=numbers, default=[16, 128], help="numbers of calibration windows")
    parser.add_argument("--patterns", type=words, default=["per-row:0.5", "per-row:0.6", "2:4"])
    kinds = [f"layer:{strength:g}" for strength in (0, 0.5, CORRECTION, 0.85, 1)]
    kinds += [f"stream:{strength:g}" for strength in (0.5, CORRECTION, 1)]
    parser.add_argument("--corrections", type=words, default=kinds)
    carry_out("correction", parse(parser, "correction"), cells, run, write, key)


if __name__ == "__main__":
    main()
