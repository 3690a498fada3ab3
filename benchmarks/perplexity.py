"""Perplexity of pruned language models, every solver and set side by side.

    python benchmarks/perplexity.py [MODEL,CALIBRATION,TEXT ...] [--seeds 0,1,2]
    python benchmarks/perplexity.py [...] --name weights --solvers continuation --weights keep,lsq,alps,best
    python benchmarks/perplexity.py [...] --tune sparsefw,ria

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. Every solver
sees the same calibration windows; a seed draws other windows. Where the surviving weights move (--weights), errors
before and after are recorded. --propagate says how blocks are calibrated: default stands for what is each method's
own, and several are compared.

--tune names the methods that run with each setting of their `GRIDS`. The setting of lowest perplexity on windows of the
calibration text that no seed calibrates with is chosen, with the first seed's calibration windows, for every model
and set (--tune-once: for every model, on the first set); only that one is measured on the text.

Writes benchmarks/results/NAME.{md,json} after every method, and where weights move NAME.svg; --resume goes on where an
interrupted run ended.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import joblib
import report
import torch
from grids import GRIDS, parse_tuned, specs
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.cli.solvers import parse_comparison
from maskopt.demo.corpus import held_out_text, training_text
from maskopt.demo.run import MODEL
from maskopt.errors import MaskoptError
from maskopt.models import (
    CORRECTION,
    Calibration,
    PruneReport,
    calibration_batches,
    default_seqlen,
    load_model,
    perplexity,
    prune,
    select_layers,
    tokenize,
)
from maskopt.models.preparation import Propagate
from maskopt.models.residual import Target
from maskopt.oracles import PartitionMatroid, parse_masks
from maskopt.solvers import Solver, SparseFW

SETS = "per-row:0.5,per-row:0.6,per-row:0.7,2:4,4:8,unstructured:0.6"

Record = dict[str, Any]
Set = tuple[str, float | None]


@dataclass(frozen=True)
class Job:
    """A model, the text it is calibrated with and the text its perplexity is taken on, as files or as they are."""

    name: str
    model: str | Path
    calibration: str | Path
    source: str | Path


@dataclass(frozen=True)
class Settings:
    """What all methods have in common."""

    seeds: tuple[int, ...]
    samples: int
    batch_size: int
    characters: int | None
    validation: int
    """Windows that settings are chosen on."""
    correction: float
    """Of errors upstream, where a method corrects them."""
    target: Target
    """Likewise, as for `maskopt.prune`."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A model with its data."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibrations: dict[int, Calibration]
    """By seed."""
    settings: Settings
    held_out: Tensor
    """Windows of the calibration text that overlap no calibration window, shape (windows, seqlen)."""
    text: str
    seqlen: int
    perplexity: float
    """Of the dense model."""
    tokens: int


def loaded(job: Job, characters: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int, str]:
    """Return a model in float32 on one thread, its tokenizer, the tokens of a window, and the beginning of its text."""
    torch.set_num_threads(1)
    dense, tokenizer = load_model(job.model)
    dense.float()
    text = job.source.read_text() if isinstance(job.source, Path) else job.source
    return dense, tokenizer, default_seqlen(dense, tokenizer, at_most=512), text[:characters]


@lru_cache(maxsize=1)
def opened(job: Job, settings: Settings) -> Opened:
    """Load a model, draw its calibration windows and measure it as it is."""
    dense, tokenizer, seqlen, text = loaded(job, settings.characters)
    before = perplexity(dense, tokenizer, text, seqlen=seqlen)
    draws = {
        seed: calibration_batches(
            tokenizer, job.calibration, settings.samples, seqlen, batch_size=settings.batch_size, seed=seed
        )
        for seed in settings.seeds
    }
    used = torch.cat([window for draw in draws.values() for window in draw])
    held = held_out_windows(tokenize(tokenizer, job.calibration).ids, used, settings.validation)
    return Opened(dense, tokenizer, draws, settings, held, text, seqlen, before.perplexity, before.tokens)


def held_out_windows(ids: Tensor, used: Tensor, count: int) -> Tensor:
    """Return windows of a token stream, spread evenly over it, that share no position with any occurrence of `used`.

    Parameters
    ----------
    ids : Tensor
        Shape (tokens,).
    used : Tensor
        Windows, shape (number, seqlen).
    count : int
        Of the windows to return; fewer where the stream has no more.
    """
    seqlen = used.shape[1]
    windows = ids.unfold(0, seqlen, 1)
    free = torch.ones(len(ids), dtype=torch.bool)
    for window in used:
        places = torch.arange(len(windows))
        for position in range(seqlen):
            places = places[ids[places + position] == window[position]]
            if len(places) <= 4:
                break
        for place in places.tolist():
            if torch.equal(windows[place], window):
                free[place : place + seqlen] = False
    starts = torch.arange(0, len(windows), seqlen)
    starts = starts[free.unfold(0, seqlen, 1)[starts].all(1)]
    if len(starts) == 0:
        raise MaskoptError("The calibration windows cover the whole calibration text, so no window can be held out.")
    chosen = starts[torch.linspace(0, len(starts) - 1, min(count, len(starts))).round().long()]
    return windows[chosen]


def window_perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Return the perplexity of a model on windows of token ids."""
    with torch.inference_mode():
        losses = [float(model(input_ids=window, labels=window).loss) for window in windows.unsqueeze(1)]
    loss = fmean(losses)
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model, what `prune` says of it, and the processor time that it took."""

    model: PreTrainedModel
    report: PruneReport
    processor_seconds: float


def pruned(data: Opened, masks: Set, solver: Solver, propagate: Propagate | None, seed: int) -> Pruned:
    """Prune a copy of a model."""
    model = copy.deepcopy(data.dense)
    began = time.process_time()
    done = prune(
        model,
        data.calibrations[seed],
        parse_masks(*masks),
        solver,
        propagate=propagate,
        correction=data.settings.correction,
        target=data.settings.target,
    )
    return Pruned(model, done, time.process_time() - began)


def variants(method: str, options: argparse.Namespace) -> dict[str, Solver]:
    """Return a method with each setting of its grid if it is one of those to tune, or as it is."""
    keeps = method in options.solvers.split(",")

    def made(spec: str) -> Solver:
        solver, _, weights = spec.partition(" + ")
        if weights or keeps:
            return parse_comparison(solver, weights or "keep")[spec]
        return parse_comparison(options.solvers, spec)[spec]

    return {setting: made(spec) for setting, spec in specs(method, options.tune).items()}


def distinct(candidates: dict[str, Solver], model: PreTrainedModel, masks: Set) -> dict[str, Solver]:
    """Return the candidates without those that must find what an earlier one finds.

    SparseFW fixes whole entries: of the two that 2:4 keeps, alpha = 0.5 and 0.9 fix the same one.
    """
    shapes = sorted({layer.shape for layer in select_layers(model).layers})
    members = parse_masks(*masks)
    if not isinstance(members, PartitionMatroid):
        return candidates
    left: dict[object, str] = {}
    for setting, solver in candidates.items():
        effect: object = setting
        if isinstance(solver, SparseFW):
            fixed = [(members.kept_per_group(shape) * solver.alpha + 1e-9).floor() for shape in shapes]
            effect = (*(tuple(count.flatten().tolist()) for count in fixed), replace(solver, alpha=0.0))
        left.setdefault(effect, setting)
    return {setting: candidates[setting] for setting in left.values()}


def best_of(
    data: Opened, masks: Set, candidates: dict[str, Solver], propagate: Propagate | None, seed: int
) -> tuple[str, Pruned, dict[str, float]]:
    """Return the best setting, what it makes of a model, and the perplexity of each on windows held out."""
    validation: dict[str, float] = {}
    for setting, solver in candidates.items():
        one = pruned(data, masks, solver, propagate, seed)
        validation[setting] = window_perplexity(one.model, data.held_out) if len(candidates) > 1 else math.inf
        if setting == min(validation, key=lambda name: validation[name]):
            chosen, best = setting, one
    return chosen, best, validation if len(candidates) > 1 else {}


def cell(
    job: Job, masks: Set, method: str, settings: Settings, options: argparse.Namespace, known: dict[str, str]
) -> list[Record]:
    """Return a method's records for a model and a set, one for each seed and propagation.

    `known` has the settings that need no choice any more, by propagation.
    """
    data = opened(job, settings)
    every = variants(method, options)
    records: dict[tuple[str, int], Record] = {}
    for propagate in options.propagate:
        if (propagate, settings.seeds[0]) in records:  # the method's default
            continue
        asked = None if propagate == "default" else propagate
        left = distinct(every, data.dense, masks)
        validation: dict[str, float] = {}
        if propagate in known:
            left = {known[propagate]: every[known[propagate]]}
        for seed in settings.seeds:
            setting, best, tried = best_of(data, masks, left, asked, seed)
            left, validation = {setting: every[setting]}, validation or tried
            used = best.report.settings["propagate"]
            calibration = data.calibrations[seed]
            records[used, seed] = {
                "model": job.name,
                "masks": label(masks),
                "seed": seed,
                "solver": method if options.weights == "keep" else f"{method}, {used}",
                "method": method,
                "setting": setting,
                "validation": validation,
                "propagate": used,
                "default": asked is None,
                "perplexity": perplexity(best.model, data.tokenizer, data.text, seqlen=data.seqlen).perplexity,
                "dense_perplexity": data.perplexity,
                "tokens": data.tokens,
                "calibration": {**calibration.to_json(), "source": Path(calibration.source).name},
                "mean_relative_error": best.report.mean_relative_error,
                "mean_kept_error": fmean(layer.kept_error for layer in best.report.layers),
                "solve_seconds": best.report.solve_seconds,
                "calibration_seconds": best.report.calibration_seconds,
                "processor_seconds": best.processor_seconds,
                "load": os.getloadavg()[1],
            }
    return list(records.values())


def chosen(records: Sequence[Record], job: Job, method: str) -> dict[str, str]:
    """Return the settings that were chosen for a model and a method, by propagation."""
    own = [r for r in records if r["model"] == job.name and r.get("method") == method and r["validation"]]
    return {"default" if r["default"] else r["propagate"]: r["setting"] for r in reversed(own)}


def label(masks: Set) -> str:
    """Return what tables call a set."""
    pattern, sparsity = masks
    return pattern if sparsity is None else f"{pattern} {100 * sparsity:g} %"


def fits(job: Job, masks: Set) -> bool:
    """Whether a set fits every layer of a model; says so where it does not."""
    dense, _ = load_model(job.model)
    try:
        for layer in select_layers(dense).layers:
            parse_masks(*masks).check(layer.shape)
    except MaskoptError as misfit:
        print(f"{job.name}: {misfit}")
        return False
    return True


def parse_sets(text: str) -> list[Set]:
    """Read "per-row:0.5,2:4" as [("per-row", 0.5), ("2:4", None)]."""
    sets: list[Set] = []
    for word in text.split(","):
        pattern, _, sparsity = word.rpartition(":")
        sets.append((word, None) if pattern.isdecimal() else (pattern, float(sparsity)))
    return sets


def by_cell(records: Sequence[Record]) -> Iterator[tuple[tuple[str, str], list[Record]]]:
    """Yield each model and masks with its records."""
    for key in dict.fromkeys((record["model"], record["masks"]) for record in records):
        yield key, [record for record in records if (record["model"], record["masks"]) == key]


def summary(records: Sequence[Record], solvers: Sequence[str]) -> str:
    """Return a Markdown table: mean perplexity over the seeds, and the spread where there are several."""
    rows = []
    for (model, masks), here in by_cell(records):
        values = {solver: [r["perplexity"] for r in here if r["solver"] == solver] for solver in solvers}
        best = min((solver for solver in solvers if values[solver]), key=lambda solver: fmean(values[solver]))
        entries = []
        for solver, found in values.items():
            if not found:
                entries.append("")
                continue
            spread = f" ({min(found):.2f}-{max(found):.2f})" if len(found) > 1 else ""
            entry = f"{fmean(found):.2f}"
            entries.append((f"**{entry}**" if solver == best else entry) + spread)
        rows.append([f"{model}, {masks}", f"{here[0]['dense_perplexity']:.2f}", *entries])
    return report.table(["model, masks", "dense", *solvers], rows)


def choices(records: Sequence[Record]) -> str:
    """Return a Markdown table: what every setting that was tried reaches on the windows held out."""
    rows = []
    for (model, masks), here in by_cell(records):
        for solver in dict.fromkeys(record["solver"] for record in here if record.get("validation")):
            record = next(record for record in here if record["solver"] == solver)
            tried = [
                f"**{name}**: {value:.2f}" if name == record["setting"] else f"{name}: {value:.2f}"
                for name, value in record["validation"].items()
            ]
            rows.append([f"{model}, {masks}", solver, "; ".join(tried)])
    return report.table(["model, masks", "method", "perplexity on windows held out, the setting chosen in bold"], rows)


def means(records: Sequence[Record], columns: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """Return each cell's mean perplexity over the seeds, by model and masks; cells that all methods have."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for key, here in by_cell(records):
        found = {name: [r["perplexity"] for r in here if r["solver"] == name] for name in columns}
        if all(found.values()):
            cells[key] = {name: fmean(values) for name, values in found.items()}
    return cells


def standings(records: Sequence[Record], columns: Sequence[str]) -> str:
    """Return a Markdown table: how often each method is lowest, how far behind the lowest it is, errors and seconds."""
    cells = means(records, columns)
    rows = []
    for name in columns if cells else ():
        behind = [cell[name] / min(cell.values()) - 1.0 for cell in cells.values()]
        own = [r for r in records if r["solver"] == name and (r["model"], r["masks"]) in cells]
        rows.append(
            [
                name,
                f"{sum(gap == 0 for gap in behind)} of {len(behind)}",
                f"{100 * median(behind):.1f} %",
                f"{100 * max(behind):.1f} %",
                f"{fmean(record['mean_relative_error'] for record in own):.4f}",
                f"{fmean(record['mean_kept_error'] for record in own):.4f}",
                f"{fmean(record['solve_seconds'] for record in own):.1f}",
                f"{fmean(record.get('processor_seconds', math.nan) for record in own):.1f}",
            ]
        )
    head = ["method", "lowest in", "behind: median", "most", "mean layer error", "before the update"]
    return report.table([*head, "seconds solving", "processor seconds, calibration included"], rows)


def plot(records: Sequence[Record], columns: Sequence[str], path: Path) -> None:
    """Draw each cell's perplexities relative to the lowest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same file from the same figures
    from matplotlib import pyplot

    cells = means(records, columns)
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(cells) + 1.2), layout="constrained")
    labels = [f"{model}, {masks}" for model, masks in cells]
    for index, name in enumerate(columns):
        ratios = [cell[name] / min(cell.values()) for cell in cells.values()]
        axes.scatter(ratios, labels, s=28, marker="osD^vPX<>*"[index % 10], alpha=0.85, label=name)
    axes.set_xscale("log")
    axes.set_xticks([1.0, 1.1, 1.25, 1.5, 2.0, 3.0], labels=["1", "1.1", "1.25", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_xlabel("perplexity over the lowest of the row")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the demo model, unless --only-models leaves it out, and the models of the command line."""
    jobs = []
    if not options.only_models:
        jobs.append(Job("demo model", MODEL, training_text(800_000), held_out_text(120_000)))
    for triple in options.models:
        folder, calibration, text = triple.split(",")
        jobs.append(Job(Path(folder).name, folder, Path(calibration), Path(text)))
    return jobs


def tasks(options: argparse.Namespace) -> list[tuple[Job, Set, str]]:
    """Return every job, set and method in the order in which they are run and shown."""
    jobs = jobs_of(options)
    methods = list(parse_comparison(options.solvers, options.weights))
    return [
        (job, masks, method)
        for job in jobs
        for fitting in [[masks for masks in options.sets if fits(job, masks)]]
        for method in methods
        for masks in fitting
    ]


def write(records: Sequence[Record], settings: Settings, options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    columns = list(dict.fromkeys(record["solver"] for record in records))
    updates = "masks only, no weight updates" if options.weights == "keep" else "surviving weights updated"
    parts = [
        f"Perplexity on text the model was not calibrated with (lower is better), {updates}; mean over the seeds "
        f"(least-most), the best of each row in bold. {settings.samples} calibration windows, seeds "
        f"{list(settings.seeds)}, propagate {options.propagate}."
    ]
    if left:
        parts.append(f"Unfinished: {left} methods are still to be run.")
    parts.append(summary(records, columns))
    if any(record.get("validation") for record in records):
        parts += [
            "Methods without settings here run with their defaults. The others run with the setting of lowest "
            f"perplexity on {settings.validation} windows of the calibration text that overlap no calibration window"
            f"{', found on the first set and used for all' if options.tune_once else ''}:",
            choices(records),
        ]
    parts.append(standings(records, columns))
    loads = [record["load"] for record in records if "load" in record]
    if loads and max(loads) > options.jobs + 0.5:
        parts.append(
            f"Seconds are those of a busy machine (load {min(loads):.1f} to {max(loads):.1f} with {options.jobs} "
            "processes of one thread of our own); perplexities do not depend on it."
        )
    report.write(options.name, "Perplexity of pruned language models", "\n\n".join(parts), {"records": records})
    if options.weights != "keep" and not left:
        plot(records, columns, report.RESULTS / f"{options.name}.svg")


def place(record: Record) -> tuple[Any, ...]:
    """Return what tells a record from all others."""
    return tuple(record[name] for name in ("model", "masks", "seed", "solver"))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION,TEXT")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--solvers", default="magnitude,wanda,ria,sparsefw,one-swap,continuation")
    parser.add_argument("--weights", default="keep")
    parser.add_argument("--propagate", type=lambda text: text.split(","), default=["pruned"])
    parser.add_argument("--correction", type=float, default=CORRECTION, help="strength, where errors are corrected")
    parser.add_argument("--target", choices=get_args(Target), default="stream", help="likewise, what layers aim at")
    parser.add_argument("--tune", type=parse_tuned, default=[], metavar="METHOD,...", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--tune-once", action="store_true", help="on the first set; the others use what was chosen")
    parser.add_argument("--validation", type=int, default=16, help="windows that --tune chooses on")
    parser.add_argument("--name", default="perplexity")
    parser.add_argument("--characters", type=int, help="length of each evaluation text; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--update", action="store_true", help="keep what results/NAME.json has of other methods")
    parser.add_argument("--resume", action="store_true", help="likewise, and run only what it does not have")
    parser.add_argument("--only-models", action="store_true", help="leave the demo model out")
    parser.add_argument("--sets", type=parse_sets, default=SETS)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of at most 512 tokens")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="calibration windows that run through a model at once"
    )
    options = parser.parse_args()
    if options.tune_once and options.jobs > 1:
        parser.error("--tune-once runs one method after the other; leave --jobs out")
    settings = Settings(
        tuple(options.seeds),
        options.samples,
        options.batch_size,
        options.characters,
        options.validation,
        options.correction,
        options.target,
    )
    before: list[Record] = []
    earlier = report.RESULTS / f"{options.name}.json"
    if (options.update or options.resume) and earlier.exists():
        before = json.loads(earlier.read_text())["records"]
    done = {
        (record["model"], record["masks"], record.get("method"), record["seed"])
        for record in before
        if options.resume and record["calibration"]["samples"] == settings.samples
    }
    todo = tasks(options)
    todo = [
        (job, masks, method)
        for job, masks, method in todo
        if not all((job.name, label(masks), method, seed) in done for seed in settings.seeds)
    ]
    records = {place(record): record for record in before}

    def known(job: Job, method: str) -> dict[str, str]:
        return chosen(list(records.values()), job, method) if options.tune_once else {}

    run = joblib.Parallel(n_jobs=options.jobs, return_as="generator")
    # With one process, each is made when the one before has ended.
    found = run(
        joblib.delayed(cell)(job, masks, method, settings, options, known(job, method)) for job, masks, method in todo
    )
    with Progress() as bar:
        shown = bar.add_task("perplexity", total=len(todo))
        for finished, fresh in enumerate(found, start=1):
            records.update((place(record), record) for record in fresh)
            write(list(records.values()), settings, options, len(todo) - finished)
            bar.update(shown, advance=1)
    if not todo:
        write(list(records.values()), settings, options, 0)


if __name__ == "__main__":
    main()
