"""Perplexity of models pruned with errors upstream corrected not at all, in part and in full.

    python benchmarks/correction.py [MODEL,CALIBRATION,TEXT ...] [--strengths 0,0.5,0.7,0.85,1] [--samples 16,128]

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. Every cell prunes the
dense model anew with `best` and the same windows. Writes benchmarks/results/NAME.{md,json} after every cell; --resume
goes on where an interrupted run ended.
"""

import argparse
import copy
from collections.abc import Sequence
from statistics import median
from typing import Any

import report
from perplexity import Job
from study import Opened, Record, carry_out, fractions, numbers, parse, split_pattern, words

from maskopt.models import calibration_batches, prune
from maskopt.oracles import parse_masks
from maskopt.weights import ConditionalADMM

Cell = tuple[str, int, int, str, float]


def key(record: Record) -> Cell:
    """Return model, seed, windows, pattern and strength of a record."""
    return record["model"], record["seed"], record["samples"], record["pattern"], record["strength"]


def cells(job: Job, options: argparse.Namespace) -> list[Cell]:
    """Return what is run of a model."""
    return [
        (job.name, seed, samples, pattern, strength)
        for seed in options.seeds
        for samples in options.samples
        for pattern in options.patterns
        for strength in options.strengths
    ]


def run(job: Job, todo: Sequence[Cell], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    before = data.perplexity(data.model)
    for name, seed, samples, pattern, strength in todo:
        batches = calibration_batches(data.tokenizer, job.calibration, samples, data.seqlen, seed=seed)
        model = copy.deepcopy(data.model)
        done = prune(
            model,
            batches,
            parse_masks(*split_pattern(pattern)),
            ConditionalADMM(),
            correction=strength,
            held_out=batches.apart(max(1, samples // 8)),
        )
        assert done.held_out is not None
        finished(
            {
                "model": name,
                "seed": seed,
                "samples": samples,
                "pattern": pattern,
                "strength": strength,
                "seqlen": data.seqlen,
                "dense": before,
                "perplexity": data.perplexity(model),
                "error": done.mean_relative_error,
                "held_out_error": done.held_out.mean_error,
            }
        )


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    strengths = sorted({record["strength"] for record in records})
    by_cell = {key(record): record for record in records}
    rows = []
    for cell in dict.fromkeys(key(record)[:4] for record in records):
        found = [by_cell.get((*cell, strength)) for strength in strengths]
        model, seed, samples, pattern = cell
        dense = next(record["dense"] for record in found if record is not None)
        figures = ["" if record is None else f"{record['perplexity']:.2f}" for record in found]
        rows.append([f"{model}, {pattern}, {samples} windows, draw {seed}", f"{dense:.2f}", *figures])
    parts = [
        "Perplexity on text the model was not calibrated with (lower is better), by the strength of the correction."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    parts.append(report.table(["model, masks, data", "dense", *(f"{strength:g}" for strength in strengths)], rows))
    over = []
    for strength in strengths:
        ratios = [
            record["perplexity"] / by_cell[*cell[:4], 1.0]["perplexity"]
            for cell, record in by_cell.items()
            if cell[4] == strength and (*cell[:4], 1.0) in by_cell
        ]
        if ratios:
            over.append([f"{strength:g}", f"{median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"])
    parts += ["Over that of the full correction.", report.table(["strength", "median", "least", "most"], over)]
    report.write(options.name, "How far errors upstream are corrected", "\n\n".join(parts), {"records": list(records)})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=numbers, default=[16, 128], help="numbers of calibration windows")
    parser.add_argument("--patterns", type=words, default=["per-row:0.5", "per-row:0.6", "2:4"])
    parser.add_argument("--strengths", type=fractions, default=[0.0, 0.5, 0.7, 0.85, 1.0])
    carry_out("correction", parse(parser, "correction"), cells, run, write, key)


if __name__ == "__main__":
    main()
