"""Partition matroids of tiles: the one class behind most sets of masks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array
from scipy.special import gammaln
from torch import Tensor

from maskopt.checks import shown, sides
from maskopt.errors import MaskoptError
from maskopt.oracles.base import Index, MaskSet, Shape, box_step, face_tolerance, fitted
from maskopt.oracles.project import capped_simplex
from maskopt.oracles.select import smallest

__all__ = ["PartitionMatroid"]

_COUNTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Tile = tuple[int | None, int | None]


class PartitionMatroid(MaskSet):
    """Masks in which every tile keeps a fixed number of entries, or at most that many.

    The weight is cut into tiles of equal shape; the entries of a tile are a group. Unstructured, per-row, N:M, block
    and per-column masks differ only in the tile. A set has no shape of its own: every method takes it from its
    argument, so one object serves all layers of a model.

    Parameters
    ----------
    keep : float, int or Tensor
        A fraction in [0, 1] of each group (a float; rounded up, as the literature prunes floor(sparsity * d)), a
        count per group (an int), or one count for each group (an integer tensor, in row-major order of tiles).
    tile : (int or None, int or None)
        Rows and columns of a tile; None stands for all of them.
    name : str
        What messages call the set.
    at_most : bool
        Whether groups may also keep fewer.

    Raises
    ------
    MaskoptError
        If `keep` is neither a fraction in [0, 1] nor a count >= 0. Methods raise it where a tile does not divide the
        weight or a group is smaller than its count.

    References
    ----------
    The bases of a partition matroid, over which a linear function is minimised by choosing the cheapest entries of each
    group: Edmonds, Matroids and the greedy algorithm, Mathematical Programming 1, 1971.

    Examples
    --------
    One entry of every column:

    >>> import torch
    >>> from maskopt.oracles import PartitionMatroid
    >>> masks = PartitionMatroid(1, (None, 1), "PerColumn")
    >>> masks.lmo_mask(torch.tensor([[3.0, 1.0], [2.0, 5.0]])).tolist()
    [[False, True], [True, False]]
    >>> masks.count((2, 2)), masks.count((3, 4))
    (4, 81)
    """

    _restriction: ClassVar[type[Any]]
    """What `restrict` returns; `maskopt.oracles.restricted`, which imports this module, sets it."""

    def __init__(
        self, keep: float | int | Tensor, tile: Tile, name: str = "PartitionMatroid", *, at_most: bool = False
    ) -> None:
        self._limits = 0, 0  # of counts that differ
        if isinstance(keep, bool) or not isinstance(keep, (int, float, Tensor)):
            raise MaskoptError(f"keep must be a fraction (float) or a count (int); got {shown(keep)}.")
        if isinstance(keep, Tensor):
            if keep.ndim != 1 or keep.dtype not in _COUNTS or keep.device.type == "meta":
                raise MaskoptError(f"keep must be a vector of counts; got a {keep.dtype} tensor of shape {keep.shape}.")
            # Counts are needed as numbers too, and a GPU would have to be waited for.
            keep = keep.cpu()
            self._limits = (int(keep.min()), int(keep.max())) if keep.numel() else (0, 0)
            if self._limits[0] < 0:
                raise MaskoptError(f"keep must not be negative; group {int(keep.argmin())} has {self._limits[0]}.")
        elif isinstance(keep, float) and not 0.0 <= keep <= 1.0:
            raise MaskoptError(f"keep as a fraction must lie in [0, 1]; got {keep}.")
        elif keep < 0:
            raise MaskoptError(f"keep as a count must not be negative; got {keep}.")
        sides("A tile", tile)
        self.keep = keep
        self.tile = tile
        self.name = name
        self.at_most = at_most
        self._elsewhere: dict[torch.device, Tensor] = {}  # counts on other devices, filled on demand

    def __repr__(self) -> str:
        keep = f"{self.keep.numel()} counts" if isinstance(self.keep, Tensor) else self.keep
        group = f", group={self.tile[1]}" if self.tile[0] == 1 and self.tile[1] is not None else ""
        plain = f"{self.name}(keep={keep}{group})"
        return f"AtMost({plain})" if self.at_most else plain

    # Geometry

    def tile_of(self, shape: Shape) -> tuple[int, int]:
        """Return the tile's rows and columns on a weight of this shape.

        Raises
        ------
        MaskoptError
            If the tile does not divide the weight.
        """
        return fitted(self, self.tile, shape)

    def groups(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (groups, entries), groups in row-major order of tiles."""
        height, width = self.tile_of(matrix.shape)
        rows, columns = matrix.shape
        if height == 1 or width == columns:
            return matrix.reshape(-1, height * width)
        tiles = matrix.reshape(rows // height, height, columns // width, width)
        return tiles.transpose(1, 2).reshape(-1, height * width)

    def ungroup(self, groups: Tensor, shape: Shape) -> Tensor:
        """Rearrange (groups, entries) into a matrix of this shape, the inverse of `groups`."""
        height, width = self.tile_of(shape)
        rows, columns = shape
        if height == 1 or width == columns:
            return groups.reshape(rows, columns)
        tiles = groups.reshape(rows // height, columns // width, height, width)
        return tiles.transpose(1, 2).reshape(rows, columns)

    def kept_per_group(self, shape: Shape) -> Tensor:
        """Return how many entries each group keeps, int64, shape (groups,)."""
        return self._counts(shape, torch.device("cpu"))[1]

    def _counts(self, shape: Shape, device: torch.device) -> tuple[int | Tensor, Tensor]:
        """Return the count per group: as an int where it is the same for all, and always as a vector."""
        height, width = self.tile_of(shape)
        size, number = height * width, shape[0] * shape[1] // (height * width)
        if isinstance(self.keep, Tensor):
            if len(self.keep) != number:
                raise MaskoptError(f"{self} has counts for {len(self.keep)} groups; this weight has {number}.")
            if self._limits[1] > size:
                raise MaskoptError(f"{self} wants {self._limits[1]} entries of a group that has {size}.")
            if device.type == "cpu":
                counts = self.keep.to(torch.int64)
            elif device in self._elsewhere:
                counts = self._elsewhere[device]
            else:
                counts = self._elsewhere[device] = self.keep.to(device=device, dtype=torch.int64)
            return counts, counts
        # The tolerance undoes 1 - 0.7 = 0.30000000000000004 and changes no fraction that is exact.
        keep = math.ceil(self.keep * size * (1 - 1e-12)) if isinstance(self.keep, float) else self.keep
        if keep > size:
            raise MaskoptError(f"{self} wants {keep} entries of a group that has {size}.")
        return keep, torch.full((number,), keep, dtype=torch.int64, device=device)

    @property
    def separable(self) -> bool:
        """Whether rows can be solved apart: no group spans two rows."""
        return self.tile[0] == 1

    def row_block(self, shape: Shape) -> int:
        return self.tile_of(shape)[0]

    def check(self, shape: Shape) -> None:
        self.kept_per_group(shape)

    def rows(self, index: Index, shape: Shape) -> PartitionMatroid:
        if not isinstance(self.keep, Tensor):
            return self
        blocks = shape[0] // self.tile_of(shape)[0]
        counts = self.keep.view(blocks, -1)[self._blocks_of(index, shape)].reshape(-1)
        return self._like(counts, self.tile)

    def _like(self, keep: float | int | Tensor, tile: Tile) -> PartitionMatroid:
        """Return a set of the same kind, without fixed entries."""
        return PartitionMatroid(keep, tile, self.name, at_most=self.at_most)

    def _blocks_of(self, index: Index, shape: Shape) -> Tensor:
        """Return the numbers of the row blocks that consist of these rows."""
        height = self.tile_of(shape)[0]
        return torch.arange(shape[0])[index.cpu() if isinstance(index, Tensor) else index][::height] // height

    def rowwise(self, shape: Shape, mask: Tensor | None = None) -> PartitionMatroid:
        """Return the separable subset that fixes how many entries every row of every tile keeps.

        Parameters
        ----------
        shape : (int, int)
            Of the weight.
        mask : Tensor, optional
            A member whose counts are taken; by default each tile's count is spread evenly over its rows.

        Returns
        -------
        PartitionMatroid
            With tiles of one row each.
        """
        height, width = self.tile_of(shape)
        blocks, tiles = shape[0] // height, shape[1] // width
        if mask is not None:
            counts = mask.view(shape[0], tiles, width).sum(2)
        else:
            keep = self.kept_per_group(shape).view(blocks, 1, tiles)
            counts = keep // height + (torch.arange(height).view(1, -1, 1) < keep % height)
        return self._like(counts.reshape(-1), (1, width))

    # Oracles, projection, membership

    def lmo(self, cost: Tensor) -> Tensor:
        return self._select(self.groups(self._fixed(cost)), cost.shape)

    def _fixed(self, cost: Tensor) -> Tensor:
        """Return the cost with that of fixed entries set to minus or plus infinity; here there are none."""
        return cost

    def _select(self, groups: Tensor, shape: Shape, full: Tensor | None = None) -> Tensor:
        """Return the cheapest entries of every group; those marked in `full` (groups, 1) are filled in any case."""
        keep, _ = self._counts(shape, groups.device)
        chosen = smallest(groups, keep, self._limits)
        if self.at_most:
            worth = torch.lt(groups, 0.0, out=torch.empty_like(groups))
            chosen.mul_(worth if full is None else torch.maximum(worth, full))
        return self.ungroup(chosen, shape)

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of minimal cost on the smallest face that contains `x`.

        Parameters
        ----------
        cost, x : Tensor
            Finite, shape (rows, d); `x` in the hull.
        """
        tolerance = face_tolerance(x.dtype)
        # Comparisons and sums of floats: several times faster than booleans and torch.where.
        inside = torch.ge(x, 1.0 - tolerance, out=torch.empty_like(cost))
        outside = torch.le(x, tolerance, out=torch.empty_like(cost))
        far = torch.finfo(cost.dtype).max / 8
        cost = outside.sub_(inside).mul_(2.0 * far).add_(cost.clamp(-far, far))
        if not self.at_most:
            return self.lmo(cost)
        # A full group stays full. The rounding error of a sum grows with the sum.
        _, keep = self._counts(cost.shape, cost.device)
        full = self.groups(x).sum(1, dtype=torch.float64) >= keep - tolerance * (1.0 + keep.double())
        return self._select(self.groups(self._fixed(cost)), cost.shape, full.to(cost.dtype).unsqueeze(1))

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest step size for which x + step * direction stays in the hull, shape (rows,).

        Parameters
        ----------
        x, direction : Tensor
            Shape (rows, d); `x` in the hull. The direction sums to zero over every group, unless groups may keep fewer.
        """
        step = box_step(x, direction)
        if not self.at_most:
            return step
        height, _ = self.tile_of(x.shape)
        _, keep = self._counts(x.shape, x.device)
        change = self.groups(direction)
        rise = change.sum(1, dtype=torch.float64)
        slack = (keep - self.groups(x).sum(1, dtype=torch.float64)).clamp_min_(torch.finfo(torch.float64).tiny)
        # The rounding error of entries that cancel is no rise.
        rises = rise > face_tolerance(x.dtype) * change.abs().sum(1, dtype=torch.float64)
        limit = torch.where(rises, slack / rise, torch.inf).view(len(x) // height, -1).amin(1)
        return torch.minimum(step, limit.repeat_interleave(height).to(step.dtype))

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the hull nearest to `x` (Euclidean), shape (rows, d): see `capped_simplex`.

        Parameters
        ----------
        x : Tensor
            Floating point, finite, shape (rows, d).
        """
        keep, counts = self._counts(x.shape, x.device)
        groups = self.groups(x)
        nearest = capped_simplex(groups, keep)
        if self.at_most:
            boxed = groups.clamp(0.0, 1.0)
            fits = boxed.sum(1, keepdim=True, dtype=torch.float64) <= counts.unsqueeze(1)
            nearest = torch.where(fits, boxed, nearest)
        return self.ungroup(nearest, x.shape)

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> PartitionMatroid:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`.

        Parameters
        ----------
        kept, pruned : Tensor, optional
            Boolean, shape (rows, d).

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """
        if kept is None and pruned is None:
            return self
        return cast(PartitionMatroid, self._restriction(self, kept, pruned))

    def swap_groups(self, shape: Shape) -> Tensor:
        """Return the group of each entry, int64, shape (rows, d); -1 for protected and forbidden ones."""
        height, width = self.tile_of(shape)
        number = torch.arange(shape[0] * shape[1] // (height * width))
        group = self.ungroup(number.unsqueeze(1).expand(-1, height * width), shape).clone()
        for fixed in (self.protected, self.forbidden):
            if fixed is not None:
                group[fixed.cpu()] = -1
        return group

    def neighbours(self, mask: Tensor) -> Iterator[Tensor]:
        """Yield every mask in which one kept entry is exchanged for a pruned one of its group; for small shapes."""
        flat, group = mask.flatten(), self.swap_groups(mask.shape).flatten()
        for number in sorted(set(group[group >= 0].tolist())):
            free = (group == number).to(flat.device).nonzero().flatten()
            for old, new in itertools.product(free[flat[free]].tolist(), free[~flat[free]].tolist()):
                other = flat.clone()
                other[old], other[new] = False, True
                yield other.view(mask.shape)

    def round(self, x: Tensor) -> Tensor:
        """Return the mask nearest to the relaxed mask `x`: the largest entries of each group."""
        if self.at_most:
            return super().round(x)
        return self.lmo_mask(-x.to(torch.promote_types(x.dtype, torch.float32)))

    def contains(self, mask: Tensor) -> bool:
        """Whether a boolean mask keeps the right number in every group."""
        _, keep = self._counts(mask.shape, mask.device)
        kept = self.groups(mask).sum(1)
        return mask.dtype == torch.bool and bool((kept <= keep if self.at_most else kept == keep).all())

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the relaxed mask that is uniform within each group, the mean of all masks."""
        height, width = self.tile_of(shape)
        size, keep = self._free(shape)
        if self.at_most:
            pairs = zip(size.tolist(), keep.tolist(), strict=True)
            keep = torch.tensor([_mean_kept(*pair) for pair in pairs], dtype=torch.float64)
        fraction = (keep.double() / size.clamp_min(1)).to(device=device, dtype=dtype).unsqueeze(1)
        return self.ungroup(fraction.expand(-1, height * width), shape).clone()

    def _free(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return how many entries of each group are free, and how many of these are kept, int64, on the CPU."""
        height, width = self.tile_of(shape)
        keep = self.kept_per_group(shape)
        return torch.full_like(keep, height * width), keep

    def count(self, shape: Shape) -> int:
        """Return the number of masks for a weight of this shape, exactly."""
        free = zip(*(numbers.tolist() for numbers in self._free(shape)), strict=True)
        return math.prod(
            sum(math.comb(size, kept) for kept in range(keep + 1)) if self.at_most else math.comb(size, keep)
            for size, keep in free
        )

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        """Yield every mask, shape (rows, d), in lexicographic order of kept indices; for small shapes."""
        height, width = self.tile_of(shape)
        choices = []
        for keep in self.kept_per_group(shape).tolist():
            sizes = range(keep + 1) if self.at_most else [keep]
            choices.append([kept for size in sizes for kept in itertools.combinations(range(height * width), size)])
        for chosen in itertools.product(*choices):
            groups = torch.zeros((len(chosen), height * width), dtype=torch.bool)
            for group, kept in enumerate(chosen):
                groups[group, list(kept)] = True
            yield self.ungroup(groups, shape)

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        """Return the set's exact LP/MILP formulation for scipy: A x = keep (or <=) on the flattened mask."""
        entries = self.groups(torch.arange(shape[0] * shape[1]).view(shape)).numpy()
        keep = self.kept_per_group(shape).numpy()
        group = np.repeat(np.arange(len(entries)), entries.shape[1])
        matrix = csr_array((np.ones(entries.size), (group, entries.ravel())), shape=(len(entries), entries.size))
        return LinearConstraint(matrix, np.zeros_like(keep) if self.at_most else keep, keep)


@functools.lru_cache
def _mean_kept(size: int, keep: int) -> float:
    """Return how many of `size` entries a mask keeps on average that keeps at most `keep`."""
    kept = np.arange(keep + 1)
    masks = -gammaln(kept + 1) - gammaln(size - kept + 1)  # logarithms of binomials, up to a constant
    weight = np.exp(masks - masks.max())
    return float((kept * weight).sum() / weight.sum())
