"""Fixing by reduced costs: entries whose other value cannot lead to anything better."""

import torch
from torch import Tensor

from maskopt.oracles import PartitionMatroid, Restricted

__all__ = ["fixable"]


def fixable(
    masks: PartitionMatroid, gradient: Tensor, vertex: Tensor, fixed: Restricted, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """Return which entries must be kept and which pruned in any mask worth having.

    The linear model at a relaxed point bounds every mask from below by its value at the cheapest vertex, `bound`. Among
    the masks with entry j flipped the cheapest costs more by an exchange inside j's group: the best entry left out
    comes in for j, or j for the worst entry taken. If that lifts the bound above what is known, j stays as the vertex
    has it. Only differences of the gradient within groups count: adding a constant to it changes nothing, unlike
    the rule that compares |gradient_j| with the gap, which is wrong for groups of fixed size.

    Parameters
    ----------
    masks : PartitionMatroid
        The groups, all fixed entries apart; groups that need not be full fix nothing.
    gradient : Tensor
        Of the convex objective at the relaxed point, float64, shape (rows, d).
    vertex : Tensor
        The cheapest mask of `fixed`, boolean or zeros and ones, shape (rows, d).
    fixed : Restricted
        The masks in question.
    slack : Tensor
        Known error minus bound, per row; exchanges that cost more are not worth having.

    Returns
    -------
    keep, prune : Tensor
        Boolean, shape (rows, d); entries already fixed may be among them.
    """
    if masks.at_most:
        nothing = torch.zeros_like(vertex, dtype=torch.bool)
        return nothing, nothing.clone()
    cost, chosen = masks.groups(gradient), masks.groups(vertex) > 0
    nothing = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
    held = masks.groups(nothing if fixed.protected is None else fixed.protected)
    banned = masks.groups(nothing if fixed.forbidden is None else fixed.forbidden)
    worst_taken = cost.masked_fill(~chosen | held, -torch.inf).amax(1, keepdim=True)
    best_left = cost.masked_fill(chosen | banned, torch.inf).amin(1, keepdim=True)
    # The rounding of a difference of gradients, which slack of its size must not decide.
    noise = 2.0**-48 * cost.abs().amax(1, keepdim=True)
    limit = masks.groups(slack.unsqueeze(1).expand(gradient.shape)) + noise
    keep = chosen & (best_left - cost > limit)
    prune = ~chosen & (cost - worst_taken > limit)
    return masks.ungroup(keep, gradient.shape), masks.ungroup(prune, gradient.shape)
