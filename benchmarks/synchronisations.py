"""How often the host waits for the device in an iteration of every method, counted without a GPU.

    python benchmarks/synchronisations.py [--rows 32] [--inputs 96] [--iterations 40] [--methods best,alps]

Every method runs for n and for 2n iterations on the tests' pretend device (`tests/devices/pretend.py`). There a wait is
a value that the host reads, a result whose size depends on values, or a blocking copy to the device. The first figure
is the difference of the waits by that of the iterations, so that what is done once does not count; it is negative
where the longer run needs fewer swaps. The second one is all waits of the longer run by its iterations. Iterations are
those that were run: some methods end on their own, and an iteration of SparseGPT is an input. Writes
benchmarks/results/synchronisations.{md,json}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import report
import torch

from maskopt.oracles import NM, MaskSet, PerRow, TransposableNM, Unstructured
from maskopt.problems import Instance, LayerReconstruction, synthetic
from maskopt.solvers import (
    DIRECTIONS,
    ContinuationFrankWolfe,
    FrankWolfe,
    OneSwap,
    Solver,
    SparseFW,
    Wanda,
    solve,
)
from maskopt.weights import ADMM, ALPS, ConditionalADMM, FISTAPruner, LeastSquares, SparseGPT

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.devices.pretend import DEVICE, Waits, pretend_device

SETS = (PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5), TransposableNM(keep=2, group=4))
METHODS: dict[str, Callable[[int], Solver]] = {
    "continuation": lambda n: ContinuationFrankWolfe(iterations=n, polish=False),
    "continuation and swaps": lambda n: ContinuationFrankWolfe(iterations=n),
    "best": lambda n: ConditionalADMM(iterations=n),
    "alps": lambda n: ALPS(iterations=n, growth=(1.05, 1.03, 1.02)),  # with its own growth it ends earlier
    "admm": lambda n: ADMM(iterations=n),
    "fista": lambda n: FISTAPruner(rounds=n // 10, iterations=10),
    "sparsegpt": lambda n: SparseGPT(),
    "lsq": lambda n: LeastSquares(solver=Wanda(), method="cg", steps=n),
    "one-swap": lambda n: OneSwap(max_steps=n),
    "sparsefw": lambda n: SparseFW(iterations=n),
    **{
        f"frank-wolfe {name}": lambda n, name=name: FrankWolfe(name, iterations=n, polish=False)  # type: ignore[misc]
        for name in DIRECTIONS
    },
}


def counted(solver: Solver, masks: MaskSet, instance: Instance) -> tuple[int, Waits]:
    """Return how many iterations a solver ran on a layer that lies on the pretend device, and the waits."""
    with pretend_device():
        problem = LayerReconstruction(instance.weight.to(DEVICE), instance.gram.to(DEVICE))
    with pretend_device() as waits:
        result = solve(problem, masks, solver)
    return result.counters["products"] if isinstance(solver, LeastSquares) else result.iterations, waits


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=96)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    instance = synthetic("correlated", rows=options.rows, d=options.inputs, seed=0)
    lines, figures = [], []
    for name in options.methods.split(","):
        make = METHODS[name]
        for masks in SETS:
            if not make(options.iterations).requirements.met(instance.problem(), masks):
                continue
            (few, before), (many, after) = (
                counted(make(number), masks, instance) for number in (options.iterations, 2 * options.iterations)
            )
            each = (after.total - before.total) / (many - few) if many > few else None
            shown = "" if each is None else f"{each:.2f}"
            lines.append([f"{name}, {masks}", f"{few}", f"{many}", shown, f"{after.total / many:.2f}"])
            places = dict((after.reads + after.uploads).most_common(5))
            figures.append({"method": name, "masks": repr(masks), "iterations": [few, many], "each": each})
            figures[-1] |= {"waits": [before.total, after.total], "places": places}
            print(*lines[-1], sep="  ", flush=True)
    head = ["method and set", "iterations", "of 2n", "waits per iteration added", "waits per iteration"]
    text = f"{options.rows} x {options.inputs}, float32, n = {options.iterations}\n\n{report.table(head, lines)}"
    report.write("synchronisations", "Waits for the device per iteration", text, {"rows": figures})


if __name__ == "__main__":
    main()
