"""The best swap of each row, found exactly without looking at all pairs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.solvers.swaps import pair_change, single_changes

__all__ = ["SwapSearch"]

_DENSE = 16  # segments up to this width are searched by looking at all pairs
_CANDIDATES = 16  # per side, for a first good swap that bounds the rest away
_BINS = 24  # of the bounding function
_TOGETHER = 16  # rows whose surviving pairs a CPU looks at together: more are padded more
# Entries of a temporary: what a CPU keeps near itself, and what other devices need to be busy for longer than a call.
_BLOCK, _LARGE_BLOCK = 2**22, 2**24


class SwapSearch:
    """Finds improving swaps for masks of one problem.

    A swap changes the error by A_j + B_i - 2 w_i w_j G_ij (`maskopt.solvers.swaps`). Entries of one row that lie in one
    group form a segment of consecutive columns. For wide segments a pair is looked at only if it can win: with
    s_i = |w_i| sqrt(G_ii) and rho_j the largest correlation of input j with another one, |w_i w_j G_ij| <=
    rho_j s_i s_j, so no partner can bring j below A_j + min_i (B_i - 2 rho_j s_j s_i).

    Parameters
    ----------
    problem : LayerReconstruction
    masks : PartitionMatroid
    margin : float
        Swaps within a row have to gain more than this fraction of its error, swaps across rows a tenth of it: what is
        below is left to a problem in float64.
    """

    def __init__(self, problem: LayerReconstruction, masks: PartitionMatroid, margin: float = 1e-6) -> None:
        self.margin = margin
        self.noise: Tensor | None = None
        """Proven rounding errors of the cost of every entry, shape (rows, d), where they are known."""
        self.weight, self.gram = problem.scaled_weight, problem.scaled_gram.contiguous()
        height, self.width = masks.tile_of(problem.shape)
        self.height = height
        self.columns = problem.shape[1]
        self.segments = self.columns // self.width
        self.own = problem.diagonal()
        self.eps = 8 * torch.finfo(problem.dtype).eps
        device = problem.device
        # Elsewhere the number of calls counts: of the bounding function's bins each takes one for many rows.
        limits = (_BLOCK, _BINS, _TOGETHER) if device.type == "cpu" else (_LARGE_BLOCK, 1, _LARGE_BLOCK)
        self.block, self.bins, self.together = limits
        self.protected, self.forbidden = (
            None if entries is None else entries.to(device) for entries in (masks.protected, masks.forbidden)
        )
        if 1 < self.width <= _DENSE:
            index = torch.arange(self.columns, device=device).view(self.segments, self.width)
            self.blocks = self.gram[index.unsqueeze(2), index.unsqueeze(1)]
        elif self.width > _DENSE:
            # A little more than the largest correlation, so that rounding cannot bound a winner away.
            sizes = problem.entry_sizes().to(problem.dtype)
            self.size = self.weight.abs() * sizes
            self.reach = _largest_correlation(self.gram, sizes, self.block).mul_(1.0001) * self.size

    def step(self, kept: Tensor, carried: Tensor, dirty: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return swaps that may be done at once: at most one change per row, each improving.

        Parameters
        ----------
        kept : Tensor
            The mask, boolean, shape (rows, d).
        carried : Tensor
            (T - W * mask) G, shape (rows, d).
        dirty : Tensor
            Rows to search, boolean, shape (rows,); changed in place to the rows that changed or have to be
            searched again.

        Returns
        -------
        rows, add, drop_rows, drop : Tensor
            Swap n keeps entry (rows[n], add[n]) and prunes entry (drop_rows[n], drop[n]). Empty: none improves.
        """
        found = self._within_rows(kept, carried, dirty)
        if self.height == 1:
            return found
        return self._across_rows(kept, carried, dirty, found)

    def doubtful(self, kept: Tensor, carried: Tensor) -> Tensor:
        """Return rows in which the best swap, all rounding errors in its favour, would lower the error, boolean.

        Where `noise` is proven no swap within any other row improves.
        """
        found = torch.zeros(len(kept), dtype=torch.bool, device=kept.device)
        if self.width == 1:
            return found
        per_row = self.columns * (self.width if self.width <= _DENSE else self.bins)
        for part in torch.split(torch.arange(len(kept), device=kept.device), max(1, self.block // per_row)):
            add_cost, drop_cost, error = self.costs(part, kept, carried)
            search = self._all_pairs if self.width <= _DENSE else self._bounded_pairs
            found[part] = search(part, add_cost - error, drop_cost - error)[0] < 0
        return found

    def costs(self, index: Tensor, kept: Tensor, carried: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B (infinite where not allowed) and the rounding error of either, for some rows."""
        mask, own = kept[index], self.own[index]
        add, drop, size = single_changes(self.weight[index], carried[index], own)
        error = self.eps * size if self.noise is None else self.noise[index]
        movable = mask if self.protected is None else mask & ~self.protected[index]
        closed = mask if self.forbidden is None else mask | self.forbidden[index]
        return torch.where(closed, torch.inf, add), torch.where(movable, drop, torch.inf), error

    def _within_rows(self, kept: Tensor, carried: Tensor, dirty: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = dirty.nonzero().flatten()
        if self.width == 1 or len(index) == 0:
            dirty.zero_()
            return index[:0], index[:0], index[:0], index[:0]
        per_row = self.columns * (self.width if self.width <= _DENSE else self.bins)
        adds, drops, better = [], [], []
        for part in torch.split(index, max(1, self.block // per_row)):
            add_cost, drop_cost, error = self.costs(part, kept, carried)
            search = self._all_pairs if self.width <= _DENSE else self._bounded_pairs
            change, add, drop = search(part, add_cost, drop_cost)
            noise = error.gather(1, add.unsqueeze(1)) + error.gather(1, drop.unsqueeze(1))
            current = torch.where(kept[part], 0.0, self.weight[part] * carried[part]).sum(1)
            better.append(change < -noise.squeeze(1) - self.margin * current.clamp_min(0))
            adds.append(add)
            drops.append(drop)
        improves = torch.cat(better)
        dirty.zero_()
        rows = index[improves]
        dirty[rows] = True
        return rows, torch.cat(adds)[improves], rows, torch.cat(drops)[improves]

    def _all_pairs(self, index: Tensor, add_cost: Tensor, drop_cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight[index].view(len(index), self.segments, self.width)
        alone = add_cost.view_as(weight).unsqueeze(3), drop_cost.view_as(weight).unsqueeze(2)
        change = pair_change(self.blocks, (weight.unsqueeze(3), weight.unsqueeze(2)), alone)
        best, place = change.flatten(1).min(1)
        segment, pair = place // self.width**2, place % self.width**2
        return best, segment * self.width + pair // self.width, segment * self.width + pair % self.width

    def _bounded_pairs(self, index: Tensor, add_cost: Tensor, drop_cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(index) * self.segments, self.width)
        a, b = add_cost.view(shape), drop_cost.view(shape)
        size, reach = self.size[index].view(shape), self.reach[index].view(shape)
        weight = self.weight[index].view(shape)
        offset = (torch.arange(shape[0], device=index.device) % self.segments * self.width).view(-1, 1)
        few = min(_CANDIDATES, self.width)
        first = self._among(
            weight, a, b, a.topk(few, largest=False).indices, b.topk(few, largest=False).indices, offset
        )
        bar = first[0].clamp(max=0.0).unsqueeze(1)
        can_add = a + _least(b, size, reach, self.bins) < bar
        can_drop = b + _least(a, size, reach, self.bins) < bar
        counts = torch.stack((can_add.sum(1), can_drop.sum(1)))
        best = list(first)
        # Rows with like numbers of survivors go together, so that little is padded.
        order = counts.prod(0).argsort()
        order = order[counts.prod(0)[order] > 0]
        for part, most in self._groups(order, counts):
            adds, drops = _listed(can_add[part], most[0]), _listed(can_drop[part], most[1])
            found = self._among(weight[part], a[part], b[part], adds, drops, offset[part])
            wins = found[0] < first[0][part]
            for all_rows, here in zip(best, found, strict=True):
                all_rows[part] = torch.where(wins, here, all_rows[part])
        change = best[0].view(-1, self.segments)
        value, segment = change.min(1)
        pick = torch.arange(len(index), device=index.device) * self.segments + segment
        return value, best[1][pick] + segment * self.width, best[2][pick] + segment * self.width

    def _groups(self, order: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
        """Cut an order of rows into groups that are looked at together, with the most survivors of either side."""
        sizes = counts[:, order].cpu()
        start = 0
        while start < len(order):
            most = sizes[:, start : start + self.together].cummax(1).values
            fits = most.prod(0) * torch.arange(1, most.shape[1] + 1) <= self.block
            length = max(1, int(fits.sum()))
            yield order[start : start + length], most[:, length - 1].tolist()
            start += length

    def _among(
        self, weight: Tensor, a: Tensor, b: Tensor, adds: Tensor, drops: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best swap among listed candidates: change, index to add, index to drop, each (rows,)."""
        # Flat, sorted indices: the gather reads memory in order.
        places = ((adds + offset) * self.columns).unsqueeze(2) + (drops + offset).unsqueeze(1)
        change = self.gram.view(-1).index_select(0, places.view(-1)).view(places.shape)
        weights = weight.gather(1, adds).unsqueeze(2), weight.gather(1, drops).unsqueeze(1)
        alone = a.gather(1, adds).unsqueeze(2), b.gather(1, drops).unsqueeze(1)
        change = pair_change(change, weights, alone, out=change)
        best, place = change.flatten(1).min(1)
        add = adds.gather(1, (place // drops.shape[1]).unsqueeze(1)).squeeze(1)
        drop = drops.gather(1, (place % drops.shape[1]).unsqueeze(1)).squeeze(1)
        return best, add, drop

    def _across_rows(
        self, kept: Tensor, carried: Tensor, dirty: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pair rows that gain most by one entry more with rows that lose fewest by one less, in the same tile."""
        rows, add, drop_rows, drop = found
        every = torch.arange(len(kept), device=kept.device)
        add_cost, drop_cost, error = self.costs(every, kept, carried)
        blocks = (len(kept) // self.height, self.height, self.segments)
        best_add, at_add = add_cost.view(len(kept), self.segments, self.width).min(2)
        best_drop, at_drop = drop_cost.view(len(kept), self.segments, self.width).min(2)
        offset = torch.arange(self.segments, device=kept.device) * self.width
        at_add, at_drop = at_add + offset, at_drop + offset
        noisy = best_add + error.gather(1, at_add), best_drop + error.gather(1, at_drop)
        gain, loss = noisy[0].view(blocks), noisy[1].view(blocks)
        # Of each row block of tiles the one with the best pair of different rows is served; rows appear once.
        pairs = _best_different(gain, loss)
        tile = pairs[0].argmin(1)
        bands_index = torch.arange(blocks[0], device=kept.device)
        gain, loss = gain[bands_index, :, tile], loss[bands_index, :, tile]
        order = (gain - loss).nan_to_num(0.0).argsort(1)
        half = self.height // 2
        takers = order[:, :half].gather(1, gain.gather(1, order[:, :half]).argsort(1))
        givers = order[:, half : 2 * half].gather(1, loss.gather(1, order[:, half : 2 * half]).argsort(1))
        current = torch.where(kept, 0.0, self.weight * carried).sum().clamp_min(0)
        bar = -0.1 * self.margin * current / len(kept)
        good = gain.gather(1, takers) + loss.gather(1, givers) < bar
        # The halves may miss the best pair (both rows in one half): then that single pair is done.
        single = ~good.any(1) & (pairs[0].amin(1) < bar)
        base = bands_index * self.height
        takers, givers = (takers + base.unsqueeze(1))[good], (givers + base.unsqueeze(1))[good]
        pick = bands_index[single], tile[single]
        takers = torch.cat((takers, (pairs[1][pick] + base[single])))
        givers = torch.cat((givers, (pairs[2][pick] + base[single])))
        busy = torch.zeros_like(dirty)
        busy[takers] = True
        busy[givers] = True
        free = ~busy[rows]
        tile_of_row = tile.repeat_interleave(self.height)
        dirty |= busy
        return (
            torch.cat((rows[free], takers)),
            torch.cat((add[free], at_add[takers, tile_of_row[takers]])),
            torch.cat((drop_rows[free], givers)),
            torch.cat((drop[free], at_drop[givers, tile_of_row[givers]])),
        )


def _largest_correlation(gram: Tensor, size: Tensor, entries: int) -> Tensor:
    """Return max_(i != j) |G_ij| / (r_i r_j) for every j, at most 1, given sizes r; shape (d,); 0 for dead inputs."""
    inverse = torch.where(size > 0, 1 / size, 0.0)
    largest = torch.zeros_like(size)
    for part in torch.split(torch.arange(len(gram), device=gram.device), max(1, entries // len(gram))):
        block = gram[part].abs_().mul_(inverse)
        block[torch.arange(len(part), device=gram.device), part] = 0.0
        largest[part] = block.amax(1) * inverse[part]
    return largest.clamp_(max=1.0)


def _listed(flags: Tensor, most: int) -> Tensor:
    """Return the indices of the set flags in rising order, rows filled up with others, shape (rows, most)."""
    return flags.to(torch.uint8).topk(most).indices.sort(1).values


def _least(cost: Tensor, size: Tensor, reach: Tensor, together: int) -> Tensor:
    """Return a lower bound of min_i (cost_i - 2 reach_j size_i) for every j, shape (rows, d).

    The minimum falls as reach grows, so it is computed at the upper edges of bins of reach, some bins together.
    """
    top = reach.amax(1, keepdim=True)
    edges = torch.linspace(0.0, 1.0, _BINS + 1, device=cost.device, dtype=cost.dtype)[1:].square() * top
    cost, size = cost.unsqueeze(1), size.unsqueeze(1)
    minimum = torch.cat(
        [(cost - (2.0 * some).unsqueeze(2) * size).amin(2) for some in torch.split(edges, together, 1)], 1
    )
    bin_index = (reach / top.clamp_min(torch.finfo(cost.dtype).tiny)).sqrt_().mul_(_BINS).ceil_().sub_(1)
    return minimum.gather(1, bin_index.clamp_(0, _BINS - 1).long())


def _best_different(gain: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest gain_r + loss_s over rows r != s for (row blocks, rows, tiles), with r and s."""
    count = min(2, gain.shape[1])
    low_gain, low_loss = gain.topk(count, 1, largest=False), loss.topk(count, 1, largest=False)
    if count < 2:
        nothing = torch.full_like(low_gain.values[:, 0], torch.inf)
        return nothing, low_gain.indices[:, 0], low_loss.indices[:, 0]
    clash = low_gain.indices[:, 0] == low_loss.indices[:, 0]
    with_second_gain = low_gain.values[:, 1] + low_loss.values[:, 0]
    with_second_loss = low_gain.values[:, 0] + low_loss.values[:, 1]
    use_gain = clash & (with_second_gain <= with_second_loss)
    use_loss = clash & ~use_gain
    value = low_gain.values[:, 0] + low_loss.values[:, 0]
    value = torch.where(use_gain, with_second_gain, torch.where(use_loss, with_second_loss, value))
    return (
        value,
        torch.where(use_gain, low_gain.indices[:, 1], low_gain.indices[:, 0]),
        torch.where(use_loss, low_loss.indices[:, 1], low_loss.indices[:, 0]),
    )
