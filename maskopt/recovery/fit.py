"""The one loop that fits weights, and masks where a rule moves them, to an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError
from maskopt.recovery.base import Masked, MaskRule, MaskState, Objective
from maskopt.recovery.fixed import FixedMasks
from maskopt.recovery.trained import Product, Trained, Values

__all__ = ["TRIAL", "Fitted", "clearly_smaller", "fit"]

TRIAL = 12
"""A trial of a step size has one step for so many of the fit."""

_BETAS = (0.9, 0.95)
_ZERO = 1e-12  # of a gradient, relative to loss and weight
_SIZES = (0.5, 0.24, 0.08, 0.027, 0.009)  # step sizes that are tried, the largest first
# Short trials choose too small a size: for a block of SmolLM2-135M 10 steps chose .24 and 21 steps .5, which is better
# after 128 steps, too.
_SHORTEST = 24  # steps of a trial, or all of the fit
# A trial has no time to average the noise of large steps out: on four objectives (blocks and models) the best size of a
# whole fit was three times the best of short ones.
_SHORT = 3.0
_WARM = 16  # steps, at most, until steps have their full size


@dataclass(frozen=True, eq=False)
class Fitted:
    """The result of `fit`.

    Attributes
    ----------
    before, after : Tensor
        Loss of each held-out sequence, float64; equal if nothing was accepted.
    losses : list of float
        Training loss of each step.
    step_size : float
        Of the fit.
    steps : int
        That were done.
    changed : float
        Fraction of the kept entries that are others than before.
    accepted : bool
        Whether weights and masks are new.
    """

    before: Tensor
    after: Tensor
    losses: list[float]
    step_size: float
    steps: int
    changed: float
    accepted: bool


def clearly_smaller(losses: Tensor, others: Tensor) -> bool:
    """Whether losses are smaller than others on the same sequences by more than the differences' standard error.

    Parameters
    ----------
    losses, others : Tensor
        Shape (sequences,).

    Examples
    --------
    >>> import torch
    >>> clearly_smaller(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.1, 2.1, 3.2]))
    True
    >>> clearly_smaller(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.2, 3.5, 3.0]))
    False
    """
    difference = losses - others
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()) + error < 0.0


def fit(
    objective: Objective,
    weights: Sequence[Masked],
    others: Sequence[nn.Parameter],
    rule: MaskRule,
    steps: int,
    *,
    step_size: float | None = None,
    largest: float = _SIZES[0],
    seed: int = 0,
    rank: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> Fitted:
    """Fit weights to an objective, in place, and keep the best of the states met that held-out data prefers.

    Adam with a warm-up and linear decay. Steps are relative, because one learning rate cannot serve tensors of all
    sizes: every tensor's is `step_size` times the root mean square of its nonzero entries over the square root of the
    number of inputs, so that a step changes outputs by about that fraction at any width. Once a pass over the
    micro-batches, at the end, and where masks stand, the held-out loss is measured; the best state stays, and the state
    from before unless the best is better by more than the standard error. A fit that is worse than before by as much
    at half its steps, or later, ends.

    Parameters
    ----------
    objective : Objective
        Of a module with these parameters.
    weights : sequence of Masked
        Pruned weights; their masks may change.
    others : sequence of nn.Parameter
        Further parameters to fit.
    rule : MaskRule
        How masks move.
    steps : int
        Of the optimizer.
    step_size : float, optional
        By default the largest of five, a third of which lowers the held-out loss in a short trial with fixed masks; a
        third of it if the fit is then no better than the state before. Where masks move and nothing is gained, they are
        fixed in a last attempt.
    largest : float
        No larger step size is tried.
    seed : int
        Of the order of the micro-batches, and of factors.
    rank : int, optional
        Change pruned weights by masked products of this rank (`Product`); masks must then be fixed.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Fitted

    Raises
    ------
    MaskoptError
        If the set of a weight lacks what the rule needs, or masks are to move in a fit of low rank.

    Notes
    -----
    Memory beside the module, in bytes per entry of a float32 parameter: 8 of Adam, 4 for the best state, 4 for the
    values of pruned entries where masks move, and the largest parameter's gradient (with several processes, all
    gradients: another 4). With `rank` the first three are those of the factors, and there is a copy of the parameter.
    """
    for weight in weights:
        rule.check(weight.masks)
    if rank is not None and rule.moves:
        raise MaskoptError(
            f"A fit of low rank needs fixed masks; {type(rule).__name__} moves them, so use FixedMasks()."
        )
    run = _Fit(objective, weights, others, seed, rank)
    trial = max(min(_SHORTEST, steps), steps // TRIAL)
    total, done, told = steps + (trial if step_size is None else 0), 0, 0.0

    def tell() -> None:
        nonlocal done, told
        done += 1
        told = max(told, min(1.0, done / total))  # further attempts do not set it back
        if progress is not None:
            progress(told)

    with run.gradients_on():
        size = _SIZES[-1] if step_size is None else step_size
        for candidate in [size for size in _SIZES[:-1] if size <= largest and step_size is None]:
            total = max(total, done + trial + steps)
            if run.improves(candidate / _SHORT, trial, tell):
                size = candidate
                break
        attempts = [(rule, size), *([(rule, size / _SHORT)] if step_size is None else [])]
        if rule.moves:
            # On little data masks that move may only fit noise, where weights alone still gain.
            attempts.append((FixedMasks(), size))
        for how, length in attempts:
            total = done + steps
            fitted = run.whole(how, length, steps, tell)
            if fitted.accepted:
                break
        return fitted


class _Fit:
    """Parameters, and their best state so far.

    Parameters
    ----------
    objective, weights, others, seed, rank
        As for `fit`.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Sequence[Masked],
        others: Sequence[nn.Parameter],
        seed: int,
        rank: int | None = None,
    ) -> None:
        self._objective, self._weights, self._seed = objective, list(weights), seed
        self._before = objective.held_out()
        self._best = self._before
        self._masks = [weight.mask for weight in weights]
        pruned = [
            Values(weight.parameter, weight) if rank is None else Product(weight, rank, seed + index)
            for index, weight in enumerate(weights)
        ]
        self._trained: list[Trained] = [*pruned, *(Values(parameter) for parameter in others)]
        self._parameters = [trained.parameter for trained in self._trained]
        self._moving = len(self._weights) if rank is None else 0  # weights whose gradient a rule changes

    @contextmanager
    def gradients_on(self) -> Iterator[None]:
        """Record gradients of these parameters; leave them with the best state, whatever happens inside."""
        flags = [parameter.requires_grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)
            self._restore()

    def improves(self, step_size: float, steps: int, tell: Callable[[], None]) -> bool:
        """Whether a few steps with fixed masks lower the held-out loss; the state is that of before again."""
        # Without a warm-up: what is too large shows at once.
        done = sum(1 for _ in self._run(FixedMasks(), step_size, steps, 1, tell))
        loss = float(self._objective.held_out().mean())
        self._restore()
        return done == steps and loss < float(self._before.mean())

    def whole(self, rule: MaskRule, step_size: float, steps: int, tell: Callable[[], None]) -> Fitted:
        """Fit, and keep the best state."""
        self._restore()
        losses: list[float] = []
        first = list(self._masks)
        for loss in self._run(rule, step_size, steps, max(1, min(_WARM, steps // 6)), tell):
            losses.append(loss)
            ends = len(losses) % self._objective.batches == 0 or len(losses) == steps
            if ends and all(weight.settled for weight in self._weights):
                hopeless = not self._measure()
                if hopeless and 2 * len(losses) >= steps:
                    break
        accepted = self._best is not self._before
        kept = sum(int(mask.sum()) for mask in first)
        new = sum(int((mask & ~before).sum()) for mask, before in zip(self._masks, first, strict=True))
        return Fitted(self._before, self._best, losses, step_size, len(losses), new / max(1, kept), accepted)

    def _measure(self) -> bool:
        """Remember the state if it is the best so far; return whether it is no worse than that of before."""
        losses = self._objective.held_out()
        better = float(losses.mean()) < float(self._best.mean()) and clearly_smaller(losses, self._before)
        if better:
            self._best = losses
            for trained in self._trained:
                trained.save()
            self._masks = [weight.mask.clone() for weight in self._weights]
        return not clearly_smaller(self._before, losses)

    def _restore(self) -> None:
        for trained in self._trained:
            trained.restore()
            trained.parameter.grad = None
        for weight, mask in zip(self._weights, self._masks, strict=True):
            weight.settle(mask, weight.parameter.data)

    def _run(
        self, rule: MaskRule, step_size: float, steps: int, warm: int, tell: Callable[[], None]
    ) -> Iterator[float]:
        """Do the steps, of full size after `warm` of them, and yield the loss of each; end where it is no number."""
        for trained in self._trained:
            trained.begin(apart=rule.moves)
        optimizers = [torch.optim.Adam(_groups(trained), betas=_BETAS, eps=_ZERO) for trained in self._trained]
        state = rule.begin(self._weights, steps)
        self._write()
        order = _orders(self._objective.batches, self._seed)
        for step in range(steps):
            rate = step_size * min(1.0, (step + 1) / warm) * (1.0 - step / steps)
            with torch.enable_grad():
                loss = self._objective.loss(next(order))
            value = self._mean(loss)
            if not math.isfinite(value):
                return
            state.observed(value)
            with self._stepping(optimizers, state, step, rate):
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
            state.stepped(step + 1)
            self._write()
            tell()
            yield value

    @contextmanager
    def _stepping(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        state: MaskState,
        step: int,
        rate: float,
    ) -> Iterator[None]:
        """Change each parameter as soon as its gradient is known, so that only few gradients exist at a time.

        A parameter's gradient is complete only when the backward pass no longer needs the parameter. One without a
        gradient, such as that of an expert that no token chose, stays.
        """

        def change(index: int, gradient: Tensor) -> None:
            trained = self._trained[index]
            trained.receive(gradient)
            if index < self._moving:
                state.gradient(self._weights[index], step)
            for group, size in zip(optimizers[index].param_groups, trained.sizes, strict=True):
                group["lr"] = rate * size
            with torch.no_grad():
                optimizers[index].step()
            optimizers[index].zero_grad()

        if self._objective.spread:
            yield
            self._change_together(change)
            return
        hooks = []
        for index, parameter in enumerate(self._parameters):

            def take(parameter: Tensor, index: int = index) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                change(index, gradient)

            hooks.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _change_together(self, change: Callable[[int, Tensor], None]) -> None:
        """Change parameters by the mean gradient of several processes, once each of them has all of its own.

        In the order of gradients processes might wait for each other in vain: an expert may have tokens in one only.
        """
        own = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        for index, gradient in enumerate(self._objective.averaged(own, self._parameters)):
            if gradient is not None:
                change(index, gradient)

    def _mean(self, loss: Tensor) -> float:
        """Return a loss, or its mean over several processes."""
        (mean,) = self._objective.averaged([loss.detach().clone()], [loss])
        assert mean is not None, "there is a loss"
        return float(mean)

    def _write(self) -> None:
        for trained in self._trained:
            trained.write()


def _groups(trained: Trained) -> list[dict[str, list[Tensor]]]:
    """Return a parameter group for each tensor, because each has its own step size."""
    return [{"params": [tensor]} for tensor in trained.tensors]


def _orders(batches: int, seed: int) -> Iterator[int]:
    """Yield batch numbers: all in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()
