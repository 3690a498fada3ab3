"""Directions on an active set: away, pairwise, blended pairwise, fully-corrective, lazified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.checks import check_settings, real, whole
from maskopt.problems import Move, Quadratic
from maskopt.solvers.atoms import Atoms
from maskopt.solvers.rules import Direction, View, Way

__all__ = ["Away", "BlendedPairwise", "FullyCorrective", "Lazy", "Pairwise"]


@dataclass(frozen=True)
class _OnAtoms(Direction):
    """What the rules of this file share: they start at a vertex."""

    from_vertex: ClassVar[bool] = True


@dataclass
class _Run(Direction):
    """A run that carries its atoms; rules say which to use and how weights move."""

    atoms: Atoms

    def take(self, rows: Tensor, bands: Tensor) -> Direction:
        return type(self)(self.atoms.take(bands))


def _first(view: View) -> Atoms:
    return Atoms(view.pool.flat(view.x))


def _flat(view: View, per_band: Tensor) -> Tensor:
    """Return a (bands, entries) matrix in the shape of x."""
    return per_band.reshape(view.x.shape)


@dataclass(frozen=True)
class Away(_OnAtoms):
    """Away steps: leave the worst active vertex where that promises more (Guélat and Marcotte, 1986).

    As analysed by Lacoste-Julien and Jaggi (NeurIPS 2015, algorithm 1): linear convergence on polytopes.
    """

    def begin(self, view: View) -> Direction:
        return _AwayRun(_first(view))


@dataclass
class _AwayRun(_Run):
    def way(self, view: View) -> Way:
        atoms, pool = self.atoms, view.pool
        gradient, x = pool.flat(view.gradient), pool.flat(view.x)
        worst, slot = atoms.best(atoms.scores(gradient), largest=True)
        weight = atoms.weight_of(slot)
        gain = worst - vecdot(gradient, x)
        # A point that is its only vertex has nowhere to go away to.
        away = (gain > pool.first(view.gap)) & (weight < 1.0)
        self.slot, self.away = slot, away
        back = x - atoms.dense(slot, x.dtype)
        way = torch.lerp(pool.flat(view.toward), back, away.to(x.dtype).unsqueeze(1))
        limit = torch.where(away, weight / (1.0 - weight), 1.0)
        return Way(_flat(view, way), pool.spread(limit.to(x.dtype)))

    def moved(self, view: View, move: Move, share: Tensor, limit: Tensor) -> None:
        pool, atoms = view.pool, self.atoms
        step, full = pool.first(share).double(), pool.first(share >= limit)
        signed = torch.where(self.away, step, -step)
        atoms.weight *= (1.0 + signed).unsqueeze(1)
        atoms.shift(self.slot, torch.where(self.away, -step, 0.0))
        atoms.empty(self.slot, self.away & full)
        atoms.add(pool.flat(view.vertex), torch.where(self.away, 0.0, step))
        atoms.settle()


@dataclass(frozen=True)
class Pairwise(_OnAtoms):
    """Pairwise steps: weight goes from the worst active vertex to the oracle's (Mitchell et al., 1974).

    As analysed by Lacoste-Julien and Jaggi (NeurIPS 2015, algorithm 2).
    """

    def begin(self, view: View) -> Direction:
        return _PairwiseRun(_first(view))


@dataclass
class _PairwiseRun(_Run):
    def way(self, view: View) -> Way:
        atoms, pool = self.atoms, view.pool
        _, self.slot = atoms.best(atoms.scores(pool.flat(view.gradient)), largest=True)
        way = pool.flat(view.vertex) - atoms.dense(self.slot, view.x.dtype)
        return Way(_flat(view, way), pool.spread(atoms.weight_of(self.slot).to(way.dtype)))

    def moved(self, view: View, move: Move, share: Tensor, limit: Tensor) -> None:
        pool, atoms = view.pool, self.atoms
        step = pool.first(share).double()
        atoms.shift(self.slot, -step)
        atoms.empty(self.slot, pool.first(share >= limit))
        atoms.add(pool.flat(view.vertex), step)
        atoms.settle()


@dataclass(frozen=True)
class BlendedPairwise(_OnAtoms):
    """Weight moves between active vertices while that promises enough, else to the oracle's vertex.

    Tsuji, Tanaka and Pokutta (ICML 2022, algorithm 1): keeps by far the fewest vertices.

    Parameters
    ----------
    patience : float
        Stays while the active vertices promise at least the gap over this; at least 1.
    """

    patience: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1))

    def begin(self, view: View) -> Direction:
        return _BlendedRun(_first(view), self.patience)


@dataclass
class _BlendedRun(_Run):
    patience: float = 1.0

    def way(self, view: View) -> Way:
        atoms, pool = self.atoms, view.pool
        scores = atoms.scores(pool.flat(view.gradient))
        worst, self.drop = atoms.best(scores, largest=True)
        best, self.gain = atoms.best(scores, largest=False)
        self.local = (worst - best) * self.patience >= pool.first(view.gap)
        dtype = view.x.dtype
        within = atoms.dense(self.gain, dtype) - atoms.dense(self.drop, dtype)
        outward = pool.flat(view.toward)
        way = torch.lerp(outward, within, self.local.to(dtype).unsqueeze(1))
        limit = torch.where(self.local, atoms.weight_of(self.drop), 1.0).to(dtype)
        return Way(_flat(view, way), pool.spread(limit))

    def moved(self, view: View, move: Move, share: Tensor, limit: Tensor) -> None:
        pool, atoms = view.pool, self.atoms
        step, full = pool.first(share).double(), pool.first(share >= limit)
        within, outward = torch.where(self.local, step, 0.0), torch.where(self.local, 0.0, step)
        atoms.weight *= (1.0 - outward).unsqueeze(1)
        atoms.shift(self.gain, within)
        atoms.shift(self.drop, -within)
        atoms.empty(self.drop, self.local & full)
        atoms.add(pool.flat(view.vertex), outward)
        atoms.settle()

    def take(self, rows: Tensor, bands: Tensor) -> Direction:
        return _BlendedRun(self.atoms.take(bands), self.patience)


@dataclass(frozen=True)
class FullyCorrective(_OnAtoms):
    """After every new vertex, minimise over the hull of all active ones.

    Wolfe's method of minor cycles (Mathematical Programming 11, 1976), for any quadratic: go to the minimiser over the
    affine hull, or as far as no weight turns negative, drop the vertices whose weight is gone, and repeat. Where the
    quadratic is concave there, away from that saddle as far as weights allow. The small systems see the vertices
    through their inner products with the Hessian, at one matrix product per new vertex.
    """

    requires: ClassVar[tuple[str, ...]] = ("hessian",)

    def begin(self, view: View) -> Direction:
        run = _CorrectiveRun(_first(view))
        run.extend(view, torch.zeros(run.atoms.bands, dtype=torch.int64, device=view.x.device), view.x)
        return run


@dataclass
class _CorrectiveRun(_Run):
    def extend(self, view: View, slot: Tensor, vertex: Tensor) -> None:
        """Fill in the inner products of one slot per band."""
        assert isinstance(view.objective, Quadratic)
        bent = view.objective.hessian(view.along(vertex))
        atoms, every = self.atoms, torch.arange(self.atoms.bands, device=slot.device)
        products = atoms.scores(view.pool.flat(bent))
        if atoms.matrix is None:
            atoms.matrix = products.new_zeros((atoms.bands, products.shape[1], products.shape[1]))
        atoms.matrix[every, slot, :] = products
        atoms.matrix[every, :, slot] = products

    def way(self, view: View) -> Way:
        atoms, pool = self.atoms, view.pool
        vertex = pool.flat(view.vertex)
        nothing = torch.zeros(atoms.bands, dtype=torch.float64, device=vertex.device)
        slot = atoms.add(vertex, nothing, where=torch.ones_like(nothing, dtype=torch.bool))
        self.extend(view, slot, view.vertex)
        free = atoms.weight > 0
        free.scatter_(1, slot.unsqueeze(1), True)
        self.weight = self._corrected(atoms.scores(pool.flat(view.gradient)), free)
        way = atoms.combined(self.weight, view.x.dtype) - pool.flat(view.x)
        return Way(_flat(view, way), best=True)

    def _corrected(self, slope: Tensor, free: Tensor) -> Tensor:
        """Return the best weights on the free slots, given the slope over weights at the present ones."""
        matrix, weight = self.atoms.matrix, self.atoms.weight.clone()
        assert matrix is not None
        slots = weight.shape[1]
        # In a unit, a power of two, that suits the ones which are about to stand beside them: by the spread of the
        # slopes where the objective is linear among the vertices.
        spread = torch.where(free, slope, -torch.inf).amax(1) - torch.where(free, slope, torch.inf).amin(1)
        size = torch.maximum(matrix.diagonal(dim1=1, dim2=2).abs().amax(1), spread)
        unit = torch.where(size > 0, size / torch.frexp(size).mantissa, 1.0)
        matrix, slope = matrix / unit.view(-1, 1, 1), slope / unit.view(-1, 1)
        ridge = 1e-13  # a little of the identity, where vertices depend on each other; it only shortens the step
        identity = torch.eye(slots, dtype=matrix.dtype, device=matrix.device)
        open_ = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        for _ in range(slots):
            inside = free.to(matrix.dtype)
            both = inside.unsqueeze(2) * inside.unsqueeze(1)
            # [K + ridge, 1; 1, 0] [change; multiplier] = [-slope; 0] on the free slots, change = 0 on the others.
            system = matrix * both + identity * torch.where(free, ridge, 1.0).unsqueeze(2)
            system = torch.nn.functional.pad(system, (0, 1, 0, 1))
            system[:, :slots, slots] = system[:, slots, :slots] = inside
            right = torch.nn.functional.pad(-slope * inside, (0, 1)).unsqueeze(2)
            change = torch.linalg.solve(system, right)[:, :slots, 0] * inside * open_.unsqueeze(1)
            # Along a negative curvature the solution is the highest point: away from it, until a weight is gone.
            bent = torch.einsum("bi,bij,bj->b", change, matrix, change)
            concave = (bent < -10.0 * ridge * vecdot(change, change)) & (change.abs().amax(1) > 1e-9)
            change = torch.where((concave & (vecdot(slope, change) > 0)).unsqueeze(1), -change, change)
            room = torch.where(change < 0, weight / -change, torch.inf)
            most, first = room.min(1)
            stopped = open_ & ((most < 1.0) | concave)
            step = torch.where(stopped, most, 1.0).unsqueeze(1)
            weight = (weight + step * change).clamp_(min=0.0)
            slope = slope + step * torch.einsum("bij,bj->bi", matrix, change)
            gone = torch.zeros_like(free).scatter_(1, first.unsqueeze(1), stopped.unsqueeze(1))
            weight = weight.masked_fill(gone, 0.0)
            free = free & ~gone
            open_ = stopped
            if not bool(open_.any()):
                break
        return weight / weight.sum(1, keepdim=True)

    def moved(self, view: View, move: Move, share: Tensor, limit: Tensor) -> None:
        atoms, step = self.atoms, view.pool.first(share).double().unsqueeze(1)
        atoms.weight = torch.lerp(atoms.weight, self.weight, step)
        atoms.settle()


@dataclass(frozen=True)
class Lazy(Direction):
    """Lazified: a vertex seen before that is good enough saves the oracle call (Braun, Pokutta and Zink, JMLR 2019).

    Good enough means progress of at least the current estimate of the gap over `patience`. Where no known
    vertex is, the oracle is asked, for those bands only, and its gap halves the estimate or certifies it.

    Parameters
    ----------
    patience : float
        At least 1.
    remember : int
        Vertices kept for each band; when there are so many all are forgotten.
    """

    patience: float = 2.0
    remember: int = 64

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1), remember=whole(1))

    def begin(self, view: View) -> Direction:
        estimate = view.pool.first(view.gap).double().clamp_min(0.0) / 2
        return _LazyRun(self, Atoms(view.pool.flat(view.vertex)), estimate)


@dataclass
class _LazyRun(Direction):
    rule: Lazy
    atoms: Atoms
    estimate: Tensor

    def way(self, view: View) -> Way:
        atoms, pool = self.atoms, view.pool
        gradient, x = pool.flat(view.gradient), pool.flat(view.x)
        least, slot = atoms.best(atoms.scores(gradient), largest=False)
        here = vecdot(gradient, x).double()
        enough = here - least > self.estimate / self.rule.patience
        vertex = atoms.dense(slot, x.dtype)
        asked = (~enough).nonzero().squeeze(1)
        if len(asked):
            rows = pool.rows_of(asked)
            found = pool.flat(view.ask_rows(rows))
            gap = vecdot(gradient[asked], x[asked] - found).double()
            estimate = self.estimate[asked]
            # The true gap is known here: it is what remains, or proof that the estimate was too high.
            self.estimate[asked] = torch.where(gap > estimate / self.rule.patience, estimate, gap.clamp_min(0.0) / 2)
            known = torch.full_like(here, torch.inf).index_copy_(0, asked, gap)
            view.known_gap = pool.spread(known.to(x.dtype))
            vertex = vertex.index_copy(0, asked, found)
            atoms.weight *= ((atoms.active < self.rule.remember) | enough).unsqueeze(1)
            atoms.add(vertex, (~enough).double())
        return Way(_flat(view, vertex) - view.x)

    def take(self, rows: Tensor, bands: Tensor) -> Direction:
        return _LazyRun(self.rule, self.atoms.take(bands), self.estimate[bands])
