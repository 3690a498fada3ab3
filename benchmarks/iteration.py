"""Time of an iteration of the Frank-Wolfe loop, relative to its matrix product.

    python benchmarks/iteration.py [--size 512] [--device cpu|cuda] [--threads N] [--directions vanilla,dicg]

Loop and product are timed in turns in one process, so that other work on the machine slows both; the ratio of the
medians is the figure. Writes benchmarks/results/iteration.{md,json}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import report
import torch

from maskopt.oracles import NM, MaskSet, PerRow
from maskopt.problems import synthetic
from maskopt.solvers import DIRECTIONS, ExactStep, Momentum, OpenLoopStep, Stochastic, frank_wolfe
from maskopt.solvers.base import Monitor
from maskopt.solvers.frank_wolfe import DirectionName

_WARM, _ITERATIONS = 8, 40


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call, including all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ratio(name: DirectionName, masks: MaskSet, size: int, device: torch.device, repeats: int) -> tuple[float, float]:
    """Return seconds per iteration and of the product."""
    problem = synthetic("correlated", rows=size, d=size).problem(str(device))
    rule = DIRECTIONS[name]()
    start = masks.center(problem.shape, problem.dtype, device)
    if rule.from_vertex:
        start = masks.lmo(problem.evaluate(start).gradient)
    step = OpenLoopStep() if isinstance(rule, Momentum | Stochastic) else ExactStep()

    def run(iterations: int) -> Callable[[], object]:
        return lambda: frank_wolfe(
            lambda _: problem,
            masks,
            start,
            direction=rule,
            step=step,
            iterations=iterations,
            monitor=Monitor("benchmark", None, None),
        )

    def products() -> None:
        for _ in range(_ITERATIONS):
            torch.mm(problem.scaled_weight, problem.scaled_gram)

    run(_WARM)()
    iteration, product = [], []
    for _ in range(repeats):
        short = seconds(run(_WARM), device)
        iteration.append((seconds(run(_WARM + _ITERATIONS), device) - short) / _ITERATIONS)
        product.append(seconds(products, device) / _ITERATIONS)
    return median(iteration), median(product)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    lines, figures = [], []
    for name in options.directions.split(","):
        for masks in (PerRow(0.5), NM(keep=2, group=4)):
            one, product = ratio(name, masks, options.size, device, options.repeats)
            lines.append([f"{name}, {masks}", f"{1e3 * one:.3f}", f"{1e3 * product:.3f}", f"{one / product:.2f}"])
            figures.append({"direction": name, "masks": repr(masks), "seconds": one, "product_seconds": product})
            print(*lines[-1], sep="  ", flush=True)
    text = f"{options.size} x {options.size}, float32, {device}, {options.threads} thread(s)\n\n"
    text += report.table(["direction and set", "iteration ms", "product ms", "ratio"], lines)
    name = "iteration" if device.type == "cpu" else f"iteration-{device.type}"
    report.write(name, "An iteration against its matrix product", text, {"rows": figures})


if __name__ == "__main__":
    main()
