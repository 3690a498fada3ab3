"""Ways to sum a Gram matrix so that the number of processes does not matter: time, memory and rounding.

    python benchmarks/sums.py [--size 2816] [--batches 16] [--tokens 2048]

Every way adds the same float32 products, one for each batch. "float32, in place" is what depends on the order of the
batches; "error" is the largest one over all entries, relative to the two inputs' own sizes, where one input in four is
smaller than the others by a factor of 2^-10 or 2^-20. "orders" is in how many of some splits over 1, 2, 3 and 5
processes the bits are those of one process.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from maskopt.models.sums import OrderedSum, add_square, mirror

Part = tuple[int, Tensor]
SPLITS = (1, 2, 3, 5)


def inputs(size: int, tokens: int, batch: int) -> Tensor:
    """Return the inputs of a batch."""
    generator = torch.Generator().manual_seed(batch)
    rows = torch.randn(tokens, size, generator=generator)
    rows[:, 1::4] *= 2.0**-10
    rows[:, 3::4] *= 2.0**-20
    return rows


def product(rows: Tensor) -> Tensor:
    """Return the upper half of a batch's Gram matrix."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_square(total, rows)
    return total


def in_place(processes: list[list[Part]]) -> Tensor:
    """Add in float32, in each process and then over processes."""
    sums = []
    for own in processes:
        total = torch.zeros_like(own[0][1])
        for _, matrix in own:
            total += matrix
        sums.append(total)
    for other in sums[1:]:
        sums[0] += other
    return sums[0]


def doubles(processes: list[list[Part]]) -> Tensor:
    """Add in float64, and round once."""
    sums = []
    for own in processes:
        total = torch.zeros_like(own[0][1], dtype=torch.float64)
        for _, matrix in own:
            total += matrix
        sums.append(total)
    for other in sums[1:]:
        sums[0] += other
    return sums[0].float()


def fixed_point(processes: list[list[Part]]) -> Tensor:
    """Add whole numbers of a common unit, with a factor of 2^12 to spare over the largest entry of the first batch."""
    unit = 2.0 ** (50 - int(processes[0][0][1].diagonal().max().log2().ceil()))
    sums = []
    for own in processes:
        total = torch.zeros_like(own[0][1], dtype=torch.int64)
        for _, matrix in own:
            total += (matrix * unit).to(torch.int64)
        sums.append(total)
    for other in sums[1:]:
        sums[0] += other
    return sums[0].double().div_(unit).float()


def ordered(processes: list[list[Part]]) -> Tensor:
    """Add in float32 along the tree of `OrderedSum`."""
    total = OrderedSum()
    for own in processes:
        part = OrderedSum(own[0][0])
        for number, matrix in own:
            part.add(number, number + 1, matrix.clone())
        for piece in part.pieces:
            total.add(*piece)
    found = total.total()
    assert found is not None
    return found


WAYS: dict[str, tuple[Callable[[list[list[Part]]], Tensor], str]] = {
    "float32, in place": (in_place, "4"),
    "float64, rounded once": (doubles, "8 + 4"),
    "int64, fixed point": (fixed_point, "8 + 4 + 8"),
    "float32, ordered": (ordered, "4 to 16"),
}
"""Each way, and its bytes per entry while it adds."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2816)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = [count for count in SPLITS if count <= options.batches]
    exact = torch.zeros(options.size, options.size, dtype=torch.float64)
    parts: list[Part] = []
    products = 0.0
    for batch in range(options.batches):
        rows = inputs(options.size, options.tokens, batch)
        began = time.process_time()
        parts.append((batch, product(rows)))
        products += time.process_time() - began
        exact += parts[-1][1].double()
    mirror(exact)
    size = exact.diagonal().sqrt()
    print(f"{options.batches} products of {options.tokens} x {options.size}: {products:.2f} s")
    print("way                      seconds  of products  bytes per entry  error     orders")
    for name, (way, held) in WAYS.items():
        began = time.process_time()
        one = way([parts])
        seconds = time.process_time() - began
        same = 0
        for count in splits:
            edges = [options.batches * edge // count for edge in range(count + 1)]
            split = [parts[first:last] for first, last in pairwise(edges)]
            same += torch.equal(way(split), one)
        mirror(one)
        error = float(((one.double() - exact).abs() / size / size.unsqueeze(1)).max())
        share = f"{100 * seconds / products:.1f} %"
        print(f"{name:24} {seconds:7.2f}  {share:>11}  {held:>15}  {error:.1e}  {same} of {len(splits)}")


if __name__ == "__main__":
    main()
