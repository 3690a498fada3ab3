"""Euclidean projection of many rows at once onto capped simplices."""

import torch
from torch import Tensor

from maskopt.oracles.select import smallest

__all__ = ["capped_simplex"]

_SHORT = 32  # rows up to this size are laid out entry by entry
_STEPS = 200  # far more than are ever taken: each third one halves the bracket


def capped_simplex(y: Tensor, keep: int | Tensor) -> Tensor:
    """Return the nearest points of {0 <= x <= 1, sum x = keep}, row by row.

    The answer is clip(y + t, 0, 1) with one t for each row. Seen from the row's keep-th largest entry, t lies in
    [0, 1]; there Newton's method on the piecewise linear sum, kept in a bracket, ends on the right piece.

    Parameters
    ----------
    y : Tensor
        Floating point, finite, shape (groups, size).
    keep : int or Tensor
        For all rows or for each, shape (groups,); at most `size`.
    """
    if y.numel() == 0:
        return y.clone()
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    pivot = torch.where(smallest(-wide, keep) > 0, wide, torch.inf).amin(1, keepdim=True)
    # Entries farther than 1 from the pivot are 0 or 1 whatever t is. The difference of near numbers is exact.
    near = (wide - pivot).clamp_(-1.0, 1.0)
    total = torch.as_tensor(keep, device=y.device).double().expand(len(y)).unsqueeze(1)
    line = 1
    if y.shape[1] <= _SHORT:
        near, total, line = near.T.contiguous().double(), total.T, 0
    t = torch.full_like(total, 0.5)
    low, high = torch.zeros_like(t), torch.ones_like(t)
    small = torch.finfo(wide.dtype).eps
    # Comparisons that write floats, and arithmetic with them, are far faster than booleans and torch.where.
    flag = torch.empty_like(near)
    for step in range(_STEPS):
        x = (near + t.to(near.dtype)).clamp_(0.0, 1.0)
        missing = total - x.sum(line, keepdim=True, dtype=torch.float64)
        moving = torch.gt(x, 0.0, out=flag).sum(line, keepdim=True)
        moving -= torch.ge(x, 1.0, out=flag).sum(line, keepdim=True)
        torch.maximum(low, t * torch.ge(missing, 0.0, out=torch.empty_like(t)), out=low)
        torch.minimum(high, t + torch.gt(missing, 0.0, out=torch.empty_like(t)), out=high)
        newton = torch.minimum(torch.maximum(t + missing / moving.clamp_min_(1.0), low), high)
        change = (newton - t).abs_()
        if float(change.max()) <= small:
            break
        if step % 3 == 2:
            newton = newton.lerp_(0.5 * (low + high), torch.gt(change, small, out=torch.empty_like(t)))
        t = newton
    x = (near + newton.to(near.dtype)).clamp_(0.0, 1.0).to(y.dtype)
    return x if line == 1 else x.T.contiguous()
