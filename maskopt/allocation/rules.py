"""Published rules for how sparse each transformer block should be, as functions of statistics that callers measure.

OWL: L. Yin et al., arXiv 2310.05175. DLP: Y. Chen et al., arXiv 2505.23807. AlphaPruning: H. Lu et al., arXiv
2410.10912. LSA: Z. Yang et al., ICLR 2026, openreview xq3lza5IjN. ATP: W. Huang et al., arXiv 2502.14770.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from maskopt.checks import Rule, matrix, real, shown, whole
from maskopt.errors import MaskoptError

__all__ = ["alpha_pruning", "atp", "atp_slopes", "dlp", "hill_exponent", "lsa", "outlier_share", "owl"]

Numbers: TypeAlias = Sequence[float] | Tensor


def owl(shares: Numbers, sizes: Numbers, sparsity: float, spread: float = 0.08) -> list[float]:
    """Prune blocks less the more outliers their scores have.

    The shares are scaled to a range of 2 `spread`, subtracted, and shifted so that the mean is the target. The
    authors' mean counts blocks, which is the same for blocks of equal size. Source: OWL, arXiv 2310.05175, and
    `prune_wanda_outlier` in its code.

    Parameters
    ----------
    shares : sequence of float or Tensor
        Of each block, its `outlier_share`; the scale does not matter.
    sizes : sequence of int or Tensor
        Numbers of weights of the blocks.
    sparsity : float
        Fraction of all weights to prune, in [0, 1).
    spread : float
        Half the difference between the largest and the smallest sparsity; lambda in the paper.

    Returns
    -------
    list of float
        Sparsity of each block, in [0, 1]. Those that would leave it are cut off, and all others are shifted to make
        up for that. If all shares are equal, so are the sparsities.

    Raises
    ------
    MaskoptError
        If the lists are empty or differ in length, or a number is out of range.

    Examples
    --------
    >>> [round(sparsity, 9) for sparsity in owl([0.01, 0.03, 0.02], [64, 64, 64], 0.5, spread=0.25)]
    [0.75, 0.25, 0.5]
    """
    _check("spread", spread, real(0, 1))
    statistic, weights = _inputs("shares", shares, sizes, sparsity)
    return _shifted(-2 * float(spread) * _scaled(statistic), weights, sparsity)


def outlier_share(scores: Tensor | Sequence[Tensor], threshold: float = 5.0) -> float:
    """Return the share of a block's scores that lie above a multiple of their mean: the layerwise outlier distribution.

    Parameters
    ----------
    scores : Tensor or sequence of Tensor
        Wanda's scores |w_ij| ||x_j|| of the block's matrices, of any shapes. The mean is over all of them.
    threshold : float
        The multiple; M in the paper (OWL, arXiv 2310.05175).

    Returns
    -------
    float
        In [0, 1]; the authors use per cent.

    Raises
    ------
    MaskoptError
        If there are no scores, or one is negative or not finite.

    Examples
    --------
    >>> outlier_share([torch.ones(1, 9), torch.tensor([[91.0]])])
    0.1
    """
    _check("threshold", threshold, real(0))
    parts = [matrix("scores", part) for part in (scores if isinstance(scores, Sequence) else [scores])]
    count = sum(part.numel() for part in parts)
    if not count:
        raise MaskoptError("A block without scores has no share of outliers; pass the scores of its matrices.")
    if not all(bool((part.isfinite() & (part >= 0)).all()) for part in parts):
        raise MaskoptError("A block's scores must be finite and not negative, like |w| ||x||; some are not.")
    mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / count
    return sum(int((part.double() > threshold * mean).sum()) for part in parts) / count


def dlp(medians: Numbers, sizes: Numbers, sparsity: float, spread: float = 0.15) -> list[float]:
    """Prune blocks less the smaller the median of their scores is.

    A block's importance is 1 - its median / the sum of all medians. Importances are scaled to a range of 2 `spread`,
    subtracted, and shifted so that the mean is the target; sum and constant drop out in the scaling. Source: DLP, arXiv
    2505.23807, and `get_dlp_ratios` in its code.

    Parameters
    ----------
    medians : sequence of float or Tensor
        Of each block, the median of Wanda's scores |w_ij| ||x_j|| over all its matrices.
    sizes, sparsity
        As in `owl`.
    spread : float
        Half the difference between the largest and the smallest sparsity; alpha in the paper, .15 for a target of .7.

    Returns
    -------
    list of float
        As in `owl`.

    Raises
    ------
    MaskoptError
        If the lists are empty or differ in length, or a number is out of range.

    Examples
    --------
    >>> dlp([1.0, 2.0, 3.0], [64, 64, 64], 0.5, spread=0.25)
    [0.25, 0.5, 0.75]
    """
    _check("spread", spread, real(0, 1))
    statistic, weights = _inputs("medians", medians, sizes, sparsity)
    return _shifted(2 * float(spread) * _scaled(statistic), weights, sparsity)


def alpha_pruning(alphas: Numbers, sizes: Numbers, sparsity: float, spread: float = 0.3) -> list[float]:
    """Prune blocks more the lighter the tail of their matrices' spectra is.

    The exponents are mapped linearly to [1 - spread, 1 + spread] and multiplied by what makes the mean the target.
    Source: AlphaPruning, arXiv 2410.10912, and `ww_sparsity` in its code.

    Parameters
    ----------
    alphas : sequence of float or Tensor
        Of each block, the mean `hill_exponent` of its matrices.
    sizes, sparsity
        As in `owl`.
    spread : float
        In [0, 1); epsilon in the paper.

    Returns
    -------
    list of float
        As in `owl`, but what is cut off at 1 is made up for by a larger factor.

    Raises
    ------
    MaskoptError
        If the lists are empty or differ in length, or a number is out of range.

    Examples
    --------
    >>> alpha_pruning([2.0, 3.0, 4.0], [64, 64, 64], 0.5, spread=0.5)
    [0.25, 0.5, 0.75]
    """
    _check("spread", spread, real(0, 1, below=True))
    statistic, weights = _inputs("alphas", alphas, sizes, sparsity)
    multiples = 1 - spread + 2 * float(spread) * _scaled(statistic)
    knots = torch.cat([multiples.new_zeros(1), 1 / multiples])
    return _interpolated(lambda factor: (factor * multiples).clamp(0.0, 1.0), knots, weights, sparsity)


def hill_exponent(weight: Tensor) -> float:
    """Return the exponent of a power law that fits the larger half of a matrix's squared singular values.

    With the n values from the median upwards, l_1 <= ... <= l_n, it is 1 + n / (sum_i log(l_i / l_1)), Hill's
    estimator. Source: AlphaPruning, arXiv 2410.10912, and `net_esd_estimator` in its code, with the cut in the middle
    of the spectrum ("xmin_mid"; for language models its default is "xmin_peak").

    Parameters
    ----------
    weight : Tensor
        Shape (rows, columns); computed in float64.

    Returns
    -------
    float
        Above 1; the same for every multiple of the matrix. Singular values that are zero but for rounding are left
        out; the authors take all.

    Raises
    ------
    MaskoptError
        If the weight is not a finite matrix, or its larger singular values are all equal.

    Examples
    --------
    >>> round(hill_exponent(torch.tensor([1.0, 1.0, 1.0, math.e]).diag()), 6)
    2.0
    """
    weight = matrix("weight", weight).double()
    if weight.ndim != 2 or not weight.numel() or not bool(weight.isfinite().all()):
        raise MaskoptError(f"An exponent needs a finite matrix with entries; got {shown(weight)}.")
    values = torch.linalg.svdvals(weight).flip(0)
    values = values[values > values[-1] * max(weight.shape) * torch.finfo(values.dtype).eps]
    tail = values[len(values) // 2 :]
    total = 2 * float((tail / tail[:1]).log().sum())
    if not total > 0:
        raise MaskoptError(f"The larger half of the singular values of {shown(weight)} is constant: it has no tail.")
    return 1 + len(tail) / total


def lsa(errors: Numbers, sizes: Numbers, sparsity: float, spread: float = 0.07) -> list[float]:
    """Prune blocks more the larger the error is that pruning half of their weights causes.

    The errors are scaled to a range of 2 `spread` and shifted so that the mean is the target. Source: LSA, ICLR 2026,
    openreview xq3lza5IjN; the linear scaling is that of OWL and DLP, and not checked against the authors' code.

    Parameters
    ----------
    errors : sequence of float or Tensor
        Of each block or matrix, the squared error of its outputs when half of the weights are pruned by Wanda's score;
        not divided by the squared outputs.
    sizes, sparsity
        As in `owl`.
    spread : float
        Half the difference between the largest and the smallest sparsity; the authors choose it by the target
        and give .07 for one of .7, for halves of blocks and for single matrices.

    Returns
    -------
    list of float
        As in `owl`.

    Raises
    ------
    MaskoptError
        If the lists are empty or differ in length, or a number is out of range.

    Examples
    --------
    >>> lsa([10.0, 30.0, 20.0], [64, 64, 64], 0.5, spread=0.25)
    [0.25, 0.75, 0.5]
    """
    _check("spread", spread, real(0, 1))
    statistic, weights = _inputs("errors", errors, sizes, sparsity)
    return _shifted(2 * float(spread) * _scaled(statistic), weights, sparsity)


def atp(blocks: int, sizes: Numbers, sparsity: float, slope: float) -> list[float]:
    """Prune later blocks more: an arithmetic progression over depth (ATP, arXiv 2502.14770).

    Parameters
    ----------
    blocks : int
        Their number, from the input to the output.
    sizes, sparsity
        As in `owl`.
    slope : float
        Difference between a block's sparsity and the next, not negative; beta in the paper. The caller chooses the one
        with the least perplexity, among `atp_slopes`.

    Returns
    -------
    list of float
        As in `owl`.

    Raises
    ------
    MaskoptError
        If there are not as many sizes as blocks, or a number is out of range.

    Examples
    --------
    >>> atp(3, [64, 64, 64], 0.5, slope=0.25)
    [0.25, 0.5, 0.75]
    """
    _check("blocks", blocks, whole(1, 10**6))
    _check("slope", slope, real(0, 1))
    depth, weights = _inputs("depths", torch.arange(blocks), sizes, sparsity)
    return _shifted(float(slope) * depth, weights, sparsity)


def atp_slopes(sparsity: float, blocks: int, step: float = 0.002) -> list[float]:
    """Return the slopes that `atp` chooses from: multiples of a step that keep blocks of equal size within [0, 1].

    Source: ATP, arXiv 2502.14770; 0.002 is the authors' step.

    Parameters
    ----------
    sparsity : float
        Mean sparsity, in [0, 1).
    blocks : int
    step : float
        At least 1e-6.

    Returns
    -------
    list of float
        Ascending and positive, up to 2 min(sparsity, 1 - sparsity) / (blocks - 1); empty if that is below the step,
        and for one block, which has no slope.

    Raises
    ------
    MaskoptError
        If a number is out of range.

    Examples
    --------
    >>> atp_slopes(0.7, 4, step=0.1)
    [0.1, 0.2]
    """
    _check("sparsity", sparsity, real(0, 1, below=True))
    _check("blocks", blocks, whole(1))
    _check("step", step, real(1e-6, 1))
    largest = 2 * min(sparsity, 1 - sparsity) / (blocks - 1) if blocks > 1 else 0.0
    count = math.floor(largest / step + 1e-9)  # a multiple that is the largest but for rounding counts
    return [step * k for k in range(1, count + 1)]


def _check(name: str, value: object, rule: Rule) -> None:
    if not rule.fits(value):
        raise MaskoptError(f"Sparsities of blocks need {rule.words.format(name)}; got {shown(value)}.")


def _inputs(name: str, statistic: Numbers, sizes: Numbers, sparsity: float) -> tuple[Tensor, Tensor]:
    """Return the statistic and the blocks' shares of all weights, float64 of shape (blocks,)."""
    _check("sparsity", sparsity, real(0, 1, below=True))
    values, counts = _vector(name, statistic, real(0)), _vector("sizes", sizes, real(1))
    if len(values) != len(counts):
        raise MaskoptError(f"There must be one size for each of the {len(values)} {name}; got {len(counts)} sizes.")
    return values, counts / counts.sum()


def _vector(name: str, values: object, rule: Rule) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        vector = torch.empty(0, 0)
    if vector.ndim != 1 or not len(vector):
        raise MaskoptError(f"The {name} must be a list of numbers, one for each block; got {shown(values)}.")
    for index, number in enumerate(vector.tolist()):
        if not rule.fits(number):
            raise MaskoptError(f"The {name} need {rule.words.format('number')}; block {index} has {number:g}.")
    return vector


def _scaled(statistic: Tensor) -> Tensor:
    """Map numbers that are not negative linearly to [0, 1], equal ones to 0."""
    low, high = statistic.aminmax()
    return (statistic - low) / (high - low) if high > low else torch.zeros_like(statistic)


def _shifted(sparsities: Tensor, weights: Tensor, sparsity: float) -> list[float]:
    """Add the constant with which sparsities, cut off to [0, 1], have the mean `sparsity`."""
    knots = torch.cat([-sparsities, 1 - sparsities])
    return _interpolated(lambda constant: (sparsities + constant).clamp(0.0, 1.0), knots, weights, sparsity)


def _interpolated(
    allocation: Callable[[float], Tensor], knots: Tensor, weights: Tensor, sparsity: float
) -> list[float]:
    """Return the sparsities of mean `sparsity` among those that grow with one parameter from all 0 to all 1.

    The knots are the parameter's values at which a block reaches 0 or 1. Between neighbours the sparsities are linear
    in the parameter, so interpolating them is exact.
    """
    ordered: list[float] = knots.sort().values.tolist()
    below, above = 0, len(ordered) - 1
    while above - below > 1:
        middle = (below + above) // 2
        if float(weights @ allocation(ordered[middle])) <= sparsity:
            below = middle
        else:
            above = middle
    ends = allocation(ordered[below]), allocation(ordered[above])
    low, high = (float(weights @ end) for end in ends)
    part = min((sparsity - low) / (high - low), 1.0) if high > low else 0.0  # above 1 by rounding
    result: list[float] = torch.lerp(*ends, part).tolist()
    return result
