"""A primal-dual interior-point method for the semidefinite bound of many small cardinality problems at once.

The problem is min p^T Q p over p in {0, 1}^d with 1^T p = s. Relaxing Z = p p^T to positive semidefinite Z with
Z 1 = s diag(Z) and tr Z = s gives, with A_i = e_i e_i^T - (e_i 1^T + 1 e_i^T) / (2 s), the primal-dual pair

    min <Q, Z>   over Z positive semidefinite with <A_i, Z> = 0 for all i and tr Z = s
    max s level  over y and level with Q - sum_i y_i A_i - level I positive semidefinite.

Z is not bordered by z = diag(Z): the bordered matrix has the null vector (-s, 1, ..., 1), by the equation 1^T z = s,
and is positive semidefinite if and only if Z is. Every p has p^T A_i p = 0 and p^T p = s, so *any* y proves the lower
bound s lambda_min(Q - sum_i y_i A_i), however it was found.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from maskopt.bounds.work import Progress, Stop

__all__ = ["FormBounds", "bound_forms"]

_EPSILON = 2.0**-53
_TRIALS = 40  # step sizes tried before a direction is given up; the last is below 2e-3
_PREDICTOR = (0.9, 0.7)  # first step size tried and the factor between them: the predictor is only measured
_CORRECTOR = (1.0, 0.85)
_NEGLIGIBLE = 1e-6  # relative to the mean value of all p
_DAMPING = 0.92  # relative to the largest step size found
_TYPICAL = 12  # iterations that a form takes, for the estimate of progress


@dataclass(frozen=True)
class FormBounds:
    """Bounds of quadratic forms.

    Attributes
    ----------
    bound : Tensor
        Proven lower bound of p^T Q p over feasible p, float64, shape (forms,); -inf where nothing is proven.
    tilt : Tensor
        y, shape (forms, d): Q - sum_i y_i A_i - bound / s I is positive semidefinite.
    primal : Tensor
        Value of the best point found of the relaxation, shape (forms,): an estimate of the largest possible `bound`.
    point : Tensor
        The last point Z of the relaxation, shape (forms, d, d); zero where there is none.
    iterations : Tensor
        Int64, shape (forms,).
    stopped : Tensor
        Whether `stop` ended the iterations of a form, boolean, shape (forms,).
    """

    bound: Tensor
    tilt: Tensor
    primal: Tensor
    point: Tensor
    iterations: Tensor
    stopped: Tensor

    def take(self, index: Tensor) -> FormBounds:
        """Return a copy for some forms."""
        return FormBounds(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass
class _Rows:
    """The iterates of the forms that are not done."""

    place: Tensor  # indices of the forms
    Q: Tensor  # (forms, d, d)
    s: Tensor  # (forms, 1)
    size: Tensor  # Frobenius norm of Q, (forms,)
    X: Tensor  # primal point in the basis, (forms, n, n)
    y: Tensor  # (forms, d)
    level: Tensor  # (forms,)
    S: Tensor  # dual slack in the basis, (forms, n, n)
    L: Tensor  # its Cholesky factor

    def take(self, index: Tensor) -> _Rows:
        return _Rows(*(getattr(self, field.name)[index] for field in fields(self)))


def bound_forms(
    forms: Tensor,
    pruned: Tensor,
    *,
    group: int | None = None,
    accuracy: float = 1e-3,
    iterations: int = 50,
    target: Tensor | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> FormBounds:
    """Bound p^T Q p from below over p in {0, 1}^d with a given number of ones, for many Q at once.

    Mehrotra's predictor-corrector method in the direction of Helmberg, Rendl, Vanderbei and Wolkowicz (SIAM J.
    Optimization 6, 1996). As A_i is a difference of two matrices of rank one, the Schur complement is a Hadamard
    product, and an iteration costs three matrix products and about ten Cholesky factorisations of size d. A dual point
    gives a bound once its slack has been factorised; the backward error of the factorisation is subtracted.

    Parameters
    ----------
    forms : Tensor
        Q, float64, symmetric, not necessarily semidefinite, shape (forms, d, d). Linear terms c^T p can be written as
        p^T (c 1^T + 1 c^T) p / (2 s).
    pruned : Tensor
        s, the number of ones, shape (forms,).
    group : int, optional
        Every `group` consecutive entries hold equally many ones, `pruned` * `group` / d.
    accuracy : float
        A form is done when its primal and dual values differ by this, relative to the primal one.
    iterations : int
        Maximal number of iterations.
    target : Tensor, optional
        Shape (forms,). A form is also done as soon as its bound has reached the target, or its relaxation has a point
        below it.
    stop : callable, optional
        Called before every iteration; True ends the method with the bounds proven so far.
    progress : callable, optional
        Called after every iteration with the estimated fraction of the work that is done.

    Returns
    -------
    FormBounds
    """
    count, d = forms.shape[:2]
    bound = forms.new_full((count,), -torch.inf)
    primal = forms.new_full((count,), torch.inf)
    tilt, point = forms.new_zeros((count, d)), forms.new_zeros((count, d, d))
    spent = torch.zeros(count, dtype=torch.int64, device=forms.device)
    # Nothing or everything pruned: there is one p, whose value is known up to the rounding of the sum.
    whole = (pruned == d).to(forms.dtype)
    error = 2 * d * d * _EPSILON * forms.abs().sum((1, 2))
    only = whole * (forms.sum((1, 2)) - error)
    decided = (pruned == 0) | (pruned == d)
    bound[decided] = primal[decided] = only[decided]
    point[decided] = whole[decided].view(-1, 1, 1)

    basis = face_basis(group, forms)
    index = (~decided).nonzero().flatten()
    rows = _start(forms[index], pruned[index].to(forms.dtype).unsqueeze(1), basis, group or d)
    started = torch.isfinite(rows.level)
    rows, index = rows.take(started.nonzero().flatten()), index[started]
    rows.place = index
    # Where the relaxation's value is zero, no relative accuracy can be reached.
    small = torch.full_like(primal, torch.inf)
    small[index] = _NEGLIGIBLE * (rows.Q * lift(rows.X, basis)).sum((1, 2)).abs()
    stopped = torch.zeros(count, dtype=torch.bool, device=forms.device)
    for iteration in range(iterations):
        if not len(rows.place):
            break
        if stop is not None and stop():
            stopped[rows.place] = True
            break
        advanced = _iterate(rows, basis)
        proven = rows.s[:, 0] * (rows.level - _margin(rows, basis))
        better = proven > bound[rows.place]
        improved = rows.place[better]
        bound[improved], tilt[improved] = proven[better], rows.y[better]
        wide = lift(rows.X, basis)
        value = (rows.Q * wide).sum((1, 2))
        primal[rows.place] = torch.minimum(primal[rows.place], value)
        spent[rows.place] += 1
        allowed = accuracy * torch.maximum(value.abs(), small[rows.place])
        going = advanced & (value - rows.s[:, 0] * rows.level > allowed)
        if target is not None:
            aim = target[rows.place]
            going &= (bound[rows.place] < aim) & (value >= aim)
        if not bool(going.all()):
            point[rows.place] = wide
            rows = rows.take(going.nonzero().flatten())
        if progress is not None:
            progress(1.0 - len(rows.place) / count * (1.0 - min(0.95, (iteration + 1) / _TYPICAL)))
    point[rows.place] = lift(rows.X, basis)
    return FormBounds(bound, tilt, primal, point, spent, stopped)


def face_basis(group: int | None, like: Tensor) -> Tensor | None:
    """Return an orthonormal basis of the span of all p with equally many ones in each group.

    It consists of (1, ..., 1) / sqrt(d) and, for each group, the rows of Helmert's matrix that sum to zero.

    Parameters
    ----------
    group : int, optional
        Entries of a group.
    like : Tensor
        Of the type and device wanted, last dimension d.

    Returns
    -------
    Tensor or None
        Shape (d, n); None where the span is the whole space.
    """
    d = like.shape[-1]
    if group is None or group == d:
        return None
    k = torch.arange(1, group, dtype=like.dtype, device=like.device)
    helmert = torch.triu(like.new_ones(group, group))[:, : group - 1]
    helmert[1:] -= torch.diag(k)
    helmert /= (k * (k + 1)).sqrt()
    inside = torch.kron(torch.eye(d // group, dtype=like.dtype, device=like.device), helmert)
    return torch.cat((like.new_full((d, 1), d**-0.5), inside), 1)


def lift(M: Tensor, basis: Tensor | None) -> Tensor:
    """Return B M B^T for the basis B: matrices (forms, n, n) on the span as matrices (forms, d, d) of all entries."""
    return M if basis is None else basis @ M @ basis.T


def drop(M: Tensor, basis: Tensor | None) -> Tensor:
    """Return B^T M B for the basis B: matrices (forms, d, d) of all entries as forms (forms, n, n) on the span."""
    return M if basis is None else basis.T @ M @ basis


def _start(Q: Tensor, s: Tensor, basis: Tensor | None, group: int) -> _Rows:
    """Return the starting point: Z is the mean of all p p^T, which is strictly feasible; y = 0, and a level below Q."""
    count, d = Q.shape[:2]
    fraction = s / d
    inside = fraction * (fraction * group - 1) / max(group - 1, 1)  # two different entries of one group
    of_group = torch.arange(d, device=Q.device) // group
    together = (of_group.unsqueeze(1) == of_group).to(Q.dtype)
    X = fraction.square().unsqueeze(2) * (1 - together) + inside.unsqueeze(2) * together
    X.diagonal(dim1=1, dim2=2).copy_(fraction.expand(-1, d))
    # With a slack that is large relative to Q, the product of X and the slack is nearly a multiple of the identity.
    level = -(Q.diagonal(dim1=1, dim2=2).abs() * fraction).sum(1) / s[:, 0]
    size = torch.linalg.matrix_norm(Q)
    y = Q.new_zeros(count, d)
    place = torch.arange(count, device=Q.device)
    rows = _Rows(place, Q, s, size, drop(X, basis), y, level, Q, Q)
    rows.S, rows.L, good = _slack(rows, y, level, basis)
    for _ in range(_TRIALS):
        if bool(good.all()):
            break
        level = level.where(good, 2 * level - size)
        rows.S, rows.L, good = _slack(rows, y, level, basis)
    rows.level = level.where(good & (size > 0), torch.nan)
    return rows


def combination(y: Tensor, level: Tensor, s: Tensor) -> Tensor:
    """Return sum_i y_i A_i + level I."""
    half = y / (2 * s)
    M = -(half.unsqueeze(1) + half.unsqueeze(2))
    M.diagonal(dim1=1, dim2=2).add_(y + level.unsqueeze(1))
    return M


def _slack(rows: _Rows, y: Tensor, level: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dual slack, its Cholesky factor, and for which forms the factorisation succeeded."""
    S = drop(rows.Q - combination(y, level, rows.s), basis)
    return S, *_factor(S)


def _factor(M: Tensor) -> tuple[Tensor, Tensor]:
    L, info = torch.linalg.cholesky_ex(M)
    # Not every LAPACK reports a NaN.
    return L, (info == 0) & torch.isfinite(L.diagonal(dim1=1, dim2=2)).all(1)


def _margin(rows: _Rows, basis: Tensor | None) -> Tensor:
    """Return a bound on how far below zero the eigenvalues of the exact slack may lie if the factorisation succeeded.

    The factorisation: (n + 1) u tr S with u = 2^-53 (Rump, Verification of positive definiteness, BIT 46, 2006; Higham,
    Accuracy and Stability of Numerical Algorithms, Theorem 10.3). Forming S: each entry is a sum of a few terms, each
    with a few roundings, and the 2-norm of the errors is at most their Frobenius norm.
    """
    d, n = rows.Q.shape[1], rows.S.shape[1]
    trace = rows.S.diagonal(dim1=1, dim2=2).sum(1)
    y = torch.linalg.vector_norm(rows.y, dim=1)
    entries = rows.size + y * (1 + d**0.5 / rows.s[:, 0]) + d**0.5 * rows.level.abs()
    # In a basis, two products with it are rounded too, and it is orthonormal only up to rounding.
    forming = 8.0 if basis is None else 8.0 * d
    margin: Tensor = 1.01 * _EPSILON * ((n + 2) * trace + forming * entries)
    return margin


def measure(M: Tensor, s: Tensor) -> Tensor:
    """Return <I, M> and <A_i, M> of the symmetric part of M, shape (forms, 1 + d)."""
    diagonal = M.diagonal(dim1=1, dim2=2)
    border = diagonal - (M.sum(1) + M.sum(2)) / (2 * s)
    return torch.cat((diagonal.sum(1, keepdim=True), border), 1)


def schur(P: Tensor, X: Tensor, s: Tensor) -> Tensor:
    """Return tr(A_k P A_l X), I first, shape (forms, 1 + d, 1 + d).

    A_i = a_i a_i^T - u u^T with u = 1 / (2 s) and a_i = e_i - u, hence
    tr(A_i P A_j X) = (a_i^T P a_j) (a_i^T X a_j) - v_i - v_j + constant with v_i = (a_i^T P u) (a_i^T X u).
    """
    d = P.shape[1]
    p_one, x_one = P.sum(1), X.sum(1)
    p, x = p_one / (2 * s), x_one / (2 * s)
    p_all, x_all = p.sum(1, keepdim=True) / (2 * s), x.sum(1, keepdim=True) / (2 * s)
    v = (p - p_all) * (x - x_all)
    shifted_p, shifted_x = p - 0.5 * p_all, x - 0.5 * x_all
    complement = P.new_empty((len(P), d + 1, d + 1))
    inner = complement[:, 1:, 1:]
    torch.mul(
        P - shifted_p.unsqueeze(1) - shifted_p.unsqueeze(2),
        X - shifted_x.unsqueeze(1) - shifted_x.unsqueeze(2),
        out=inner,
    )
    v = v - 0.5 * p_all * x_all
    inner.sub_(v.unsqueeze(1)).sub_(v.unsqueeze(2))
    both = (P * X).sum(1)
    border = both - ((P @ x_one.unsqueeze(2) + X @ p_one.unsqueeze(2)).squeeze(2)) / (2 * s)
    complement[:, 0, 0] = both.sum(1)
    complement[:, 0, 1:] = border
    complement[:, 1:, 0] = border
    return complement


def factor_schur(complement: Tensor) -> Tensor:
    """Return the Cholesky factor of a Schur complement, regularised if singular, as constraints may be redundant."""
    diagonal = complement.diagonal(dim1=1, dim2=2)
    plain = diagonal.clone()
    ridge = 1e-14
    C, good = _factor(complement)
    while not bool(good.all()) and ridge < 1.0:
        diagonal.copy_(plain * (1 + ridge))
        C, good = _factor(complement)
        ridge *= 100.0
    return C


def _longest(M: Tensor, dM: Tensor, lengths: tuple[float, float]) -> Tensor:
    """Return for each matrix a step size in direction dM that keeps it positive definite, zero if none was found."""
    step = M.new_zeros(len(M))
    waiting = torch.arange(len(M), device=M.device)
    length, shrink = lengths
    for _ in range(_TRIALS):
        good = _factor(torch.add(M, dM, alpha=length))[1]
        if bool(good.all()):
            step[waiting] = length
            break
        step[waiting[good]] = length
        left = (~good).nonzero().flatten()
        waiting, M, dM = waiting[left], M[left], dM[left]
        length *= shrink
    return step


def _iterate(rows: _Rows, basis: Tensor | None) -> Tensor:
    """Take one step, in place; return for which forms it was not zero, boolean, shape (forms,)."""
    s, X = rows.s, rows.X
    n = X.shape[1]
    P = torch.cholesky_inverse(rows.L)
    wide_P = lift(P, basis)
    C = factor_schur(schur(wide_P, lift(X, basis), s))
    target = torch.zeros((len(X), rows.y.shape[1] + 1), dtype=X.dtype, device=X.device)
    target[:, 0] = s[:, 0]
    sides = torch.stack((target, measure(wide_P, s)), 2)
    to_face, to_centre = torch.cholesky_solve(sides, C).unbind(2)
    centre = (X * rows.S).sum((1, 2)) / n

    def slack_change(multipliers: Tensor) -> Tensor:
        return drop(combination(multipliers[:, 1:], multipliers[:, 0], s).neg_(), basis)

    # Predictor: the Newton step to the optimum. Its maximal step size determines the centring of the corrector.
    dS = slack_change(to_face)
    change = dS @ P
    R = X @ change
    dX = (R + R.mT).mul_(-0.5).sub_(X)
    primal, dual = _longest(X, dX, _PREDICTOR), _longest(rows.S, dS, _PREDICTOR)
    near = (X + primal.view(-1, 1, 1) * dX).mul_(rows.S + dual.view(-1, 1, 1) * dS).sum((1, 2)) / n
    power = torch.where(torch.maximum(primal, dual) < 0.7, 2.0, 3.0)
    aim = (near / centre).clamp(0.0, 1.0).pow(power).clamp_min(1e-4) * centre

    # Corrector: with the second-order term of the predictor.
    second = dX @ change
    correct = torch.cholesky_solve(measure(lift(second, basis), s).unsqueeze(2), C).squeeze(2)
    multipliers = to_face - aim.unsqueeze(1) * to_centre + correct
    dS = slack_change(multipliers)
    R = (X @ (dS @ P)).add_(second)
    dX = (aim.view(-1, 1, 1) * P).sub_(X).sub_(R.add_(R.mT.clone()).mul_(0.5))
    primal, dual = _longest(X, dX, _CORRECTOR), _longest(rows.S, dS, _CORRECTOR)
    # A full step is not shortened: it makes the point exactly feasible.
    primal = primal * torch.where(primal < 1.0, _DAMPING, 1.0)
    dual = dual * torch.where(dual < 1.0, _DAMPING, 1.0)
    y = torch.addcmul(rows.y, dual.unsqueeze(1), multipliers[:, 1:])
    level = torch.addcmul(rows.level, dual, multipliers[:, 0])
    S, L, good = _slack(rows, y, level, basis)
    good &= torch.isfinite(dX).all(2).all(1)
    if bool(good.all()):
        rows.X, rows.y, rows.level, rows.S, rows.L = X + primal.view(-1, 1, 1) * dX, y, level, S, L
        return torch.maximum(primal, dual) > 0.0
    for place in good.nonzero().flatten().tolist():
        rows.X[place] += primal[place] * dX[place]
        rows.y[place], rows.level[place], rows.S[place], rows.L[place] = y[place], level[place], S[place], L[place]
    return good & (torch.maximum(primal, dual) > 0.0)
