"""Euclidean projection of many rows at once onto capped simplices."""

import torch
from torch import Tensor

from maskopt.oracles.select import smallest

__all__ = ["capped_simplex"]

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
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    pivot = torch.where(smallest(-wide, keep) > 0, wide, torch.inf).amin(1, keepdim=True)
    # Entries farther than 1 from the pivot are 0 or 1 whatever t is. The difference of near numbers is exact.
    near = (wide - pivot).clamp_(-1.0, 1.0)
    total = torch.as_tensor(keep, device=y.device).double().expand(len(y)).unsqueeze(1)
    t = torch.full_like(total, 0.5)
    low, high = torch.zeros_like(t), torch.ones_like(t)
    small = torch.finfo(wide.dtype).eps
    for step in range(_STEPS):
        x = (near + t.to(wide.dtype)).clamp_(0.0, 1.0)
        missing = total - x.sum(1, keepdim=True, dtype=torch.float64)
        moving = ((x > 0) & (x < 1)).sum(1, keepdim=True).clamp_min_(1)
        low, high = torch.where(missing >= 0, t, low), torch.where(missing <= 0, t, high)
        newton = t + missing / moving
        done = (newton - t).abs() <= small
        trusted = (newton > low) & (newton < high) & (step % 3 < 2)
        t = torch.where(done, newton, torch.where(trusted, newton, 0.5 * (low + high)))
        if bool(done.all()):
            break
    return (near + t.to(wide.dtype)).clamp_(0.0, 1.0).to(y.dtype)
