"""Euclidean projection of many rows at once onto capped simplices."""

import torch
from torch import Tensor

from maskopt.oracles.select import smallest

__all__ = ["capped_simplex"]

_SHORT = 32  # rows up to this size are stored transposed, entry by entry
_STEPS = 200  # far more than needed: each third one halves the bracket


def capped_simplex(y: Tensor, keep: int | Tensor) -> Tensor:
    """Return the nearest points of the capped simplex {0 <= x <= 1, sum x = keep} (Euclidean), row by row.

    The projection is clip(y + t, 0, 1) with one multiplier t for each row (Wang and Lu, Projection onto the capped
    simplex, arXiv 1503.01002). Relative to the row's keep-th largest entry, t lies in [0, 1]; it is the root of a
    piecewise linear function, found by Newton's method (Ang, Ma, Liu and Wu, Fast projection onto the capped simplex,
    NeurIPS 2021), safeguarded by bisection.

    Parameters
    ----------
    y : Tensor
        Floating point, finite, shape (groups, size).
    keep : int or Tensor
        For all rows or for each, shape (groups,); at most `size`.

    Returns
    -------
    Tensor
        In the type of `y`, shape (groups, size).

    Examples
    --------
    >>> capped_simplex(torch.tensor([[2.0, 0.5, 0.25]]), 1)
    tensor([[1., 0., 0.]])
    >>> capped_simplex(torch.tensor([[2.0, 0.5, 0.25]]), 2)
    tensor([[1.0000, 0.6250, 0.3750]])
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
    # Comparisons that write floats, and arithmetic with them, are much faster than booleans and torch.where.
    flag = torch.empty_like(near)
    for step in range(_STEPS):
        x = (near + t.to(near.dtype)).clamp_(0.0, 1.0)
        missing = total - x.sum(line, keepdim=True, dtype=torch.float64)
        slope = torch.gt(x, 0.0, out=flag).sum(line, keepdim=True)
        slope -= torch.ge(x, 1.0, out=flag).sum(line, keepdim=True)
        torch.maximum(low, t * torch.ge(missing, 0.0, out=torch.empty_like(t)), out=low)
        torch.minimum(high, t + torch.gt(missing, 0.0, out=torch.empty_like(t)), out=high)
        newton = torch.minimum(torch.maximum(t + missing / slope.clamp_min_(1.0), low), high)
        change = (newton - t).abs_()
        if float(change.max()) <= small:
            break
        if step % 3 == 2:
            newton = newton.lerp_(0.5 * (low + high), torch.gt(change, small, out=torch.empty_like(t)))
        t = newton
    x = (near + newton.to(near.dtype)).clamp_(0.0, 1.0).to(y.dtype)
    return x if line == 1 else x.T.contiguous()
