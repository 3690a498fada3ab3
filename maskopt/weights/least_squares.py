"""Least squares on a mask: the weights of minimal error where it keeps, zero where it prunes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maskopt.checks import check_settings, choice, instance_of, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers import ContinuationFrankWolfe
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.requirements import Requirements
from maskopt.threads import factor_threads
from maskopt.weights.base import Joint, System

__all__ = [
    "LeastSquares",
    "conjugate_gradients",
    "definite_factor",
    "definite_inverse",
    "exact_weights",
    "polish",
]

_DENSE = 512  # inputs up to which a factorisation per row beats conjugate gradients


@dataclass(frozen=True)
class LeastSquares(Joint):
    """The mask of another solver, then the weights of minimal error on it.

    Parameters
    ----------
    ridge : float
        See `System.of`.
    solver : Solver
        Chooses the mask for the weights as they are.
    method : {"auto", "cholesky", "cg"}
        One factorisation for each row, in float64, or preconditioned conjugate gradients for all rows at once; by
        default the former up to 512 inputs.
    steps : int
        Of conjugate gradients.

    References
    ----------
    The normal equations on a support: X. Meng et al., "ALPS", arXiv 2406.07831, section 3.3. Conjugate gradients:
    algorithm 2 there; Y. Saad, "Iterative Methods for Sparse Linear Systems", 2nd edition, 2003, algorithm 9.1.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.PerRow(0.5), LeastSquares(solver=maskopt.Wanda()))
    >>> bool((result.mask == maskopt.solve(layer, maskopt.PerRow(0.5), maskopt.Wanda()).mask).all())
    True
    >>> result.relative_error < 0.5 * result.kept_error  # after and before the update of the weights
    True
    """

    solver: Solver = field(default_factory=ContinuationFrankWolfe)
    method: Literal["auto", "cholesky", "cg"] = "auto"
    steps: int = 100
    start: Solver | None = field(init=False, repr=False)

    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            solver=instance_of(Solver, example="Wanda()"),
            method=choice(("auto", "cholesky", "cg")),
            steps=whole(0),
        )
        # Start, row-wise work and recording are those of the solver that chooses the mask.
        for name in ("start", "row_wise", "blockwise", "record"):
            object.__setattr__(self, name, getattr(self.solver, name))
        object.__setattr__(self, "arrays", max(self.solver.arrays, Joint.arrays))

    @property
    def name(self) -> str:
        return f"LeastSquares on {self.solver.name}"

    def solves_rows_apart(self, masks: MaskSet) -> bool:
        return self.solver.solves_rows_apart(masks)

    @property
    def requirements(self) -> Requirements:
        return self.solver.requirements.joined(self.requires)

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        # The mask is the best one recorded, where the solver records.
        outcome = monitor.finish(self.solver.run(problem, masks, start, monitor))
        system = System.of(problem, self.ridge)
        if self.method == "cholesky" or (self.method == "auto" and problem.shape[1] <= _DENSE):
            rows = problem.shape[0]
            v = exact_weights(
                system, outcome.mask, monitor.memory, lambda solved: monitor.stops(problem, masks, solved, rows)
            )
        else:
            v = system.weight * outcome.mask
            if monitor.ended is None:
                v = polish(problem, masks, system, outcome.mask, v, self.steps, monitor)
        # Proofs about masks alone, bounds among them, do not hold for masks with updated weights.
        proven = outcome.status in (Status.OPTIMAL, Status.WITHIN_GAP, Status.LOCAL_OPTIMUM)
        status = Status.COMPLETED if proven else outcome.status
        return replace(outcome, status=status, lower_bound=None, weight=system.finish(problem, v))


def exact_weights(
    system: System, mask: Tensor, memory: int = 2**28, stops: Callable[[int], bool] | None = None
) -> Tensor:
    """Return the scaled weights of minimal error on a mask: H_SS v = (H w)_S for each row, in float64.

    Parameters
    ----------
    system : System
    mask : Tensor
        Boolean, shape (rows, d).
    memory : int
        Bytes for the rows' own matrices, of size kept x kept; it sets how many rows are solved at a time.
    stops : callable, optional
        Called before each chunk of rows with the number of rows solved; where it returns True, the other rows keep
        the weights of the system.

    Returns
    -------
    Tensor
        Shape (rows, d), zero where pruned, in the system's type. Where the minimum is not unique (duplicate inputs
        without a ridge), one of the minimisers.

    Raises
    ------
    MaskoptError
        If an entry of the system is NaN or infinite.
    """
    gram = system.gram.double()
    target = system.weight.double() @ gram
    # The rounding of float32 makes a singular Gram indefinite; weights must not be fitted to that rounding.
    rounding = torch.finfo(system.gram.dtype).eps * len(gram)
    counts = mask.sum(1)
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    v = system.weight.double() * mask
    # Rows that keep about as many entries together: their matrices are padded to the largest.
    ranked = torch.argsort(counts)
    most = max(1, int(counts.max()))
    chunk = max(1, int(memory / (4 * 8 * most**2)))
    for number, rows in enumerate(torch.split(ranked, chunk)):
        if stops is not None and stops(number * chunk):
            break
        size = int(counts[rows].max())
        if size == 0:
            continue
        index = order[rows, :size]
        real = (torch.arange(size, device=mask.device) < counts[rows].unsqueeze(1)).double()
        matrix = gram[index.unsqueeze(2), index.unsqueeze(1)].mul_(real.unsqueeze(1)).mul_(real.unsqueeze(2))
        matrix.diagonal(dim1=1, dim2=2).add_(1.0 - real)
        right = target[rows].gather(1, index).mul_(real).unsqueeze(2)
        factor = definite_factor(matrix)
        near = factor.diagonal(dim1=1, dim2=2).square().amin(1) < rounding
        if bool(near.any()):
            matrix.diagonal(dim1=1, dim2=2).add_(near.unsqueeze(1) * rounding)
            factor[near] = definite_factor(matrix[near])
        solution = torch.cholesky_solve(right, factor).squeeze(2)
        v[rows] = v[rows].scatter_(1, index, solution.mul_(real))
    return v.to(system.weight.dtype)


def polish(
    problem: LayerReconstruction,
    masks: MaskSet,
    system: System,
    mask: Tensor,
    v: Tensor,
    steps: int,
    monitor: Monitor,
    done: int = 0,
) -> Tensor:
    """Run `conjugate_gradients` at the end of a method, until the solve has to stop, and count its products.

    Parameters
    ----------
    problem, masks
        As in `Solver.run`.
    system : System
    mask : Tensor
        1 (or True) where kept, shape (rows, d).
    v : Tensor
        Scaled weights to start from, zero where pruned, shape (rows, d).
    steps : int
        At most.
    monitor : Monitor
    done : int
        Iterations of the method before.

    Returns
    -------
    Tensor
        The scaled weights reached, shape (rows, d).
    """

    def stops(step: int) -> bool:
        stopped = monitor.stops(problem, masks, done + step, done + steps)
        monitor.counters["products"] += not stopped
        return stopped

    monitor.counters["products"] += steps > 0
    return conjugate_gradients(system, mask, v, steps, stops)


def conjugate_gradients(
    system: System, mask: Tensor, v: Tensor, steps: int, stops: Callable[[int], bool] | None = None
) -> Tensor:
    """Lower the error of scaled weights on their mask by Jacobi-preconditioned conjugate gradients.

    All rows are updated at once, each with its own step size. The residual is projected on the mask, so that memory is
    that of a few (rows, d) matrices. The cost is one matrix product per step, and one before. X. Meng et al., "ALPS",
    arXiv 2406.07831, algorithm 2; Y. Saad, "Iterative Methods for Sparse Linear Systems", 2003, algorithm 9.1.

    Parameters
    ----------
    system : System
    mask : Tensor
        1 (or True) where kept, shape (rows, d).
    v : Tensor
        Scaled weights to start from, zero where pruned, shape (rows, d).
    steps : int
    stops : callable, optional
        Called with the number of steps taken before each; where it returns True, the weights so far are returned.

    Returns
    -------
    Tensor
        Scaled weights, zero where pruned, shape (rows, d).
    """
    if steps <= 0:
        return v
    mask = mask.to(v.dtype)
    diagonal = system.gram.diagonal()
    v = v.clone()
    r = ((system.weight - v) @ system.gram).mul_(mask)
    z = r / diagonal
    p, size = z.clone(), torch.linalg.vecdot(r, z)
    # A residual below this is rounding.
    minimum = size * torch.finfo(v.dtype).eps ** 2
    for step in range(steps):
        if stops is not None and stops(step):
            break
        q = (p @ system.gram).mul_(mask)
        curvature = torch.linalg.vecdot(p, q)
        changes = (size > minimum) & (curvature > 0)
        alpha = torch.where(changes, size / curvature, 0.0).unsqueeze(1)
        v.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1.0)
        torch.div(r, diagonal, out=z)
        last, size = size, torch.linalg.vecdot(r, z)
        p.mul_(torch.where(changes, size / last, 0.0).unsqueeze(1)).add_(z)
    return v


def definite_inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric matrix, shape (d, d), after what `definite_factor` adds to its diagonal."""
    with factor_threads(len(matrix)):
        factor = definite_factor(matrix)
        del matrix  # where the caller has no other use for it, its memory is free now
        return torch.cholesky_inverse(factor)


def definite_factor(matrices: Tensor) -> Tensor:
    """Return the lower Cholesky factors of symmetric matrices, shifted by a small multiple of I where not definite.

    Parameters
    ----------
    matrices : Tensor
        Symmetric, diagonal of about one, shape (..., d, d). Matrices that a positive ridge makes definite are not
        shifted; those that are indefinite by rounding or rank deficiency are.

    Returns
    -------
    Tensor
        Shape (..., d, d).

    Raises
    ------
    MaskoptError
        If an entry is NaN or infinite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrices)
    shift = torch.finfo(matrices.dtype).eps * matrices.shape[-1]
    while bool((info != 0).any()):
        if not shift < 64 * matrices.shape[-1]:  # no row sum is larger
            raise MaskoptError("The Gram must be finite to be factorised, but an entry is NaN or infinite.")
        shifted = matrices.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(((info != 0) * shift).unsqueeze(-1))
        again, found = torch.linalg.cholesky_ex(shifted)
        factor = torch.where((info == 0)[..., None, None], factor, again)
        info = torch.where(info == 0, info, found)
        shift *= 8.0
    return factor
