"""Selection of the k smallest entries of each row: exactly k, ties to the lower index."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["smallest"]

# Rows up to this size are ranked by comparing all pairs. Of few rows that is three calls of torch for each pair, which
# take twice the time of a selection from size 6 on, and twenty times at size 16.
_RANKED = 16
_FEW, _TINY = 1024, 4


def smallest(cost: Tensor, keep: int | Tensor, limits: tuple[int, int] | None = None) -> Tensor:
    """Mark the `keep` smallest entries of each row.

    Parameters
    ----------
    cost : Tensor
        Shape (groups, size), no NaN.
    keep : int or Tensor
        How many, for all rows or for each, shape (groups,).
    limits : (int, int), optional
        The least and the largest number of a tensor `keep`, where they are known: a GPU would have to be waited for.

    Returns
    -------
    Tensor
        Indicator (0 or 1) in the type of `cost`, shape (groups, size), exactly `keep` ones per row; among equal
        entries the lower index is chosen, on every device. It is floating point because solvers need floats, and
        because comparisons that write floats are several times faster than those that write booleans.

    Examples
    --------
    >>> smallest(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 2)
    tensor([[0., 1., 1.],
            [1., 1., 0.]])
    """
    size = cost.shape[1]
    if isinstance(keep, Tensor):
        if limits is None:
            limits = (int(keep.min()), int(keep.max())) if len(keep) else (0, 0)
        low, high = limits
        if low != high:
            return _smallest_varying(cost, keep, low, high)
        keep = low
    if keep <= 0:
        return torch.zeros_like(cost)
    if keep >= size:
        return torch.ones_like(cost)
    few = cost.device.type == "cpu" and len(cost) <= _FEW
    if size <= (_TINY if few else _RANKED):
        return _smallest_by_rank(cost, keep)
    return _up_to(cost, _kth_smallest(cost, keep), keep)


def _smallest_varying(cost: Tensor, keep: Tensor, low: int, high: int) -> Tensor:
    # Each row gets high - low more entries, of which high - keep are -inf and the rest +inf: with them every row has
    # `high` entries to select, and one call selects them.
    extra = torch.arange(high - low, device=cost.device) < (high - keep).unsqueeze(1)
    extra = torch.where(extra, -torch.inf, torch.inf).to(cost.dtype)
    return _up_to(cost, _kth_smallest(torch.cat((extra, cost), 1), high), keep.unsqueeze(1))


def _kth_smallest(cost: Tensor, k: int) -> Tensor:
    """Return the k-th smallest entry of each row, shape (rows, 1)."""
    if cost.device.type == "cpu" and cost.dtype in (torch.float32, torch.float64):
        # numpy's vectorised quickselect takes a tenth of torch.topk's time.
        return torch.from_numpy(np.partition(cost.detach().numpy(), k - 1, axis=1)[:, k - 1 : k])
    return torch.topk(cost, k, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def _up_to(cost: Tensor, threshold: Tensor, keep: int | Tensor) -> Tensor:
    """Mark entries below the threshold and, in index order, as many equal to it as are missing."""
    chosen = torch.le(cost, threshold, out=torch.empty_like(cost))
    # Integers as floats: exact below 2^24 in float32, and not even below 2^9 in half precision.
    wide = torch.float64 if cost.shape[1] >= 2**24 else torch.promote_types(cost.dtype, torch.float32)
    surplus = chosen.sum(1, keepdim=True, dtype=wide) - keep
    # Ties are rare. Looking for them takes longer than asking a CPU whether there are any, but less than waiting for a
    # GPU's answer.
    if cost.device.type == "cpu" and not bool(surplus.any()):
        return chosen
    tied = cost == threshold
    wanted = tied.sum(1, keepdim=True) - surplus.long()
    return chosen.masked_fill_(tied & (tied.cumsum(1) > wanted), 0.0)


def _smallest_by_rank(cost: Tensor, keep: int) -> Tensor:
    # One contiguous vector per position: a comparison per pair instead of a sort per tiny row.
    columns = cost.T.contiguous().unbind(0)
    ranks = torch.empty((len(columns), len(cost)), dtype=cost.dtype, device=cost.device)
    rank = ranks.unbind(0)
    for i in range(len(columns)):
        rank[i].fill_(len(columns) - 1 - i)  # as if all later entries were smaller
    first = torch.empty_like(rank[0])
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            torch.le(columns[i], columns[j], out=first)
            rank[j].add_(first)
            rank[i].sub_(first)
    return ranks.lt_(keep).T.contiguous()
