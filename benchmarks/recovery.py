"""Perplexity of pruned language models before and after recovery, with masks fixed or moving, from several starts.

    python benchmarks/recovery.py [MODEL,CALIBRATION,TEXT ...] [--patterns per-row:0.6,2:4] [--methods best,wanda]
    python benchmarks/recovery.py [...] --recoveries none,block,block:fixed,model,model:fixed --samples 16,128

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. A method is one of
benchmarks/allocation.py. A recovery is none, block or model; behind a colon the rule for masks, behind a second one
what is fitted (all, pruned, vectors or lora), and behind a third one the rank: block:fixed:lora:8. Or it is EBFT's
recipe with a learning rate: ebft:0.001. Every cell prunes the dense model anew with the same windows, drawn as by
`maskopt prune`; times are processor time. Writes benchmarks/results/NAME.{md,json} after every
cell; --resume goes on where an interrupted run ended.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import report
from allocation import solver_of
from ebft import ebft
from perplexity import Job
from study import Opened, Record, carry_out, numbers, parse, split_pattern, words

from maskopt.cli.recover_options import further_windows, parse_recovery
from maskopt.models import calibration_batches, prune
from maskopt.models.residual import Target
from maskopt.oracles import parse_masks

BEST = "ebft, best"

Cell = tuple[str, int, int, str, str, str]


def key(record: Record) -> Cell:
    """Return model, seed, windows, pattern, method and recovery of a record."""
    return (
        record["model"],
        record["seed"],
        record["samples"],
        record["pattern"],
        record["method"],
        record["recovery"],
    )


def cells(job: Job, options: argparse.Namespace) -> list[Cell]:
    """Return what is run of a model."""
    return [
        (job.name, seed, samples, pattern, method, recovery)
        for seed in options.seeds
        for samples in options.samples
        for pattern in options.patterns
        for method in options.methods
        for recovery in options.recoveries
    ]


def run(job: Job, todo: Sequence[Cell], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    texts = data.texts(options.foreign, options.characters)
    before = {name: data.perplexity(data.model, part) for name, part in texts.items()}
    for name, seed, samples, pattern, method, recovery in todo:
        batches = calibration_batches(data.tokenizer, job.calibration, samples, data.seqlen, seed=seed)
        masks = parse_masks(*split_pattern(pattern))
        level, rule, which, rank = (*recovery.split(":"), "", "", "")[:4]
        recipe = level == "ebft"
        settings = parse_recovery(
            "none" if recipe else level,
            options.epochs,
            None,
            None if recipe else rule or None,
            which or "all",
            seed,
            int(rank or 16),
        )
        model = copy.deepcopy(data.model)
        began = time.process_time()
        # EBFT's recipe has the windows that our fits have.
        held_out, further = further_windows(batches, None, fits=recipe or settings is not None)
        done = prune(
            model,
            batches,
            masks,
            solver_of(method),
            target=options.target,
            recover=settings,
            held_out=held_out,
            further=further,
        )
        if recipe:
            passes = 4 if options.epochs is None else round(options.epochs)
            assert further is not None
            ebft(model, data.model, further, held_out, done.masks, float(rule), passes, seed)
        seconds = time.process_time() - began
        values = {what: data.perplexity(model, part) for what, part in texts.items()}
        finished(
            {
                "model": name,
                "seed": seed,
                "samples": samples,
                "pattern": pattern,
                "method": method,
                "recovery": recovery,
                "seqlen": data.seqlen,
                "sparsity": done.sparsity,
                "dense": before["perplexity"],
                "dense_foreign": before.get("foreign"),
                **values,
                "seconds": seconds,
                "fits": [
                    {"name": fit.name, "before": fit.before, "after": fit.after, "changed": fit.changed}
                    for fit in done.recovery
                ],
            }
        )


def summary(records: Sequence[Record], recoveries: Sequence[str], what: str) -> str:
    """Return a table of perplexities, a row for each model, pattern, method and number of windows."""
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        line = record["model"], record["pattern"], record["method"], record["samples"]
        groups.setdefault((*line, record["dense" if what == "perplexity" else "dense_foreign"]), {}).setdefault(
            record["recovery"], []
        ).append(record[what])
    rows = [
        [
            f"{model}, {pattern}, {method}, {samples} windows",
            f"{dense:.2f}",
            *(f"{median(values[name]):.2f}" if name in values else "" for name in recoveries),
        ]
        for (model, pattern, method, samples, dense), values in groups.items()
    ]
    return report.table(["model, masks, start, data", "dense", *recoveries], rows)


def with_best(records: Sequence[Record]) -> list[Record]:
    """Return the records, and for each cell that of EBFT's learning rate with the lowest perplexity."""
    best: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["recovery"].startswith("ebft:"):
            cell = key(record)[:5]
            if cell not in best or record["perplexity"] < best[cell]["perplexity"]:
                best[cell] = record
    return [*records, *({**record, "recovery": BEST} for record in best.values())]


def ratios(records: Sequence[Record], recoveries: Sequence[str]) -> str:
    """Return each recovery's perplexity over others of the same start: none, the level's fixed and moving masks."""
    by_cell = {key(record): record["perplexity"] for record in records}

    def over(name: str, base: str) -> str:
        found = [
            value / by_cell[(*cell[:5], base)]
            for cell, value in by_cell.items()
            if cell[5] == name and (*cell[:5], base) in by_cell
        ]
        return f"{median(found):.3f} ({max(found):.3f})" if found and name != base else ""

    rows = []
    for name in recoveries:
        if name != "none":
            level = "block" if name.startswith("ebft") else name.partition(":")[0]
            rows.append([name, over(name, "none"), over(name, f"{level}:fixed"), over(name, level)])
    return report.table(["recovery", "over none", "over fixed masks", "over the default"], rows)


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    records = with_best(records)
    recoveries = [name for name in (*options.recoveries, BEST) if any(record["recovery"] == name for record in records)]
    parts = [
        "Perplexity on text the model was not calibrated with (lower is better), the median over seeds "
        f"{options.seeds}. Windows of at most 512 tokens; twice as many others for the fits, "
        "as `maskopt prune` draws them; an eighth as many are held out."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    if BEST in recoveries:
        parts.append(
            f"{BEST} has the learning rate with the lowest perplexity on this very text in each cell, which favours it."
        )
    parts += [summary(records, recoveries, "perplexity"), "Ratios of perplexities: median over all cells (largest)."]
    parts.append(ratios(records, recoveries))
    if any("foreign" in record for record in records):
        parts += [
            "Perplexity on text of another kind than the calibration's.",
            summary([record for record in records if "foreign" in record], recoveries, "foreign"),
        ]
    measured = [record for record in records if record["recovery"] != BEST]
    worse = sum(fit["after"] > fit["before"] for record in measured for fit in record["fits"])
    total = sum(len(record["fits"]) for record in measured)
    parts.append(f"Fits that are worse than before on held-out windows: {worse} of {total}.")
    report.write(options.name, "Recovery above the layer", "\n\n".join(parts), {"records": measured})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--samples", type=numbers, default=[128], help="numbers of calibration windows")
    parser.add_argument("--patterns", type=words, default=["per-row:0.6", "2:4"])
    parser.add_argument("--methods", type=words, default=["best"])
    parser.add_argument("--recoveries", type=words, default=["none", "block:fixed", "block", "model"])
    parser.add_argument("--target", choices=get_args(Target), default="stream", help="what corrected layers aim at")
    parser.add_argument("--epochs", type=float, help="passes; the default of `maskopt prune` otherwise")
    parser.add_argument("--foreign", type=Path, help="another text on which perplexity is measured")
    carry_out("recovery", parse(parser, "recovery"), cells, run, write, key)


if __name__ == "__main__":
    main()
