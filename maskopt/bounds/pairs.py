"""Multipliers of the cuts Z_ij >= 0, which strengthen the semidefinite relaxation."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.bounds.interior import FormBounds, combination, drop, face_basis, factor_schur, lift, measure, schur
from maskopt.bounds.work import Progress, Stop, steps

__all__ = ["pair_multipliers"]

_STEP = 1.6  # step size of the multipliers; the method converges below (1 + sqrt 5) / 2
_PENALTY = 3.0  # times |Z| / |slack|, at the start
_REVIEW = 10  # iterations between changes of the penalty
_DAMPING = 0.92  # factor on the multipliers returned


def pair_multipliers(
    forms: Tensor,
    pruned: Tensor,
    found: FormBounds,
    iterations: int,
    *,
    group: int | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return N >= 0 for which the forms Q - N have a larger semidefinite bound.

    As p^T N p >= 0, a lower bound of Q - N is one of Q, whatever N is. N results from a few iterations of the
    alternating direction method for semidefinite programs (Wen, Goldfarb and Yin, Mathematical Programming Computation
    2, 2010). The dual points of that method become feasible only slowly; only N is used, and `bound_forms` computes the
    other multipliers on Q - N.

    Parameters
    ----------
    forms, pruned, group
        As for `bound_forms`; neither none nor all of the entries are pruned.
    found : FormBounds
        The result of `bound_forms` for them, with finite bounds.
    iterations : int
        Number of iterations, each of which costs one eigendecomposition of size d.
    stop : callable, optional
        Called before every iteration; True ends the method.
    progress : callable, optional
        Called before every iteration with the fraction of them that is done.

    Returns
    -------
    Tensor
        N, float64, shape (forms, d, d), with zero diagonal.
    """
    d = forms.shape[1]
    s = pruned.to(forms.dtype).unsqueeze(1)
    unit = torch.eye(d, dtype=forms.dtype, device=forms.device).expand_as(forms)
    basis = face_basis(group, forms)
    C = factor_schur(schur(unit, unit, s))
    target = torch.zeros((len(forms), d + 1), dtype=forms.dtype, device=forms.device)
    target[:, 0] = s[:, 0]
    Z, N = found.point, torch.zeros_like(forms)
    S = forms - combination(found.tilt, found.bound / s[:, 0], s)
    penalty = (_PENALTY * _norm(Z) / _norm(S)).view(-1, 1, 1)
    size = _norm(forms)
    for step in steps(iterations, stop, progress):
        missing = (target - measure(Z, s)) / penalty[:, 0] + measure(forms - S - N, s)
        multipliers = torch.cholesky_solve(missing.unsqueeze(2), C).squeeze(2)
        slack = forms - combination(multipliers[:, 1:], multipliers[:, 0], s)
        scaled_point = Z / penalty
        N = slack - S - scaled_point
        N = (N + N.mT).mul_(0.5).clamp_min_(0.0)
        N.diagonal(dim1=1, dim2=2).zero_()
        split = slack - N - scaled_point
        # Project on the cone of the relaxation, which lies in the span of all p, and on its dual.
        values, vectors = torch.linalg.eigh(drop(split + split.mT, basis).mul_(0.5))
        negative = lift((vectors * (-values).clamp_min(0.0).unsqueeze(1)) @ vectors.mT, basis)
        S = split + negative
        Z = torch.lerp(Z, penalty * negative, _STEP)
        if (step + 1) % _REVIEW == 0:
            primal = _norm(target - measure(Z, s)) / s[:, 0] + _norm(Z.clamp_max(0.0)) / _norm(Z)
            dual = _norm(slack - N - S) / size
            change = torch.where(primal > 2 * dual, 1 / 1.3, torch.where(dual > 2 * primal, 1.3, 1.0))
            penalty = penalty * change.view(-1, 1, 1)
    return N.mul_(_DAMPING)


def _norm(M: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(M.flatten(1), dim=1)
    return norm
