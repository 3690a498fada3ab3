"""Directions on an active set: away, pairwise, blended pairwise, fully-corrective, lazified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.checks import check_settings, real, whole
from maskopt.problems import Direction, Quadratic
from maskopt.solvers.atoms import Atoms
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import DirectionRule, IterationState, SearchDirection

__all__ = ["Away", "BlendedPairwise", "FullyCorrective", "Lazy", "Pairwise"]


@dataclass(frozen=True)
class _OnAtoms(DirectionRule):
    """Base of the rules of this file: they start at a vertex."""

    from_vertex: ClassVar[bool] = True


@dataclass
class _Run(DirectionRule):
    """A run that carries its atoms; rules say which to use and how their weights change."""

    atoms: Atoms

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return type(self)(self.atoms.take(blocks))


def _first(state: IterationState) -> Atoms:
    return Atoms(state.row_blocks.flat(state.x))


def _flat(state: IterationState, per_block: Tensor) -> Tensor:
    """Return a (row blocks, entries) matrix in the shape of x."""
    return per_block.reshape(state.x.shape)


@dataclass(frozen=True)
class Away(_OnAtoms):
    """Away steps: leave the worst active vertex where that promises more (Guélat and Marcotte, 1986).

    As analysed by Lacoste-Julien and Jaggi (NeurIPS 2015, algorithm 1): linear convergence on polytopes.
    """

    def begin(self, state: IterationState) -> DirectionRule:
        return _AwayRun(_first(state))


@dataclass
class _AwayRun(_Run):
    def search_direction(self, state: IterationState) -> SearchDirection:
        atoms, row_blocks = self.atoms, state.row_blocks
        gradient, x = row_blocks.flat(state.gradient), row_blocks.flat(state.x)
        worst, slot = atoms.best(atoms.scores(gradient), largest=True)
        weight = atoms.weight_of(slot)
        gain = worst - vecdot(gradient, x)
        # A point that is its only vertex has nowhere to go away to.
        away = (gain > row_blocks.first(state.gap)) & (weight < 1.0)
        self.slot, self.away = slot, away
        back = x - atoms.dense(slot, x.dtype)
        search = torch.lerp(row_blocks.flat(state.toward), back, away.to(x.dtype).unsqueeze(1))
        max_step = torch.where(away, weight / (1.0 - weight), 1.0)
        return SearchDirection(_flat(state, search), row_blocks.spread(max_step.to(x.dtype)))

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        row_blocks, atoms = state.row_blocks, self.atoms
        step, full = row_blocks.first(step_size).double(), row_blocks.first(step_size >= max_step)
        signed = torch.where(self.away, step, -step)
        atoms.weight *= (1.0 + signed).unsqueeze(1)
        atoms.shift(self.slot, torch.where(self.away, -step, 0.0))
        atoms.empty(self.slot, self.away & full)
        atoms.add(row_blocks.flat(state.vertex), torch.where(self.away, 0.0, step))
        atoms.settle()


@dataclass(frozen=True)
class Pairwise(_OnAtoms):
    """Pairwise steps: weight goes from the worst active vertex to the oracle's (Mitchell et al., 1974).

    As analysed by Lacoste-Julien and Jaggi (NeurIPS 2015, algorithm 2).
    """

    def begin(self, state: IterationState) -> DirectionRule:
        return _PairwiseRun(_first(state))


@dataclass
class _PairwiseRun(_Run):
    def search_direction(self, state: IterationState) -> SearchDirection:
        atoms, row_blocks = self.atoms, state.row_blocks
        _, self.slot = atoms.best(atoms.scores(row_blocks.flat(state.gradient)), largest=True)
        search = row_blocks.flat(state.vertex) - atoms.dense(self.slot, state.x.dtype)
        return SearchDirection(_flat(state, search), row_blocks.spread(atoms.weight_of(self.slot).to(search.dtype)))

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        row_blocks, atoms = state.row_blocks, self.atoms
        step = row_blocks.first(step_size).double()
        atoms.shift(self.slot, -step)
        atoms.empty(self.slot, row_blocks.first(step_size >= max_step))
        atoms.add(row_blocks.flat(state.vertex), step)
        atoms.settle()


@dataclass(frozen=True)
class BlendedPairwise(_OnAtoms):
    """Shift weight between active vertices while that promises enough, else to the oracle's vertex.

    Tsuji, Tanaka and Pokutta (ICML 2022, algorithm 1): keeps by far the fewest vertices.

    Parameters
    ----------
    patience : float
        Stays while the active vertices promise at least the gap over this; at least 1.
    """

    patience: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1))

    def begin(self, state: IterationState) -> DirectionRule:
        return _BlendedRun(_first(state), self.patience)


@dataclass
class _BlendedRun(_Run):
    patience: float = 1.0

    def search_direction(self, state: IterationState) -> SearchDirection:
        atoms, row_blocks = self.atoms, state.row_blocks
        scores = atoms.scores(row_blocks.flat(state.gradient))
        worst, self.drop = atoms.best(scores, largest=True)
        best, self.gain = atoms.best(scores, largest=False)
        self.local = (worst - best) * self.patience >= row_blocks.first(state.gap)
        dtype = state.x.dtype
        within = atoms.dense(self.gain, dtype) - atoms.dense(self.drop, dtype)
        outward = row_blocks.flat(state.toward)
        search = torch.lerp(outward, within, self.local.to(dtype).unsqueeze(1))
        max_step = torch.where(self.local, atoms.weight_of(self.drop), 1.0).to(dtype)
        return SearchDirection(_flat(state, search), row_blocks.spread(max_step))

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        row_blocks, atoms = state.row_blocks, self.atoms
        step, full = row_blocks.first(step_size).double(), row_blocks.first(step_size >= max_step)
        within, outward = torch.where(self.local, step, 0.0), torch.where(self.local, 0.0, step)
        atoms.weight *= (1.0 - outward).unsqueeze(1)
        atoms.shift(self.gain, within)
        atoms.shift(self.drop, -within)
        atoms.empty(self.drop, self.local & full)
        atoms.add(row_blocks.flat(state.vertex), outward)
        atoms.settle()

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return _BlendedRun(self.atoms.take(blocks), self.patience)


@dataclass(frozen=True)
class FullyCorrective(_OnAtoms):
    """After every new vertex, minimise over the hull of all active ones.

    Wolfe's method of minor cycles (Mathematical Programming 11, 1976), for any quadratic: go to the minimiser over the
    affine hull, or as far as no weight turns negative, drop the vertices whose weight is gone, and repeat. Where the
    quadratic is concave there, away from that saddle as far as weights allow. The small systems see the vertices
    through their inner products with the Hessian, at one matrix product per new vertex.
    """

    requires: ClassVar[Requirements] = Requirements((Quadratic,))

    def begin(self, state: IterationState) -> DirectionRule:
        run = _CorrectiveRun(_first(state))
        run.extend(state, torch.zeros(run.atoms.blocks, dtype=torch.int64, device=state.x.device), state.x)
        return run


@dataclass
class _CorrectiveRun(_Run):
    def extend(self, state: IterationState, slot: Tensor, vertex: Tensor) -> None:
        """Fill in the inner products of one slot per row block."""
        product = state.quadratic.hessian(state.hvp(vertex))
        atoms, every = self.atoms, torch.arange(self.atoms.blocks, device=slot.device)
        products = atoms.scores(state.row_blocks.flat(product))
        if atoms.matrix is None:
            atoms.matrix = products.new_zeros((atoms.blocks, products.shape[1], products.shape[1]))
        atoms.matrix[every, slot, :] = products
        atoms.matrix[every, :, slot] = products

    def search_direction(self, state: IterationState) -> SearchDirection:
        atoms, row_blocks = self.atoms, state.row_blocks
        vertex = row_blocks.flat(state.vertex)
        nothing = torch.zeros(atoms.blocks, dtype=torch.float64, device=vertex.device)
        slot = atoms.add(vertex, nothing, where=torch.ones_like(nothing, dtype=torch.bool))
        self.extend(state, slot, state.vertex)
        free = atoms.weight > 0
        free.scatter_(1, slot.unsqueeze(1), True)
        self.weight = self._corrected(atoms.scores(row_blocks.flat(state.gradient)), free)
        search = atoms.combined(self.weight, state.x.dtype) - row_blocks.flat(state.x)
        return SearchDirection(_flat(state, search), best=True)

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
            product = torch.einsum("bi,bij,bj->b", change, matrix, change)
            concave = (product < -10.0 * ridge * vecdot(change, change)) & (change.abs().amax(1) > 1e-9)
            change = torch.where((concave & (vecdot(slope, change) > 0)).unsqueeze(1), -change, change)
            possible = torch.where(change < 0, weight / -change, torch.inf)
            most, first = possible.min(1)
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
        # Where the system is so ill-conditioned that no weights come out of it, the present ones stay.
        total = weight.sum(1, keepdim=True)
        return torch.where(total.isfinite() & (total > 0), weight / total, self.atoms.weight)

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        atoms, step = self.atoms, state.row_blocks.first(step_size).double().unsqueeze(1)
        atoms.weight = torch.lerp(atoms.weight, self.weight, step)
        atoms.settle()


@dataclass(frozen=True)
class Lazy(DirectionRule):
    """Lazified: a vertex seen before that is good enough saves the oracle call (Braun, Pokutta and Zink, JMLR 2019).

    Good enough means progress of at least the current estimate of the gap over `patience`. Where no known
    vertex is, the oracle is asked, for those row blocks only, and its gap halves the estimate or certifies it.

    Parameters
    ----------
    patience : float
        At least 1.
    remember : int
        Vertices kept for each row block; when there are so many all are forgotten.
    """

    patience: float = 2.0
    remember: int = 64

    def __post_init__(self) -> None:
        check_settings(self, patience=real(1), remember=whole(1))

    def begin(self, state: IterationState) -> DirectionRule:
        estimate = state.row_blocks.first(state.gap).double().clamp_min(0.0) / 2
        return _LazyRun(self, Atoms(state.row_blocks.flat(state.vertex)), estimate)


@dataclass
class _LazyRun(DirectionRule):
    rule: Lazy
    atoms: Atoms
    estimate: Tensor

    def search_direction(self, state: IterationState) -> SearchDirection:
        atoms, row_blocks = self.atoms, state.row_blocks
        gradient, x = row_blocks.flat(state.gradient), row_blocks.flat(state.x)
        minimum, slot = atoms.best(atoms.scores(gradient), largest=False)
        here = vecdot(gradient, x).double()
        enough = here - minimum > self.estimate / self.rule.patience
        vertex = atoms.dense(slot, x.dtype)
        asked = (~enough).nonzero().squeeze(1)
        if len(asked):
            rows = row_blocks.rows_of(asked)
            found = row_blocks.flat(state.ask_rows(rows))
            gap = vecdot(gradient[asked], x[asked] - found).double()
            estimate = self.estimate[asked]
            # The true gap is known here: it is what remains, or proof that the estimate was too high.
            self.estimate[asked] = torch.where(gap > estimate / self.rule.patience, estimate, gap.clamp_min(0.0) / 2)
            known = torch.full_like(here, torch.inf).index_copy_(0, asked, gap)
            state.known_gap = row_blocks.spread(known.to(x.dtype))
            vertex = vertex.index_copy(0, asked, found)
            atoms.weight *= ((atoms.active < self.rule.remember) | enough).unsqueeze(1)
            atoms.add(vertex, (~enough).double())
        return SearchDirection(_flat(state, vertex) - state.x)

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return _LazyRun(self.rule, self.atoms.take(blocks), self.estimate[blocks])
