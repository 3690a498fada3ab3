"""Perplexity of models that several ranks recover: with more ranks than a micro-batch has windows, steps are fewer.

    python benchmarks/recovery_ranks.py MODEL,CALIBRATION,TEXT ... [--ranks 1,4,8,16] [--recoveries block,model]

Every cell runs `maskopt prune --recover` under torchrun, so the time is that of ranks that share this machine's cores.
Writes benchmarks/results/NAME.{md,json} after every cell; --resume goes on where an interrupted run ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from perplexity import Job
from study import Opened, Record, carry_out, numbers, parse, words

from maskopt.models import load_model

Cell = tuple[str, int, str, int]


def key(record: Record) -> Cell:
    """Return model, seed, recovery and ranks of a record."""
    return record["model"], record["seed"], record["recovery"], record["ranks"]


def cells(job: Job, options: argparse.Namespace) -> list[Cell]:
    """Return what is run of a model."""
    return [
        (job.name, seed, recovery, ranks)
        for seed in options.seeds
        for recovery in options.recoveries
        for ranks in options.ranks
    ]


def run(job: Job, todo: Sequence[Cell], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    before = data.perplexity(data.model)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, seed, recovery, ranks in todo:
        with tempfile.TemporaryDirectory() as place:
            out, figures = Path(place) / "out", Path(place) / "figures.json"
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *several, "-m", "maskopt", "prune", str(job.model), str(out), "--quiet"]
            command += ["--calibration", str(job.calibration), "--sparsity", "0.6", "--samples", str(options.samples)]
            command += ["--seqlen", str(data.seqlen), "--recover", recovery, "--seed", str(seed)]
            command += ["--json", str(figures)]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            model, _ = load_model(out)
            done = json.loads(figures.read_text())
            finished(
                {
                    "model": name,
                    "seed": seed,
                    "recovery": recovery,
                    "ranks": ranks,
                    "samples": options.samples,
                    "seqlen": data.seqlen,
                    "dense": before,
                    "perplexity": data.perplexity(model.float()),
                    "steps": max(fit["steps"] for fit in done["recovery"]),
                    "accepted": sum(fit["accepted"] for fit in done["recovery"]),
                    "fits": len(done["recovery"]),
                }
            )


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    by_cell = {key(record): record for record in records}
    counts = sorted({record["ranks"] for record in records})
    rows = []
    for cell in dict.fromkeys(key(record)[:3] for record in records):
        found = [by_cell.get((*cell, count)) for count in counts]
        dense = next(record["dense"] for record in found if record is not None)
        shown = ["" if record is None else f"{record['perplexity']:.2f} ({record['steps']})" for record in found]
        rows.append([f"{cell[0]}, {cell[2]}, draw {cell[1]}", f"{dense:.2f}", *shown])
    parts = [
        f"Perplexity on text the model was not calibrated with (lower is better), {options.samples} windows, 60 % per "
        "row, by the number of ranks that recover together; in brackets the most steps of a fit. A step takes a "
        "micro-batch of every rank, so that there are fewer of them where ranks are more than a micro-batch of one "
        "process has windows."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    parts.append(report.table(["model, recovery", "dense", *(f"{count} ranks" for count in counts)], rows))
    report.write(options.name, "Recovery on several ranks", "\n\n".join(parts), {"records": list(records)})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--ranks", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--recoveries", type=words, default=["block", "model"])
    arguments = parse(parser, "recovery-ranks")
    arguments.only_models = True  # the demo model's calibration text is no file
    carry_out("ranks", arguments, cells, run, write, key)


if __name__ == "__main__":
    main()
