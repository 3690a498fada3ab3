"""Sums of matrices in an order that does not depend on who adds them, and the products they consist of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PARTS", "OrderedSum", "add_product", "add_square", "mirror", "multipliable"]

PARTS = 16
"""Parts in which the calibration batches are summed, at most: that many processes can have batches of their own."""

_ARITY = 4
_SIZES = (4, 16)

_PANELS, _NARROW = 4, 256
"""Panels of a symmetric product, measured: more are not faster, and matrices narrower than this gain nothing."""

_TILE = 512

_HALVES = (torch.bfloat16, torch.float16)

_RUN = 2048
"""Tokens whose products tensor cores add up. They cut sums off instead of rounding them, so that errors grow with this
number: measured, the largest one is then that of 16,384 tokens on the ordinary units."""


class OrderedSum:
    """The sum of the matrices of numbered parts, added along a tree that the numbers alone give.

    Float32 addition is not associative, so that the order of additions is fixed: four consecutive parts (0 to 3, 4 to
    7, ...) are added from left to right, then four such sums, and so on; parts without a matrix are left out. Which
    process computes a part, and which one adds, then changes no bit: all of them carry out the same additions of the
    same numbers, over any range of numbers and at any scale of the inputs. A process with consecutive parts adds what
    the tree allows; whoever has the pieces of all processes, in order, goes on.

    At most one matrix for each level of the tree waits beside the current one, where parts are added from the first.

    Parameters
    ----------
    first : int
        Number of the first part that is added here.
    """

    def __init__(self, first: int = 0) -> None:
        self._pieces: list[tuple[int, int, Tensor | None]] = []  # [start, stop) and its sum, without gaps
        self._end = first
        self._open: tuple[int, Tensor] | None = None

    def part(self, number: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the matrix of a part to add to, float32; zero at first, and earlier parts are complete.

        Parameters
        ----------
        number : int
        shape : tuple of int
        device : torch.device
        """
        if self._open is None or self._open[0] != number:
            self.close(number)
            self._open = number, torch.zeros(shape, device=device, dtype=torch.float32)
        return self._open[1]

    def close(self, end: int) -> None:
        """Complete all parts before a number; those that were not asked for have no matrix.

        Parameters
        ----------
        end : int
        """
        if self._open is not None:
            number, matrix = self._open
            self._open = None
            self.add(number, number + 1, matrix)
        while self._end < end:
            self._push(self._end, self._end + 1, None)

    def add(self, start: int, stop: int, matrix: Tensor | None) -> None:
        """Add a piece, as in `pieces`; it may be changed in place.

        Parameters
        ----------
        start, stop : int
            Its parts; not before those that were added already.
        matrix : Tensor or None
        """
        self.close(start)
        self._push(start, stop, matrix)

    @property
    def pieces(self) -> list[tuple[int, int, Tensor | None]]:
        """What is added up: first part, the one after the last, and the sum, None where no part has a matrix."""
        return self._pieces

    def total(self) -> Tensor | None:
        """Return the sum of all pieces, which must begin with part 0; None if no part has a matrix."""
        self.close(0)
        while len(self._pieces) > 1:
            _, stop, last = self._pieces.pop()
            start, _, before = self._pieces.pop()
            self._pieces.append((start, stop, _plus(before, last)))
        return self._pieces[0][2] if self._pieces else None

    def _push(self, start: int, stop: int, matrix: Tensor | None) -> None:
        self._pieces.append((start, stop, matrix))
        self._end = stop
        while len(self._pieces) > 1 and self._joins():
            _, stop, last = self._pieces.pop()
            start, _, before = self._pieces.pop()
            self._pieces.append((start, stop, _plus(before, last)))

    def _joins(self) -> bool:
        """Whether the last piece is a complete child that is next in the order of its parent."""
        (start, middle, _), (_, stop, _) = self._pieces[-2:]
        return any(
            start % size == 0
            and stop <= start + size
            and (middle - start) % (size // _ARITY) == 0
            and stop - middle == size // _ARITY
            for size in _SIZES
        )


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def multipliable(rows: Tensor) -> Tensor:
    """Return rows in a format in which their products are summed in float32 without being rounded before.

    That is float32, and on CUDA also what has 16 bits: the tensor cores multiply such numbers exactly and add the
    products in float32, many times as fast.

    Parameters
    ----------
    rows : Tensor
        Floating-point numbers of any format.
    """
    return rows if _on_tensor_cores(rows) else rows.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to a matrix.

    Parameters
    ----------
    total : Tensor
        Shape (d, e), float32.
    left, right : Tensor
        Shapes (tokens, d) and (tokens, e), see `multipliable`.
    """
    if _on_tensor_cores(left) and left.dtype == right.dtype:
        for one, other in zip(torch.split(left, _RUN), torch.split(right, _RUN), strict=True):
            torch.addmm(total, one.T, other, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


def _on_tensor_cores(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype in _HALVES


def add_square(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to a matrix, on the diagonal blocks and above them only: less than two thirds of the work.

    Parameters
    ----------
    total : Tensor
        Shape (d, d), float32, see `mirror`.
    rows : Tensor
        Shape (tokens, d), see `multipliable`.
    """
    size = total.shape[0]
    step = size if size < _NARROW else -(-size // _PANELS)
    for first in range(0, size, step):
        last = first + step
        add_product(total[first:last, first:], rows[:, first:last], rows[:, first:])


def mirror(total: Tensor) -> None:
    """Fill the entries below the diagonal with those above it.

    Parameters
    ----------
    total : Tensor
        Shape (d, d).
    """
    size = total.shape[0]
    for first in range(0, size, _TILE):
        last = first + _TILE
        total[last:, first:last] = total[first:last, last:].T
        tile = total[first:last, first:last]
        tile.copy_(tile.triu() + tile.triu(1).T)
