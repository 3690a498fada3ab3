"""Directions that need no memory of vertices: vanilla, conjugate, boosted, momentum, stochastic, block-coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.checks import SEEDS, check_settings, real, whole
from maskopt.oracles import HasGroups
from maskopt.problems import Direction, Quadratic
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import DirectionRule, IterationState, SearchDirection

__all__ = ["BlockCoordinate", "Boosted", "Conjugate", "Momentum", "Stochastic", "Vanilla"]


@dataclass(frozen=True)
class Vanilla(DirectionRule):
    """Go to the oracle's vertex: the method of Frank and Wolfe.

    It needs nothing but the oracle, keeps nothing, and zig-zags on ill-conditioned objectives.

    References
    ----------
    Frank and Wolfe, "An algorithm for quadratic programming", Naval Research Logistics Quarterly 3, 1956.
    """

    def search_direction(self, state: IterationState) -> SearchDirection:
        return SearchDirection(state.toward)


@dataclass(frozen=True)
class Conjugate(DirectionRule):
    """Mix the direction to the vertex with the previous direction so that successive directions are conjugate.

    With H the Hessian, p the previous direction and v = vertex - x, the new direction (1 - a) v + a p has
    <p, H ((1 - a) v + a p)> = 0 (Mitradjieva and Lindberg, Transportation Science 47(2), 2013, section 3). H p is
    known, so it costs no matrix product; it removes most of the zig-zagging that ill-conditioned layers cause.

    Parameters
    ----------
    slack : float
        Smallest fraction 1 - a of the vertex.
    """

    slack: float = 0.2

    requires: ClassVar[Requirements] = Requirements((Quadratic,))

    def __post_init__(self) -> None:
        check_settings(self, slack=real(0, 1))

    def begin(self, state: IterationState) -> DirectionRule:
        return _ConjugateRun(self.slack)


@dataclass
class _ConjugateRun(DirectionRule):
    slack: float
    previous: Direction | None = None
    """From the point to where the last direction ends at full length."""

    def search_direction(self, state: IterationState) -> SearchDirection:
        return SearchDirection(state.toward)

    def correct(self, state: IterationState, direction: Direction) -> Direction:
        if self.previous is not None:
            product = state.quadratic.hessian(self.previous)
            cross, own = state.dot(product, direction.vector), state.dot(product, self.previous.vector)
            step_size = (cross / (cross - own)).nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, 1.0 - self.slack)
            direction.blend_(self.previous, step_size.unsqueeze(1))
        return direction

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        direction.scale_(1.0 - step_size.unsqueeze(1))
        self.previous = direction

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return _ConjugateRun(self.slack, None if self.previous is None else self.previous.take(rows))


@dataclass(frozen=True)
class Boosted(DirectionRule):
    """Pursue the negative gradient with several vertices (Combettes and Pokutta, ICML 2020, algorithm 2).

    Each round adds the multiple of (vertex - x), or takes back some of what there is, that brings the direction
    nearest to the negative gradient; it ends where the angle improves by less than `accuracy`.

    Parameters
    ----------
    rounds : int
        Oracle calls at most; one matrix product in all.
    accuracy : float
        Least improvement of the cosine.
    """

    rounds: int = 8
    accuracy: float = 1e-3

    def __post_init__(self) -> None:
        check_settings(self, rounds=whole(1), accuracy=real(0, 2))

    def search_direction(self, state: IterationState) -> SearchDirection:
        goal = state.gradient.neg()
        length = state.dot(goal, goal).sqrt()
        toward = state.toward
        sum_, total = torch.zeros_like(toward), length.new_zeros(len(length))
        cosine = length.new_full((len(length),), -1.0)
        open_ = torch.ones_like(cosine)
        for number in range(self.rounds):
            rest = goal - sum_
            if number:
                toward = state.oracle(rest.neg()) - state.x
            norm = state.dot(sum_, sum_).sqrt()
            back = vecdot(rest, sum_)
            pull = state.dot(rest, toward)
            retreat = -state.row_blocks(back) / norm
            uses_vertex = ~(retreat > pull)  # also where there is nothing to take back
            amount = pull / state.dot(toward, toward)
            # Taking back at most what there is.
            cut = (retreat / norm).clamp(max=1.0)
            amount = amount.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
            add = torch.where(uses_vertex, amount, 0.0)
            keep = torch.where(uses_vertex, 1.0, 1.0 - cut.nan_to_num(0.0, 0.0, 0.0))
            trial = torch.addcmul(sum_ * keep.unsqueeze(1), toward, add.unsqueeze(1))
            trial_total = total * keep + add
            angle = state.dot(trial, goal) / (state.dot(trial, trial).sqrt() * length)
            better = open_ * (angle.nan_to_num(-1.0, -1.0, -1.0) - cosine >= self.accuracy)
            if not bool(better.any()):
                break
            sum_ = torch.lerp(sum_, trial, better.unsqueeze(1))
            total, cosine = torch.lerp(total, trial_total, better), torch.lerp(cosine, angle.nan_to_num(-1.0), better)
            open_ = better
        scale = torch.where(total > 0, 1.0 / total, 0.0)
        return SearchDirection(sum_.mul_(scale.unsqueeze(1)))


@dataclass(frozen=True)
class Momentum(DirectionRule):
    """Go to the vertex of an averaged gradient (Li, Sadeghi and Giannakis, IEEE TSP 2022, algorithm 2).

    An average certifies nothing, so the gap is taken with the true gradient, at an oracle call of its own.

    Parameters
    ----------
    check : int
        Iterations between gaps.
    """

    check: int = 10

    def __post_init__(self) -> None:
        check_settings(self, check=whole(1))

    def begin(self, state: IterationState) -> DirectionRule:
        return _MomentumRun(self.check, torch.zeros_like(state.x))


@dataclass
class _MomentumRun(DirectionRule):
    check: int
    average: Tensor

    def search_direction(self, state: IterationState) -> SearchDirection:
        if state.iteration % self.check == 0:
            _ = state.gap
        self.average = torch.lerp(self.average, state.gradient, 2.0 / (state.iteration + 2))
        return SearchDirection(state.oracle(self.average) - state.x)

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return _MomentumRun(self.check, self.average[rows])


@dataclass(frozen=True)
class Stochastic(DirectionRule):
    """Go to the vertex of an average of sampled gradients (Mokhtari, Hassani and Karbasi, JMLR 2020).

    `Problem.sampled` makes the estimates: of a layer, from a fraction of its inputs. Gaps come from whole gradients.

    Parameters
    ----------
    fraction : float
        Of the inputs in each sample.
    check : int
        Iterations between whole gradients.
    seed : int
        Equal seeds give equal runs.
    """

    fraction: float = 0.25
    check: int = 50
    seed: int = 0

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self, fraction=real(0, 1, above=True), check=whole(1), seed=whole(*SEEDS))

    def begin(self, state: IterationState) -> DirectionRule:
        return _StochasticRun(self, state.gradient.clone(), torch.Generator().manual_seed(self.seed))


@dataclass
class _StochasticRun(DirectionRule):
    rule: Stochastic
    average: Tensor
    random: torch.Generator

    exact: ClassVar[bool] = False

    def search_direction(self, state: IterationState) -> SearchDirection:
        if state.iteration % self.rule.check == 0:
            state.point.gradient.copy_(state.objective.evaluate(state.x).gradient)
            state.counters["products"] += 1
            state.renew()
            _ = state.gap
        estimate = state.objective.sampled(state.x, self.rule.fraction, self.random)
        state.counters["samples"] += 1
        self.average = torch.lerp(self.average, estimate, 4.0 / (state.iteration + 8) ** (2 / 3))
        return SearchDirection(state.oracle(self.average) - state.x)

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return _StochasticRun(self.rule, self.average[rows], self.random)


@dataclass(frozen=True)
class BlockCoordinate(DirectionRule):
    """Change some groups only, in turn (Lacoste-Julien, Jaggi, Schmidt and Pletscher, ICML 2013).

    The hull of a set with groups is a product; every group's part of the vertex is a step of its own. Row blocks are
    independent anyway: the groups of each take turns.

    Parameters
    ----------
    blocks : int
        Every group changes in one of so many iterations, or in one of as many as its row block has groups, if fewer.
    """

    blocks: int = 2

    requires: ClassVar[Requirements] = Requirements(masks=(HasGroups,))

    def __post_init__(self) -> None:
        check_settings(self, blocks=whole(1))

    def search_direction(self, state: IterationState) -> SearchDirection:
        search = state.toward
        groups = state.groups.groups(search)
        # Counted within a row block, so that a row block's answer does not depend on which others are solved with it.
        within = len(groups) * state.row_blocks.row_block // len(search)
        number = torch.arange(len(groups), device=search.device) % within
        turn = (number + state.iteration) % min(self.blocks, within) == 0
        return SearchDirection(state.groups.ungroup(groups * turn.to(search.dtype).unsqueeze(1), search.shape))
