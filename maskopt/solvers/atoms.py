"""Active vertices of a batch of points, as indices of the entries they keep."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Atoms"]


class Atoms:
    """Convex combinations of vertices, one for each row block.

    A slot holds a vertex as the sorted flat indices of its entries, int32, with a weight; weight 0 frees the
    slot. One more entry per row block, always zero, fills up vertices with fewer entries than the widest.

    Parameters
    ----------
    vertices : Tensor
        Zeros and ones, shape (row blocks, entries): the first vertex of each row block, at weight 1.
    """

    def __init__(self, vertices: Tensor) -> None:
        self.blocks, self.entries = vertices.shape
        random = torch.Generator().manual_seed(0)
        # A vertex is recognised by the sum of its entries' random 64-bit keys.
        keys = torch.randint(-(2**62), 2**62, (self.entries,), generator=random)
        self._keys = torch.cat((keys, torch.zeros(1, dtype=torch.int64))).to(vertices.device)
        index = self._listed(vertices)
        self.index = index.unsqueeze(1)
        self.name = self._named(index).unsqueeze(1)
        self.weight = torch.ones((self.blocks, 1), dtype=torch.float64, device=vertices.device)
        self.matrix: Tensor | None = None
        """Inner products of the atoms, shape (row blocks, slots, slots), where the direction rule keeps them."""

    @property
    def active(self) -> Tensor:
        """Number of vertices with weight, per row block."""
        return (self.weight > 0).sum(1)

    def scores(self, values: Tensor) -> Tensor:
        """Return <values, vertex> for every slot: (row blocks, entries) -> (row blocks, slots), float64."""
        padded = torch.cat((values, values.new_zeros((self.blocks, 1))), 1).view(-1)
        picked = padded.index_select(0, self.index.view(-1)).view(self.index.shape)
        return picked.sum(2).double()  # summing into another type takes seven times as long

    def best(self, scores: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme score among active vertices and its slot, per row block."""
        worst = -torch.inf if largest else torch.inf
        among = torch.where(self.weight > 0, scores, worst)
        found = among.max(1) if largest else among.min(1)
        return found.values, found.indices

    def dense(self, slot: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the vertices in one slot per row block as zeros and ones, shape (row blocks, entries)."""
        index = self.index[self._every, slot].view(-1).long()
        ones = torch.zeros(self.blocks * (self.entries + 1), dtype=dtype, device=index.device).index_fill_(
            0, index, 1.0
        )
        return ones.view(self.blocks, -1)[:, :-1]

    def combined(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return sum of weight (row blocks, slots) times vertices, shape (row blocks, entries)."""
        sums = torch.zeros(self.blocks * (self.entries + 1), dtype=torch.float64, device=weight.device)
        spread = weight.unsqueeze(2).expand(self.index.shape).reshape(-1)
        sums.index_add_(0, self.index.view(-1), spread)
        return sums.view(self.blocks, -1)[:, :-1].to(dtype)

    def weight_of(self, slot: Tensor) -> Tensor:
        """Return the weight in one slot per row block."""
        return self.weight.gather(1, slot.unsqueeze(1)).squeeze(1)

    def add(self, vertices: Tensor, weight: Tensor, where: Tensor | None = None) -> Tensor:
        """Add weight to vertices, in a slot they have or a free one; return the slots.

        Parameters
        ----------
        vertices : Tensor
            Zeros and ones, shape (row blocks, entries).
        weight : Tensor
            Shape (row blocks,); where it is 0 a vertex that is new takes no slot.
        where : Tensor, optional
            Row blocks, boolean, that get a slot whatever the weight.
        """
        index = self._listed(vertices)
        name = self._named(index)
        known = (self.name == name.unsqueeze(1)) & (self.weight > 0)
        has, slot = known.max(1)
        new = ~has & ((weight > 0) if where is None else where)
        if bool((new & (self.weight > 0).all(1)).any()):
            self._grow()
            # Growing has put vertices into other slots.
            known = (self.name == name.unsqueeze(1)) & (self.weight > 0)
            slot = known.max(1).indices
        slot = torch.where(new, (self.weight <= 0).int().argmax(1), slot)
        blocks = new.nonzero().squeeze(1)
        if len(blocks):
            if index.shape[1] > self.index.shape[2]:
                self._widen(index.shape[1])
            self.index[blocks, slot[blocks]] = self._padding(blocks)
            self.index[blocks, slot[blocks], : index.shape[1]] = index[blocks]
            self.name[blocks, slot[blocks]] = name[blocks]
        self.weight.scatter_add_(1, slot.unsqueeze(1), torch.where(has | new, weight, 0.0).double().unsqueeze(1))
        return slot

    def empty(self, slot: Tensor, where: Tensor) -> None:
        """Free one slot per row block in the row blocks `where`."""
        left = self.weight_of(slot).masked_fill(where, 0.0)
        self.weight.scatter_(1, slot.unsqueeze(1), left.unsqueeze(1))

    def shift(self, slot: Tensor, weight: Tensor) -> None:
        """Add weight to one slot per row block."""
        self.weight.scatter_add_(1, slot.unsqueeze(1), weight.unsqueeze(1))

    def settle(self) -> None:
        """Free slots of no weight to speak of and make the others sum to 1."""
        self.weight *= self.weight > 1e-14
        self.weight /= self.weight.sum(1, keepdim=True)

    def take(self, blocks: Tensor) -> Atoms:
        """Return the atoms of some row blocks."""
        part = object.__new__(Atoms)
        part.blocks, part.entries, part._keys = len(blocks), self.entries, self._keys
        offset = (torch.arange(len(blocks), device=blocks.device) - blocks) * (self.entries + 1)
        part.index = self.index[blocks] + offset.view(-1, 1, 1).int()
        part.name, part.weight = self.name[blocks], self.weight[blocks]
        part.matrix = None if self.matrix is None else self.matrix[blocks]
        return part

    @property
    def _every(self) -> Tensor:
        return torch.arange(self.blocks, device=self.index.device)

    def _offset(self) -> Tensor:
        """Return where each row block's entries begin, shape (row blocks, 1)."""
        return (self._every * (self.entries + 1)).unsqueeze(1)

    def _padding(self, blocks: Tensor) -> Tensor:
        """Return the flat index of the zero of some row blocks, shape (row blocks, 1)."""
        return (blocks * (self.entries + 1) + self.entries).int().unsqueeze(1)

    def _listed(self, vertices: Tensor) -> Tensor:
        """Return the flat indices of the ones, int32, shape (row blocks, most ones of any row block), padded."""
        counts = vertices.sum(1, dtype=torch.float64).long()
        most = int(counts.max())
        rows, columns = vertices.nonzero(as_tuple=True)
        flat = (rows * (self.entries + 1) + columns).int()
        if int(counts.min()) == most:
            return flat.view(self.blocks, most)
        listed = self._padding(torch.arange(self.blocks, device=vertices.device)).repeat(1, most)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(rows), device=rows.device) - first[rows]
        listed[rows, place] = flat
        return listed

    def _named(self, index: Tensor) -> Tensor:
        return self._keys[index.long() - self._offset()].sum(1)

    def _grow(self) -> None:
        """Bring active vertices to the front and add free slots."""
        order = (self.weight > 0).int().argsort(stable=True, dim=1, descending=True)
        most = int(self.active.max())
        slots = most + max(4, most // 2)
        order = order[:, :most]
        self.weight = torch.nn.functional.pad(self.weight.gather(1, order), (0, slots - most))
        self.name = torch.nn.functional.pad(self.name.gather(1, order), (0, slots - most))
        rows = self._every.unsqueeze(1)
        padding = self._padding(self._every).unsqueeze(1).expand(-1, slots - most, self.index.shape[2])
        self.index = torch.cat((self.index[rows, order], padding), 1)
        if self.matrix is not None:
            matrix = self.matrix[rows.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)]
            self.matrix = torch.nn.functional.pad(matrix, (0, slots - most, 0, slots - most))

    def _widen(self, width: int) -> None:
        """Widen the slots for vertices with more entries."""
        missing = width - self.index.shape[2]
        padding = self._padding(self._every).unsqueeze(1).expand(-1, self.index.shape[1], missing)
        self.index = torch.cat((self.index, padding), 2)
