"""Rounding: from a relaxed mask, a point of the hull, to masks of the set.

Every rule ends in an oracle call, so that its answer lies in the set whatever the input, and every rule leaves masks as
they are. Which of several masks is best is decided by float64 evaluations (`best`); a mask that an oracle returned
during the iterations is as good a candidate as a rounded point.
"""

import itertools
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from maskopt.oracles import HasGroups, MaskSet, face_tolerance
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.blocks import block_errors
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import row_block_of

__all__ = ["WEIGHTS", "best", "best_of", "best_weight", "dependent", "gradient_aware", "lemma2_slack", "top_k"]

WEIGHTS = (0.0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
"""Weights of the gradient worth trying; the first is `top_k`."""

_NEEDS_GROUPS = Requirements(masks=(HasGroups,))


def top_k(masks: MaskSet, x: Tensor) -> Tensor:
    """Return the mask nearest to the relaxed mask `x`, boolean, shape (rows, d): the largest entries of each group."""
    return masks.round(x)


def gradient_aware(masks: MaskSet, x: Tensor, gradient: Tensor, weight: float = 1 / 256) -> Tensor:
    """Return the mask nearest to x - eta * gradient: of nearly equal entries those whose pruning costs most are kept.

    It minimises <gradient, m> + |m - x|^2 / (2 eta) over masks m, a first-order model and a proximity term, since
    m^2 = m. eta is `weight` over the spread of a row block's gradient: the mean distance of entries from their mean,
    both weighted by x (1 - x), as only undecided entries compete. Scaling the objective, or adding a constant to the
    gradient where groups keep fixed numbers, changes nothing, and a row block that is a mask already stays.

    At a minimiser of a convex relaxation the gradient is constant on a group's fractional entries and orders none of
    them; short of one it says which entries still rise. The gradient of `problem.shifted(problem.diagonal())` knows
    the curvature of each entry besides, and harms less where the weight is too large.

    Parameters
    ----------
    masks : MaskSet
        The set.
    x, gradient : Tensor
        A relaxed mask and the gradient there, finite, shape (rows, d).
    weight : float
        0 rounds as `top_k` does.

    Returns
    -------
    Tensor
        Boolean, shape (rows, d).
    """
    blocks = gradient.double().reshape(-1, masks.row_block(x.shape) * x.shape[1])
    fraction = x.double().reshape(blocks.shape)
    open_ = (fraction * (1.0 - fraction) - _tolerance(x)).clamp_(min=0.0)
    open_ /= open_.sum(1, keepdim=True)
    mean = (open_ * blocks).sum(1, keepdim=True)
    spread = (open_ * (blocks - mean).abs_()).sum(1, keepdim=True)
    spread *= spread > 1e-12 * blocks.abs().amax(1, keepdim=True)  # less is the rounding of the mean
    # A row block without spread, or without open entries (0 / 0), has no preference and no eta.
    eta = (weight / spread).nan_to_num_(0.0, 0.0, 0.0)
    return masks.round((fraction - eta * blocks).view_as(x))


def best_weight(
    problem: Problem, masks: MaskSet, x: Tensor, gradient: Tensor, weights: Iterable[float] = WEIGHTS
) -> Tensor:
    """Return, for each row block, the best mask of `gradient_aware` over some weights; never worse than any of them."""
    return _best(problem, masks, (gradient_aware(masks, x, gradient, weight) for weight in weights))[0]


def dependent(
    masks: MaskSet,
    x: Tensor,
    generator: torch.Generator,
    samples: int | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Draw masks whose mean is `x`: dependent rounding by the pivotal method.

    A pivot step takes two fractional entries of a group: one of them becomes 0 or 1, the other takes over the rest of
    their sum, with the probabilities that keep both means (the pivotal method of Deville and Tillé, Biometrika 85(1),
    1998; Srinivasan, FOCS 2001). As every pivot step keeps the group's sum, counts come out exactly, and entries of a
    group are negatively correlated. Pivot steps are arranged as a binary tree, so that all groups take log2(entries)
    steps together. A group that need not be full, and whose sum is fractional, ends with the sum rounded up or down.

    Parameters
    ----------
    masks : MaskSet
        A set with the methods of `HasGroups`.
    x : Tensor
        A point of the hull, shape (rows, d). An entry within `face_tolerance` of 0 or 1 is decided and stays there.
    generator : torch.Generator
        Source of all randomness; drawn from on its own device, so that equal seeds give equal masks everywhere.
    samples : int, optional
        Draw so many masks at once.
    order : Tensor, optional
        Shape (rows, d): within each group entries are paired in rising order of it, neighbours first, so that of two
        neighbours rarely both are kept or pruned. Random by default, anew for every sample.

    Returns
    -------
    Tensor
        Boolean, shape (rows, d), or (samples, rows, d).

    Raises
    ------
    MaskoptError
        If the set has no groups.
    """
    _NEEDS_GROUPS.check_set(masks, "dependent rounding")
    groups = cast(HasGroups, masks)
    number = 1 if samples is None else samples
    fraction = groups.groups(x).double().clamp(0.0, 1.0)
    near = fraction.round()
    fractional = (fraction - near).abs() > _tolerance(x)
    fraction = near + (fraction - near) * fractional
    # Slots are for fractional entries; groups with fewer of them fill up with decided ones, which pivot steps leave.
    most = int(fractional.sum(1).max())
    slots = fractional.byte().argsort(dim=1, descending=True, stable=True)[:, :most].expand(number, -1, -1)
    if order is None:
        keys = _uniform(slots.shape, generator, x.device)
    else:
        keys = groups.groups(order).expand(number, -1, -1).gather(2, slots)
    slots = slots.gather(2, keys.argsort(dim=2, stable=True))
    settled = fraction.repeat(number, 1, 1)
    _pivot(settled, slots, generator, decide_last=getattr(masks, "at_most", False))
    # A full group's last entry is near 0 or 1: the oracle decides it by the count. Should rounding have changed a large
    # group's sum by more than one entry, a thousandth of x says which entries make up for it.
    settled.add_(groups.groups(x), alpha=1e-3)
    drawn = torch.stack([masks.round(groups.ungroup(sample, x.shape)) for sample in settled])
    return drawn[0] if samples is None else drawn


def _pivot(fraction: Tensor, slots: Tensor, generator: torch.Generator, *, decide_last: bool) -> None:
    """Apply the pivot steps of the entries `slots`, shape (..., entries), in place; one entry each stays fractional.

    With `decide_last` that entry becomes 1 with the probability it has, else 0.
    """
    value = fraction.gather(-1, slots)
    while value.shape[-1] > 1:
        pairs = value.shape[-1] // 2
        one, two = value[..., : 2 * pairs : 2], value[..., 1 : 2 * pairs : 2]
        total = one + two
        # Up to a sum of 1 one entry becomes 0, above it one becomes 1; each is chosen with the other's distance.
        end = torch.ge(total, 1.0, out=torch.empty_like(total))
        far = (one - end).abs_()
        first = _uniform(total.shape, generator, fraction.device) * (far + (two - end).abs_()) < far
        left, right = slots[..., : 2 * pairs : 2], slots[..., 1 : 2 * pairs : 2]
        fractional = right + (left - right) * first
        fraction.scatter_(-1, left + right - fractional, end)
        value = torch.cat((total - end, value[..., 2 * pairs :]), -1)
        slots = torch.cat((fractional, slots[..., 2 * pairs :]), -1)
    if decide_last:
        value = (_uniform(value.shape, generator, fraction.device) < value).double()
    fraction.scatter_(-1, slots, value)


def _tolerance(x: Tensor) -> float:
    # Half precision has the tolerance of float32: its entries are exact numbers.
    return face_tolerance(torch.promote_types(x.dtype, torch.float32))


def _uniform(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(device)


def best_of(problem: Problem, masks: MaskSet, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Return, for each row block, the best of `top_k` and `samples` dependent roundings, boolean, shape (rows, d)."""
    drawn = (dependent(masks, x, generator) for _ in range(samples))  # one at a time: memory stays what it is
    return _best(problem, masks, itertools.chain((top_k(masks, x),), drawn))[0]


def best(problem: Problem, masks: MaskSet, *candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Choose among masks, for each row block on its own, by the objective in float64.

    Parameters
    ----------
    problem : Problem
        Evaluates.
    masks : MaskSet
        Says how many consecutive rows form a row block; any mix of members by row blocks is a member.
    *candidates : Tensor
        Members, boolean, shape (rows, d), at least one.

    Returns
    -------
    mask : Tensor
        Boolean, shape (rows, d).
    index : Tensor
        Number of the chosen candidate, int64, shape (row blocks,); the first of equals.
    """
    return _best(problem, masks, candidates)


def _best(problem: Problem, masks: MaskSet, candidates: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    row_block = row_block_of(problem, masks)
    numbered = iter(enumerate(candidates))
    mask = next(numbered)[1].clone()
    error = block_errors(problem, masks, mask)
    index = torch.zeros(len(error), dtype=torch.int64, device=error.device)
    for number, candidate in numbered:
        other = block_errors(problem, masks, candidate)
        better = other < error
        error = torch.minimum(error, other)
        index[better] = number
        rows = better.repeat_interleave(row_block)
        mask[rows] = candidate[rows]
    return mask, index


def lemma2_slack(problem: LayerReconstruction, masks: MaskSet, x: Tensor) -> Tensor:
    """Return a proven bound on how much worse the rounded `x` is than the best mask: f(top_k(x)) - min f <= slack.

    The data-dependent form of Lemma 2 of SparseFW (arXiv 2510.13713), from numbers of the relaxed point alone. For a
    row let p = 1 - x, Q = Diag(w) G Diag(w) with eigenvalues of size at most lambda, and delta the change of x by
    rounding. Then f(top_k(x)) - f(x) = -2 <delta, Q p> + <delta, Q delta> <= 2 lambda |p| |delta| + lambda |delta|^2.
    Entries of p and delta have size at most 1, so that |p|^2 <= r, the sum of p (what the row prunes), and |delta|^2
    <= 2 tau, the sum of |delta|. Where the row's groups keep fixed numbers, tau is the mass of x outside the rounded
    mask. Hence

        f(top_k(x)) - f(x) <= 2 tau lambda + 2 lambda sqrt(r) sqrt(2 tau).

    Convexity adds f(x) - min f <= eps, the Frank-Wolfe gap at x; a Gram indefinite by rounding is allowed for.
    lambda is Gershgorin's max_i |w_i| sum_j |G_ij| |w_j|: one product for all rows, and never too small.

    Parameters
    ----------
    problem : LayerReconstruction
        The layer.
    masks : MaskSet
        The set.
    x : Tensor
        A point of its hull, shape (rows, d).

    Returns
    -------
    Tensor
        In units of `problem.objective`, float64, shape (row blocks,): of each row where rows are independent, else
        summed over the rows of a row block. Sums are rounded as float64 rounds them.
    """
    exact, x = problem.double(), x.double()
    gradient = exact.gradient(exact.evaluate(x))
    size = exact.scaled_weight.abs()
    largest = (size @ exact.scaled_gram.abs()).mul_(size).amax(1)
    distance = (top_k(masks, x).double() - x).abs_().sum(1)  # 2 tau
    pruned = (1.0 - x).sum(1)
    per_row = largest * (distance + 2.0 * (pruned * distance).clamp_min_(0.0).sqrt())
    # What convexity lacks: no mask differs from x by more than this.
    per_row -= exact.eigenvalue_floor() * (size * torch.maximum(x, 1.0 - x)).square().sum(1)
    per_row += torch.linalg.vecdot(gradient, x)
    return (per_row.view(-1, masks.row_block(x.shape)).sum(1) - masks.lmo_bound(gradient)) * exact.unit
