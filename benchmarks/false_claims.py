"""How many claims of solvers, bounds and oracles are false on layers of extreme scales.

    python benchmarks/false_claims.py [--instances 100000] [--jobs 1] [--seed 0] [--solver NAME] [--scaling NAME]

Every instance is a small layer (or scores, or a quadratic form) with one or two kinds of scaling, a set of the tests'
registry and a solver that proves something. All members of the set are enumerated and evaluated in whole numbers: an
answer is false if a bound lies above the optimum, a mask called optimal is worse than the optimum by more than the
solver's gap, a bound is further below the reported error than the gap allows, an exchange lowers the error of a mask
called locally optimal, a mask lies outside the set, or the reported error is wrong; each by more than 8 units in the
last place. Instance n of a seed is the same on every run. Writes benchmarks/results/NAME.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import report
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import scales

_CHUNK = 50  # instances handed to a process at a time
_SHOWN = 50  # false claims that are written out


class _Tally:
    """What was found, by solver, set and kind of scaling."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.false: Counter[tuple[str, str, str]] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.able: Counter[str] = Counter()
        self.proven: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.listed: list[str] = []

    def add(self, number: int, finding: scales.Finding) -> None:
        """Count a finding."""
        if finding.refused:
            self.refused[finding.solver] += 1
            return
        key = finding.solver, finding.masks, finding.scaling
        self.asked[key] += 1
        if finding.false:
            self.false[key] += 1
            self.kinds.update((finding.solver, kind.split(":")[0]) for kind in finding.false)
            if len(self.listed) < _SHOWN:
                self.listed.append(f"{number}: {finding.where}")
        if finding.proves:
            self.able[finding.solver] += 1
            self.proven[finding.solver] += finding.proven

    def by_solver(self) -> list[list[str]]:
        """Return the rows of the table of solvers."""
        rows = []
        for solver in sorted({key[0] for key in self.asked}):
            asked = sum(number for key, number in self.asked.items() if key[0] == solver)
            wrong = sum(number for key, number in self.false.items() if key[0] == solver)
            kinds = ", ".join(f"{kind} {number}" for (name, kind), number in self.kinds.items() if name == solver)
            fraction = f"{self.proven[solver] / self.able[solver]:.2%}" if self.able[solver] else ""
            rows.append([solver, str(asked), str(wrong), kinds, fraction])
        return rows

    def by_scaling(self) -> list[list[str]]:
        """Return the rows of the table of scalings."""
        rows = []
        for scaling in scales.SCALINGS:
            asked = sum(number for key, number in self.asked.items() if key[2] == scaling)
            wrong = sum(number for key, number in self.false.items() if key[2] == scaling)
            rows.append([scaling, str(asked), str(wrong)])
        return rows


def _some(task: tuple[int, range, str | None, str | None]) -> list[tuple[int, scales.Finding]]:
    torch.set_num_threads(1)
    seed, numbers, solver, scaling = task
    return [(number, scales.examine(seed, number, solver, scaling)) for number in numbers]


def _answers(options: argparse.Namespace) -> Iterator[tuple[int, scales.Finding]]:
    starts = range(options.first, options.first + options.instances, _CHUNK)
    last = options.first + options.instances
    tasks = [
        (options.seed, range(start, min(last, start + _CHUNK)), options.solver, options.scaling) for start in starts
    ]
    if options.jobs == 1:
        yield from itertools.chain.from_iterable(map(_some, tasks))
        return
    with multiprocessing.get_context("spawn").Pool(options.jobs) as processes:
        yield from itertools.chain.from_iterable(processes.imap_unordered(_some, tasks))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*scales.CLAIMANTS, *scales.BOUNDS, scales.ORACLE]
    parser.add_argument("--instances", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first instance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--solver", choices=names)
    parser.add_argument("--scaling", choices=list(scales.SCALINGS))
    parser.add_argument("--name", default="false_claims", help="of the files of results")
    options = parser.parse_args()
    tally, began, shown = _Tally(), time.perf_counter(), 0.0
    for done, (number, finding) in enumerate(_answers(options), 1):
        tally.add(number, finding)
        if finding.false:
            print(f"\n{number}: {finding.where}", flush=True)
        now = time.perf_counter() - began
        if now - shown > 2.0 or done == options.instances:
            shown = now
            left = now / done * (options.instances - done)
            wrong = sum(tally.false.values())
            print(f"\r{done} of {options.instances}, {wrong} false, {left / 60:.1f} min left ", end="", flush=True)
    seconds = time.perf_counter() - began
    wrong, asked = sum(tally.false.values()), sum(tally.asked.values())
    print(f"\n{wrong} of {asked} answers false, {sum(tally.refused.values())} refused, {seconds:.0f} s")
    text = (
        f"{wrong} of {asked} answers were false; {sum(tally.refused.values())} instances were refused as data or as a "
        f"combination. Seed {options.seed}, {seconds:.0f} s with {options.jobs} process(es). *Proven* is the fraction "
        "of instances on which an exact solver, without a limit, called its mask optimal or within its gap.\n\n"
    )
    text += report.table(["solver", "answers", "false", "of which", "proven"], tally.by_solver())
    text += "\n\n" + report.table(["scaling", "answers", "false"], tally.by_scaling())
    if tally.listed:
        text += "\n\n" + "\n".join(f"- {line}" for line in tally.listed)
    figures = {
        "seed": options.seed,
        "first": options.first,
        "instances": options.instances,
        "seconds": seconds,
        "answers": [[*key, number, tally.false[key]] for key, number in sorted(tally.asked.items())],
        "proven": {name: [tally.proven[name], number] for name, number in sorted(tally.able.items())},
        "refused": dict(tally.refused),
        "false": tally.listed,
    }
    report.write(options.name, "False claims", text, figures)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
