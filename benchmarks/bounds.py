"""Lower bounds on the error of a row's best mask: quality and time of every method.

    python benchmarks/bounds.py INSTANCE [INSTANCE ...] [--rows 2] [--inputs 48 96 0] [--keep 0.5] [--group 4]
        [--cuts 50] [--check]

Every figure is a lower bound as a fraction of the best mask known (continuation from several schedules, 1-swaps),
summed over the first rows on the first inputs (0: all of them), and the seconds it took for each row. `--check` also
solves the semidefinite programs with the conic solver clarabel where it is installed (pip install clarabel), small
ones only. Writes benchmarks/results/bounds.{md,json}.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import report
import scipy.sparse
import torch
from torch import Tensor

from maskopt import NM, ContinuationFrankWolfe, FrankWolfe, LayerReconstruction, PerRow, load_instance, solve
from maskopt.bounds import layer_shift, sdp_bound, shifted_bound, smallest_eigenvalue
from maskopt.oracles import PartitionMatroid

LARGEST_CHECKED = 60  # inputs; a conic solver takes minutes for more


def best_known(problem: LayerReconstruction, masks: PartitionMatroid) -> Tensor:
    """Return each row's smallest error found."""
    found = [solve(problem, masks, ContinuationFrankWolfe(iterations=count)).mask for count in (400, 1600)]
    return torch.stack([problem.objective(mask) for mask in found]).amin(0)


def conic(Q: np.ndarray, s: int, nonnegative: bool) -> float:
    """Return the value of the bordered semidefinite relaxation, stated in its standard form, by clarabel."""
    import clarabel

    n = len(Q) + 1
    entries = [(i, j) for j in range(n) for i in range(j + 1)]
    place = {entry: number for number, entry in enumerate(entries)}
    cost = np.array([0.0 if i == 0 else Q[i - 1, j - 1] * (1 + (i < j)) for i, j in entries])
    lines: list[dict[int, float]] = [{0: 1.0}, {place[0, i]: 1.0 for i in range(1, n)}]
    right = [1.0, float(s)]
    for i in range(1, n):
        lines.append({place[i, i]: 1.0, place[0, i]: -1.0})
        row = {place[min(i, j), max(i, j)]: 1.0 for j in range(1, n)}
        lines.append(row | {place[0, i]: -float(s)})
        right += [0.0, 0.0]
    cones = [clarabel.ZeroConeT(len(lines))]
    if nonnegative:
        pairs = [{place[i, j]: -1.0} for i, j in entries if 0 < i < j]
        lines, right = lines + pairs, right + [0.0] * len(pairs)
        cones.append(clarabel.NonnegativeConeT(len(pairs)))
    rows = [number for number, line in enumerate(lines) for _ in line]
    columns = [column for line in lines for column in line]
    values = [value for line in lines for value in line.values()]
    linear = scipy.sparse.csc_matrix((values, (rows, columns)), shape=(len(lines), len(entries)))
    cone = scipy.sparse.diags([-1.0 if i == j else -(2.0**0.5) for i, j in entries])
    everything = scipy.sparse.vstack([linear, cone]).tocsc()
    cones.append(clarabel.PSDTriangleConeT(n))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    none = scipy.sparse.csc_matrix((len(entries), len(entries)))
    bounds = np.concatenate([right, np.zeros(len(entries))])
    return float(clarabel.DefaultSolver(none, cost, everything, bounds, cones, settings).solve().obj_val_dual)


def methods(
    problem: LayerReconstruction, keep: Tensor, group: int | None, cuts: int, check: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return every method by name; each gives one bound for each row."""
    d = problem.shape[1]
    masks = PerRow(keep) if group is None else NM(keep=int(keep[0]) * group // d, group=group)
    found: dict[str, Callable[[], Tensor]] = {}

    def gap() -> Tensor:
        bound = solve(problem, masks, FrankWolfe("conjugate", iterations=400)).lower_bound
        assert bound is not None
        return bound

    def checked(nonnegative: bool) -> Tensor:
        wide = problem.double()
        forms = [row.unsqueeze(1) * wide.gram * row for row in wide.weight]
        unit = [float(form.diagonal().sum()) for form in forms]
        values = [conic((Q / u).numpy(), d - int(keep[0]), nonnegative) * u for Q, u in zip(forms, unit, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    found["Frank-Wolfe gap"] = gap
    if group is None:
        found["+ smallest eigenvalue"] = lambda: shifted_bound(problem, keep, smallest_eigenvalue(problem))
        found["+ largest diagonal"] = lambda: shifted_bound(problem, keep, layer_shift(problem))
    found["semidefinite"] = lambda: sdp_bound(problem, keep, group=group).bound
    found[f"+ Z >= 0, {cuts} steps"] = lambda: sdp_bound(problem, keep, group=group, cuts=cuts).bound
    if check and group is None and d <= LARGEST_CHECKED:
        found["clarabel"] = lambda: checked(False)
        found["clarabel, Z >= 0"] = lambda: checked(True)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--inputs", type=int, nargs="+", default=[48, 96, 0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--group", type=int)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: list[list[str]] = []
    for path in options.instances:
        whole = load_instance(path)
        for inputs in options.inputs:
            d = inputs or whole.weight.shape[1]
            problem = LayerReconstruction(whole.weight[: options.rows, :d], whole.gram[:d, :d])
            rows = problem.shape[0]
            group = options.group
            keep = torch.full((rows,), round(options.keep * d))
            masks = PerRow(keep) if group is None else NM(keep=int(keep[0]) * group // d, group=group)
            best = best_known(problem, masks)
            for name, method in methods(problem, keep, group, options.cuts, options.check).items():
                begin = time.perf_counter()
                bound = method()
                seconds = (time.perf_counter() - begin) / rows
                fractions = (bound / best).tolist()
                figures = [float(bound.sum() / best.sum()), min(fractions), max(fractions), seconds]
                table.append([f"{path.stem}, d = {d}, {name}", *(f"{figure:.3f}" for figure in figures)])
                print(*table[-1], flush=True)
    text = report.table(["method", "of the best known", "worst row", "best row", "seconds per row"], table)
    group = "" if options.group is None else f", groups of {options.group}"
    about = f"First {options.rows} rows, {options.keep:g} kept{group}, one thread. "
    about += "Lower bounds as fractions of the error of the best mask known."
    report.write("bounds", "Lower bounds", f"{about}\n\n{text}", {"rows": table})


if __name__ == "__main__":
    main()
