"""How many bounds on choices of units are false, on small problems of extreme scales whose optimum is enumerated.

    python benchmarks/column_claims.py [--instances 10000] [--seed 0]

Every instance is a random problem with one kind of scaling, units of one or two columns, and a ridge from none to a
tenth. Each kind of bound is false if it lies above the error of the best of all choices by more than rounding in its
last places; a choice called optimal is false if it is worse than the best by more than a billionth; and the best error
itself is false if regressions on the inputs find another one, up to their digits. Writes
benchmarks/results/column-claims.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from statistics import median
from typing import get_args

import report
import torch
from torch import Tensor

import maskopt
from maskopt.bounds import column_bound
from maskopt.bounds.columns import ColumnBoundKind
from maskopt.oracles import Units, Unstructured
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.solvers import Status
from maskopt.structured import ExactSwaps

KINDS = get_args(ColumnBoundKind)
SCALINGS = ["none", "inputs 1e-9 ... 1e9", "tiny", "huge", "a dead input", "two equal inputs", "integers", "weights"]
_NEGLIGIBLE = 1e-8  # of the error of removing everything: where less is left, no fraction of it is reported


class Instance:
    """A random problem, determined by its seed."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.units, self.width = self._whole(2, 7), self._whole(1, 2)
        columns, self.scaling = self.units * self.width, SCALINGS[seed % len(SCALINGS)]
        x = self._normal(columns, self._whole(1, 2 * columns))
        self.weight = self._normal(self._whole(1, 5), columns)
        if self.scaling == "inputs 1e-9 ... 1e9":
            x *= 10.0 ** (3.0 * self._normal(columns, 1)).clamp(-9, 9)
        elif self.scaling == "tiny":
            x *= 1e-6
        elif self.scaling == "huge":
            x *= 1e12
        elif self.scaling == "a dead input":
            x[0] = 0.0
        elif self.scaling == "two equal inputs":
            x[1] = x[0]
        elif self.scaling == "integers":
            x = x.round()
        elif self.scaling == "weights":
            self.weight *= 10.0 ** (2.0 * self._normal(1, columns))
        self.inputs, self.gram = x, x @ x.T
        self.ridge = 10.0 ** -self._whole(1, 6) if self._whole(0, 2) else 0.0
        self.keep = self._whole(0, self.units)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def _whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._random))

    def problem(self) -> LayerReconstruction:
        """Return the layer."""
        return LayerReconstruction(self.weight, self.gram)

    def subset(self) -> ColumnSubset:
        """Return the column subset problem."""
        return ColumnSubset.of(self.problem(), torch.arange(len(self.gram)) // self.width, ridge=self.ridge)

    def least(self) -> float:
        """Return the optimum by regressions on the inputs, with a token for the ridge of each: no Gram, no inverse."""
        sizes = torch.linalg.vector_norm(self.inputs, dim=1)
        rows = torch.cat((self.inputs, self.ridge**0.5 * torch.diag(sizes)), 1)
        outputs = (self.weight @ rows).T
        found = []
        for kept in self.choices().repeat_interleave(self.width, 1):
            some = rows[kept & (sizes > 0)].T
            some = some / torch.linalg.vector_norm(some, dim=0)
            left = outputs
            if some.shape[1]:
                left = outputs - some @ torch.linalg.lstsq(some, outputs, driver="gelsd").solution
            found.append(float(left.square().sum()))
        return min(found)

    def choices(self) -> Tensor:
        """Return all choices, boolean, shape (choices, units)."""
        every = itertools.combinations(range(self.units), self.keep)
        rows = [torch.zeros(self.units).index_fill_(0, torch.tensor(some, dtype=torch.long), 1.0) for some in every]
        return torch.stack(rows).bool()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong: dict[str, list[str]] = defaultdict(list)
    parts: dict[tuple[str, str], list[float]] = defaultdict(list)
    began = time.perf_counter()
    for seed in range(options.seed, options.seed + options.instances):
        instance = Instance(seed)
        subset, every = instance.subset(), instance.choices()
        errors = subset.rows(torch.zeros(len(every), dtype=torch.long)).objective(every)
        optimum, scale = float(errors.min()), float(subset.scale())
        # That of the problem has more digits; that of the inputs does not know the problem.
        from_inputs = instance.least()
        if abs(from_inputs - optimum) > 1e-6 * optimum + _NEGLIGIBLE * scale:
            wrong["errors"].append(f"{seed}: optimum {optimum!r}, from the inputs {from_inputs!r}")
        for kind in KINDS:
            bound = column_bound(subset, instance.keep, kind).bound
            if bound > optimum * (1 + 1e-12):
                wrong[kind].append(f"{seed}: bound {bound!r}, optimum {optimum!r}")
            if optimum > _NEGLIGIBLE * scale:
                parts[kind, instance.scaling].append(bound / optimum)
        masks = Units(Unstructured(instance.keep), (None, instance.width))
        result = maskopt.solve(instance.problem(), masks, ExactSwaps(ridge=instance.ridge))
        reached = float(subset.objective(result.mask[:1, :: instance.width]))
        if result.status is not Status.OPTIMAL or reached > optimum * (1 + 1e-9) + 1e-14 * scale:
            wrong["best"].append(f"{seed}: reached {reached!r}, optimum {optimum!r}")
        done = seed - options.seed + 1
        if done % 100 == 0:
            print(f"\r{done} of {options.instances}, {sum(map(len, wrong.values()))} false ", end="", flush=True)
    seconds = time.perf_counter() - began
    number = sum(map(len, wrong.values()))
    text = (
        f"{number} of {options.instances} x {len(KINDS) + 2} claims were false: the three bounds, the choice that "
        f"`best` calls optimal, and the optimum, which regressions on the inputs find as well. Seed "
        f"{options.seed}, {seconds:.0f} s. Median of bound over optimum, where the latter is more than rounding:\n\n"
    )
    rows = [[scaling, *(f"{median(parts[kind, scaling]):.3f}" for kind in KINDS)] for scaling in SCALINGS]
    text += report.table(["scaling", *KINDS], rows)
    text += "".join(f"\n- {kind} {line}" for kind, lines in wrong.items() for line in lines[:20])
    figures = {
        "instances": options.instances,
        "seed": options.seed,
        "seconds": seconds,
        "false": dict(wrong),
        "medians": {f"{kind}, {scaling}": median(found) for (kind, scaling), found in parts.items()},
    }
    report.write("column-claims", "False claims about choices of units", text, figures)
    raise SystemExit(1 if number else 0)


if __name__ == "__main__":
    main()
