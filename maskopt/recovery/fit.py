"""The one loop that fits weights, and masks where a rule moves them, to an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskopt.recovery.base import Masked, MaskRule, MaskState, Objective
from maskopt.recovery.fixed import FixedMasks

__all__ = ["Fitted", "clearly_smaller", "fit"]

_BETAS = (0.9, 0.95)
_ZERO = 1e-12  # of a gradient, relative to loss and weight
_SIZES = (0.5, 0.24, 0.08, 0.027, 0.009)  # step sizes that are tried, the largest first
_TRIAL = 12  # a trial has one step for so many of the fit
_SHORTEST = 8  # steps of a trial
# A trial has no time to average the noise of large steps out: on four objectives (blocks and models) the best size of a
# whole fit was three times the best of short ones.
_SHORT = 3.0
_SPREAD = 2.0  # root mean square of entries over their median, at most; 1.5 where they are normal
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
        Of the order of the micro-batches.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Fitted

    Raises
    ------
    MaskoptError
        If the set of a weight lacks what the rule needs.

    Notes
    -----
    Memory beside the module, in bytes per entry of a float32 parameter: 8 of Adam, 4 for the best state, 4 for the
    values of pruned entries where masks move, and the largest parameter's gradient.
    """
    for weight in weights:
        rule.requires.check_set(weight.masks, type(rule).__name__)
    run = _Fit(objective, weights, others, seed)
    trial = max(_SHORTEST, steps // _TRIAL)
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
    objective, weights, others, seed
        As for `fit`.
    """

    def __init__(
        self, objective: Objective, weights: Sequence[Masked], others: Sequence[nn.Parameter], seed: int
    ) -> None:
        self._objective, self._weights, self._seed = objective, list(weights), seed
        self._parameters = [*(weight.parameter for weight in weights), *others]
        self._before = objective.held_out()
        self._best = self._before
        self._saved = [parameter.data.clone() for parameter in self._parameters]
        self._masks = [weight.mask for weight in weights]
        pruned = {id(weight.parameter): weight for weight in weights}
        self._sizes = [_size(parameter, pruned.get(id(parameter))) for parameter in self._parameters]

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
            for saved, parameter in zip(self._saved, self._parameters, strict=True):
                saved.copy_(parameter.data)
            self._masks = [weight.mask.clone() for weight in self._weights]
        return not clearly_smaller(self._before, losses)

    def _restore(self) -> None:
        for parameter, saved in zip(self._parameters, self._saved, strict=True):
            parameter.data.copy_(saved)
            parameter.grad = None
        for weight, mask in zip(self._weights, self._masks, strict=True):
            weight.settle(mask, weight.parameter.data)

    def _run(
        self, rule: MaskRule, step_size: float, steps: int, warm: int, tell: Callable[[], None]
    ) -> Iterator[float]:
        """Do the steps, of full size after `warm` of them, and yield the loss of each; end where it is no number."""
        masters = [
            _master(parameter, apart=rule.moves and index < len(self._weights))
            for index, parameter in enumerate(self._parameters)
        ]
        for weight, master in zip(self._weights, masters, strict=False):
            weight.master = master
        optimizers = [torch.optim.Adam([master], betas=_BETAS, eps=_ZERO) for master in masters]
        state = rule.begin(self._weights, steps)
        self._write(masters)
        order = _orders(self._objective.batches, self._seed)
        for step in range(steps):
            rate = step_size * min(1.0, (step + 1) / warm) * (1.0 - step / steps)
            with torch.enable_grad():
                loss = self._objective.loss(next(order))
            value = float(loss.detach())
            if not math.isfinite(value):
                return
            state.observed(value)
            with self._stepping(masters, optimizers, state, step, rate):
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
            state.stepped(step + 1)
            self._write(masters)
            tell()
            yield value

    @contextmanager
    def _stepping(
        self,
        masters: Sequence[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        state: MaskState,
        step: int,
        rate: float,
    ) -> Iterator[None]:
        """Change each master as soon as its gradient is known, so that only few gradients exist at a time.

        A parameter's gradient is complete only when the backward pass no longer needs the parameter. One without a
        gradient, such as that of an expert that no token chose, stays.
        """
        hooks = []
        for index, parameter in enumerate(self._parameters):

            def change(parameter: Tensor, index: int = index) -> None:
                master, size = masters[index], self._sizes[index]
                assert parameter.grad is not None
                # Of the relative size: what Adam takes for zero must not depend on the units of a weight.
                master.grad = parameter.grad.to(master.dtype).mul_(size)
                parameter.grad = None
                if index < len(self._weights):
                    state.gradient(self._weights[index], step)
                optimizers[index].param_groups[0]["lr"] = rate * size
                with torch.no_grad():
                    optimizers[index].step()
                master.grad = None

            hooks.append(parameter.register_post_accumulate_grad_hook(change))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _write(self, masters: Sequence[Tensor]) -> None:
        for weight in self._weights:
            weight.write()
        first = len(self._weights)
        for parameter, master in zip(self._parameters[first:], masters[first:], strict=True):
            if master.data_ptr() != parameter.data_ptr():
                parameter.data.copy_(master.detach())


def _master(parameter: nn.Parameter, *, apart: bool) -> Tensor:
    """Return what the optimizer changes: the parameter's own values where these are exact enough, or a copy."""
    exact = parameter.dtype in (torch.float32, torch.float64)
    values = parameter.data if exact else parameter.data.float()
    return (values.clone() if exact and apart else values).detach().requires_grad_(True)


def _size(parameter: nn.Parameter, weight: Masked | None) -> float:
    """Return the root mean square of the nonzero entries over the square root of the number of inputs.

    At most twice the median size stands for the root mean square: a few huge entries must not set the step of all.
    """
    values = parameter.data.float()
    inputs = parameter.shape[-1] if weight is None else weight.oriented(parameter).shape[1]
    values = values[values != 0].abs()
    if not len(values):
        return 0.0
    size = min(float(values.square().mean().sqrt()), _SPREAD * float(values.median()))
    return size / math.sqrt(inputs)


def _orders(batches: int, seed: int) -> Iterator[int]:
    """Yield batch numbers: all in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()
