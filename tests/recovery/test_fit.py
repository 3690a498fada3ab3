"""Fitting weights and masks to an objective: what stays true of every rule."""

import pytest
import torch
from torch import nn

from maskopt.oracles import NM, Columns, PerRow, Unstructured
from maskopt.recovery import RULES, Continuation, FixedMasks, Masked, Objective, Recovery, clearly_smaller, fit

SETS = {"per-row": PerRow(0.5), "2:4": NM(keep=2, group=4), "unstructured": Unstructured(0.4), "columns": Columns(0.5)}


class Regression(Objective):
    """Outputs of a linear layer on given inputs; `held` says what the held-out outputs should be."""

    def __init__(self, rows=6, d=8, tokens=64, seed=0, dtype=torch.float64, held=None, unit=1.0, transposed=False):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
        self.x = torch.randn(5, tokens, d, generator=generator, dtype=torch.float64) @ mix
        weight = torch.randn(rows, d, generator=generator, dtype=torch.float64)
        self.y = self.x @ weight.T
        self.transposed, self.unit = transposed, unit
        stored = weight.T.contiguous() if transposed else weight
        self.parameter = nn.Parameter((unit * stored).to(dtype), requires_grad=False)
        self.held = self.y[-1] if held is None else held(self.y[-1])
        self.fail_at, self.calls = None, 0
        self.seen = []

    def masked(self, masks):
        score = -self._matrix().detach().abs().float()
        mask = masks.lmo_mask(score)
        mask = mask.T.contiguous() if self.transposed else mask
        self.parameter.data.masked_fill_(~mask, 0.0)
        return Masked(self.parameter, mask, masks, transposed=self.transposed)

    def _matrix(self):
        return self.parameter.T if self.transposed else self.parameter

    def _error(self, index, y):
        output = self.x[index] @ self._matrix().double().T / self.unit
        return (output - y).square().sum() / self.y.square().sum()

    @property
    def batches(self):
        return 4

    def loss(self, index):
        self.calls += 1
        if self.fail_at == self.calls:
            raise KeyboardInterrupt
        self.seen.append(self.parameter.detach().clone())
        return self._error(index, self.y[index])

    def held_out(self):
        return torch.stack([self._error(4, self.held)]).detach()


def works(rule, pattern):
    """Whether a rule's requirements are met."""
    return all(isinstance(SETS[pattern], kind) for kind in RULES[rule].requires.masks)


def test_only_gumbel_masks_need_a_partition_matroid():
    assert [(rule, pattern) for rule in RULES for pattern in SETS if not works(rule, pattern)] == [
        ("gumbel", "columns")
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rule", "pattern"), [(rule, pattern) for rule in RULES for pattern in SETS if works(rule, pattern)]
)
def test_a_fit_ends_with_masks_of_the_set_and_a_smaller_loss(rule, pattern, transposed):
    objective, masks = Regression(transposed=transposed), SETS[pattern]
    weight = objective.masked(masks)
    fitted = fit(objective, [weight], [], RULES[rule](), 120, step_size=0.1)
    assert fitted.accepted
    assert float(fitted.after.mean()) < float(fitted.before.mean())
    torch.testing.assert_close(objective.held_out(), fitted.after, rtol=1e-12, atol=0)
    assert masks.contains(weight.oriented(weight.mask))
    assert not bool(objective.parameter[~weight.mask].any())
    assert (fitted.changed > 0) <= RULES[rule].moves


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_in_their_set_at_every_step(rule):
    objective, masks = Regression(), NM(keep=2, group=4)
    weight = objective.masked(masks)
    found = []
    select = Masked.select_by

    class Watched(Masked):
        def select_by(self, values):
            select(self, values)
            found.append(self.mask.clone())

    weight.__class__ = Watched
    fit(objective, [weight], [], RULES[rule](), 40, step_size=0.3)
    assert bool(found) == RULES[rule].moves
    assert all(masks.contains(mask) for mask in found)
    last = objective.seen[-1]
    assert int((last != 0).sum()) <= int(weight.mask.sum())


def test_with_fixed_masks_a_long_fit_finds_the_least_squares_solution():
    objective = Regression(rows=3, d=5)
    weight = objective.masked(PerRow(3))
    fit(objective, [weight], [], FixedMasks(), 6000, step_size=0.03)
    x, y = objective.x[:4].reshape(-1, 5), objective.y[:4].reshape(-1, 3)
    for row, mask in enumerate(weight.mask):
        best = torch.linalg.lstsq(x[:, mask], y[:, row]).solution
        torch.testing.assert_close(objective.parameter.data[row, mask], best, rtol=0, atol=2e-2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_changes_where_held_out_data_disagrees(rule, dtype):
    # The held-out target is what the pruned layer does already.
    objective = Regression(dtype=dtype)
    weight = objective.masked(PerRow(0.5))
    objective.held = (objective.x[4] @ objective.parameter.double().T).detach()
    before, mask = objective.parameter.detach().clone(), weight.mask.clone()
    fitted = fit(objective, [weight], [], RULES[rule](), 16, step_size=0.1)
    assert not fitted.accepted
    assert torch.equal(objective.parameter, before)
    assert torch.equal(weight.mask, mask)
    assert fitted.changed == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_two_fits_are_identical(rule):
    def once():
        objective = Regression(dtype=torch.float32)
        weight = objective.masked(PerRow(0.5))
        fit(objective, [weight], [], RULES[rule](), 24)
        return objective.parameter.detach()

    assert torch.equal(once(), once())


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**-20, 2.0**20, 2.0**40])
def test_steps_are_relative_to_the_weights(unit):
    """A layer in other units is fitted alike, up to the rounding of the step sizes."""
    plain, other = Regression(), Regression(unit=unit)
    for objective in (plain, other):
        fit(objective, [objective.masked(PerRow(0.5))], [], Continuation(), 60, step_size=0.1)
    torch.testing.assert_close(other.parameter / unit, plain.parameter, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_one_huge_weight_does_not_set_the_steps_of_all(size):
    """An input that is almost zero may have a huge weight in somebody's checkpoint."""
    objective = Regression()
    objective.x[..., 0] = 0.0
    weight = objective.masked(PerRow(0.5))
    objective.parameter.data[:, 0], weight.mask[:, 0] = 0.0, False
    objective.parameter.data[0, 0], weight.mask[0, 0] = size, True
    fitted = fit(objective, [weight], [], FixedMasks(), 64)
    assert fitted.accepted
    assert float(fitted.after.mean()) < 0.9 * float(fitted.before.mean())


@pytest.mark.parametrize("calls", [3, 30, 70])
def test_an_interrupt_leaves_the_best_state(calls):
    objective, masks = Regression(), PerRow(0.5)
    weight = objective.masked(masks)
    before = float(objective.held_out())
    objective.fail_at = calls
    with pytest.raises(KeyboardInterrupt):
        fit(objective, [weight], [], Continuation(), 80, step_size=0.1)
    assert float(objective.held_out()) <= before
    assert masks.contains(weight.mask)
    assert not bool(objective.parameter[~weight.mask].any())
    assert not objective.parameter.requires_grad


def test_a_fit_that_is_worse_half_way_ends():
    objective = Regression()
    weight = objective.masked(PerRow(0.5))
    objective.held = (objective.x[4] @ objective.parameter.double().T + 1e-3).detach()
    fitted = fit(objective, [weight], [], FixedMasks(), 40, step_size=0.3)
    assert not fitted.accepted
    assert fitted.steps == 20


def test_a_loss_that_is_no_number_ends_the_fit():
    objective = Regression()
    weight = objective.masked(PerRow(0.5))
    before = objective.parameter.detach().clone()
    objective.y = objective.y * torch.nan
    fitted = fit(objective, [weight], [], FixedMasks(), 16)
    assert fitted.steps == 0
    assert torch.equal(objective.parameter, before)


def test_bfloat16_weights_are_fitted_in_float32():
    """Steps below the spacing of bfloat16 add up."""
    objective = Regression(dtype=torch.bfloat16)
    weight = objective.masked(PerRow(0.5))
    fitted = fit(objective, [weight], [], FixedMasks(), 200, step_size=0.006)
    assert float(fitted.after.mean()) < 0.9 * float(fitted.before.mean())
    assert objective.parameter.dtype == torch.bfloat16


def test_trials_choose_among_step_sizes():
    objective = Regression()
    fitted = fit(objective, [objective.masked(PerRow(0.5))], [], FixedMasks(), 64)
    assert fitted.step_size in (0.5, 0.24, 0.08, 0.027, 0.009)


def test_progress_reaches_one():
    objective, seen = Regression(), []
    fit(objective, [objective.masked(PerRow(0.5))], [], FixedMasks(), 20, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_what_is_clearly_smaller():
    others = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert clearly_smaller(others - 0.1, others)
    assert not clearly_smaller(others, others)
    assert not clearly_smaller(others + torch.tensor([-1.0, 1.0, -1.0, 0.9]), others)


def test_settings_count_steps():
    assert Recovery(epochs=2).steps("block", 14, 7000) == 28
    assert Recovery(tokens=3500).steps("model", 14, 7000) == 7
    assert Recovery(epochs=0.001).steps("model", 14, 7000) == 1
    assert [Recovery().steps(level, 14, 7000) for level in ("block", "model")] == [56, 28]
    assert Recovery("model").rule_for("model") == FixedMasks()
    assert Recovery(parameters="vectors", rule=Continuation()).rule_for("block") == FixedMasks()
