"""Rules for masks against independent answers: enumeration, finite differences, and the sets' oracles."""

import itertools

import pytest
import torch
from torch import nn

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, Columns, PerRow, Protected, TransposableNM, Unstructured
from maskopt.recovery import RULES, BiLevel, FixedMasks, GumbelMasks, Masked, MovingRule, PolicyGradient, fit
from maskopt.recovery.bilevel import upper_gradient
from maskopt.recovery.gumbel import _Candidates, _Entries, _logits, relaxed_top
from maskopt.recovery.policy_gradient import score_function
from tests.recovery.test_fit import Regression

MOVING = [name for name, rule in RULES.items() if rule.moves]


def masked(masks, rows=4, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(rows, d, generator=generator, dtype=torch.float64), requires_grad=False)
    mask = masks.lmo_mask(torch.randn(rows, d, generator=generator))
    parameter.data.masked_fill_(~mask, 0.0)
    weight = Masked(parameter, mask, masks)
    weight.master = parameter.data.clone()
    return weight


@pytest.mark.parametrize(("steps", "until"), [(20, 0.5), (7, 0.5), (9, 0.3), (5, 1.0), (1, 0.6)])
@pytest.mark.parametrize("name", MOVING)
def test_masks_stay_once_their_time_is_over(name, steps, until):
    assert issubclass(RULES[name], MovingRule)
    objective = Regression()
    weight = objective.masked(NM(keep=2, group=4))
    seen = []
    loss = objective.loss

    def watched(index):
        seen.append((weight.settled, weight.mask.clone()))
        return loss(index)

    objective.loss = watched
    fit(objective, [weight], [], RULES[name](until=until), steps, step_size=0.1)
    first = next((index for index in range(steps) if index >= until * steps), steps)
    assert all(settled for settled, _ in seen[first:steps])
    assert all(torch.equal(mask, seen[first][1]) for _, mask in seen[first:steps])


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("until", [0.0, 1.1])
def test_the_time_of_masks_that_move_is_a_positive_fraction(name, until):
    with pytest.raises(MaskoptError, match="until"):
        RULES[name](until=until)


@pytest.mark.parametrize(
    ("rule", "masks"), [(GumbelMasks(), Columns(0.5)), (PolicyGradient(), TransposableNM(keep=2, group=4))]
)
def test_rules_refuse_sets_that_lack_what_they_need(rule, masks):
    objective = Regression(rows=8)
    weight = objective.masked(masks)
    before = objective.parameter.detach().clone()
    with pytest.raises(MaskoptError, match=f"not compatible with {type(rule).__name__}"):
        fit(objective, [weight], [], rule, 4)
    assert torch.equal(objective.parameter, before)
    assert objective.calls == 0


# Bi-level pruning


def test_the_upper_gradient_is_that_of_the_fitted_loss():
    """Of a loss without curvature, <g, m * w>, whose lower level has the solution -m g / (gamma c^2)."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(12, generator=generator, dtype=torch.float64)
    c = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    gamma = 0.7

    def fitted(m):
        w = -m * g / (gamma * c**2)
        return (g * m * w).sum()

    mask = torch.arange(12) % 3 > 0
    m = mask.double().requires_grad_(True)
    (slope,) = torch.autograd.grad(fitted(m), m)
    values = torch.where(mask, -g / (gamma * c**2), 0.0)
    found = upper_gradient(values, g, (g / c).square(), gamma)
    torch.testing.assert_close(found[mask], slope[mask])
    for index in (~mask).nonzero().flatten():
        more = m.detach().clone()
        more[index] = 1.0
        torch.testing.assert_close(found[index], fitted(more) - fitted(m.detach()))


def test_the_lower_level_has_the_gradient_of_loss_and_ridge_on_kept_entries():
    weight = masked(PerRow(0.5))
    weight.deviation = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    state = BiLevel(ridge=0.3).begin([weight], 10)
    g = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight.master.grad = g.clone()
    state.gradient(weight, 0)
    added = weight.master.grad - g * weight.mask
    assert not bool(added[~weight.mask].any())
    curved = (weight.master * weight.deviation**2)[weight.mask]
    gamma = added[weight.mask] / curved
    torch.testing.assert_close(gamma, gamma[:1].expand_as(gamma))
    torch.testing.assert_close(added[weight.mask].norm(), 0.3 * g[weight.mask].norm())
    # Once masks stay, only the loss counts.
    weight.master.grad = g.clone()
    state.gradient(weight, 6)
    assert torch.equal(weight.master.grad, g * weight.mask)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_bi_level_masks_do_not_depend_on_units(factor):
    plain, other = Regression(), Regression(unit=factor)
    weights = [objective.masked(PerRow(0.5)) for objective in (plain, other)]
    for objective, weight in zip((plain, other), weights, strict=True):
        fit(objective, [weight], [], BiLevel(step=0.2), 60, step_size=0.1)
    assert torch.equal(weights[0].mask, weights[1].mask)


# Policy gradient


def test_the_score_function_gives_the_gradient_of_the_expected_loss():
    """By enumeration of all masks of five entries, for any loss and baseline."""
    generator = torch.Generator().manual_seed(0)
    chances = (0.1 + 0.8 * torch.rand(5, generator=generator, dtype=torch.float64)).requires_grad_(True)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=torch.float64)
    losses = torch.randn(len(masks), generator=generator, dtype=torch.float64)
    likely = (masks * chances + (1 - masks) * (1 - chances)).prod(1)
    (slope,) = torch.autograd.grad((likely * losses).sum(), chances)
    weights = (likely * (losses - 0.4)).detach()
    found = sum(w * score_function(mask, chances.detach()) for w, mask in zip(weights, masks, strict=True))
    torch.testing.assert_close(found, slope)


@pytest.mark.parametrize("masks", [PerRow(3), NM(keep=1, group=4), Unstructured(0.3), Columns(0.5)])
def test_probabilities_add_up_to_what_is_kept(masks):
    weight = masked(masks)
    state = PolicyGradient(step=0.1).begin([weight], 100)
    generator = torch.Generator().manual_seed(1)
    kept = int(weight.mask.sum())
    for step in range(50):
        (chances,) = state._chances
        assert bool(((chances >= 0) & (chances <= 1)).all())
        assert float(chances.sum()) == pytest.approx(kept)
        if masks != Unstructured(0.3) and not isinstance(masks, type(Columns(0.5))):
            groups = masks.groups(chances).sum(1)
            torch.testing.assert_close(groups, masks.kept_per_group((4, 8)).double())
        state.observed(float(torch.randn((), generator=generator)))
        state.stepped(step + 1)


@pytest.mark.parametrize("masks", [PerRow(2), NM(keep=2, group=4)])
def test_masks_that_lose_less_become_likely(masks):
    """With losses only, the mask of least cost is found: of one row, from the worst mask."""
    cost = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    weight = masked(masks, rows=1, d=4)
    weight.mask = masks.lmo_mask(-cost)
    state = PolicyGradient(spread=0.5, step=0.02).begin([weight], 1000)
    for step in range(600):
        state.observed(float((cost * weight.relaxed).sum()))
        state.stepped(step + 1)
    assert weight.settled
    assert torch.equal(weight.mask, masks.lmo_mask(cost))


def test_weights_are_fitted_to_the_mask_that_is_drawn():
    weight = masked(PerRow(0.5))
    state = PolicyGradient(spread=1.0).begin([weight], 10)
    weight.master.grad = torch.ones_like(weight.master)
    drawn = weight.relaxed.clone()
    state.gradient(weight, 0)
    assert torch.equal(weight.master.grad, drawn)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}


# Gumbel


SAMPLED = [
    (NM(keep=2, group=4), _Candidates),
    (NM(keep=1, group=4), _Candidates),
    (NM(keep=4, group=8), _Candidates),
    (PerRow(0.5), _Candidates),  # of eight entries
    (Unstructured(0.4), _Entries),
    (Protected(NM(keep=2, group=4), torch.arange(32).reshape(4, 8) % 8 == 3), _Entries),
]


@pytest.mark.parametrize(("masks", "kind"), SAMPLED)
def test_relaxed_masks_keep_what_the_set_keeps(masks, kind):
    weight = masked(masks)
    logits = _logits(weight, 3.0)
    assert type(logits) is kind
    generator = torch.Generator().manual_seed(0)
    for temperature in (4.0, 0.05):
        x = logits.draw(torch.randn(logits.values.shape, generator=generator, dtype=torch.float64), temperature)
        assert bool(((x >= 0) & (x <= 1 + 1e-12)).all())
        torch.testing.assert_close(masks.groups(x).sum(1), masks.kept_per_group((4, 8)).double())
        if masks.protected is not None:
            assert bool((x[masks.protected] > 1 - 1e-9).all())
    assert torch.equal(masks.lmo_mask(-logits.entries()), weight.mask)


@pytest.mark.parametrize(("masks", "kind"), SAMPLED)
def test_slopes_of_logits_are_those_of_finite_differences(masks, kind):
    logits = _logits(masked(masks), 1.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(logits.values.shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    start = logits.values.clone()
    logits.draw(noise, 0.8)
    slope = logits.slope(gradient, 0.8)
    for _ in range(5):
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1e-5, -1e-5):
            logits.values = start + sign * direction
            values.append(float((gradient * logits.draw(noise, 0.8)).sum()))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((slope * direction).sum()), rel=1e-6, abs=1e-7)


def test_a_cold_relaxed_top_is_the_top():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    keep = torch.tensor([0, 1, 4, 8, 9, 3])
    x = relaxed_top(values / 1e-3, keep)
    for row, count, kept in zip(values, keep.tolist(), x, strict=True):
        best = torch.zeros(9, dtype=torch.float64)
        best[row.argsort(descending=True)[:count]] = 1.0
        torch.testing.assert_close(kept, best, rtol=0, atol=1e-3)


@pytest.mark.parametrize("masks", [NM(keep=2, group=4), PerRow(3), Unstructured(0.5)])
def test_logits_find_the_mask_of_least_cost(masks):
    """Of a loss that is linear in the mask, with weights that stay."""
    weight = masked(masks)
    cost = torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight.master = torch.ones_like(cost)
    start = float((cost * weight.mask).sum())
    state = GumbelMasks(hot=1.0, cold=0.05, prior=3.0, step=0.2).begin([weight], 1000)
    for step in range(600):
        weight.master.grad = cost.clone()  # the gradient by x * w is cost, and w is 1
        state.gradient(weight, step)
        state.stepped(step + 1)
    assert weight.settled
    best, found = (float((cost * mask).sum()) for mask in (masks.lmo_mask(cost), weight.mask))
    assert found - best <= 0.1 * (start - best)


def test_pruned_weights_have_the_gradient_of_what_is_computed():
    weight = masked(NM(keep=2, group=4))
    state = GumbelMasks().begin([weight], 10)
    x, g = weight.relaxed.clone(), torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight.master.grad = g.clone()
    state.gradient(weight, 0)
    assert torch.equal(weight.master.grad, x * g)
    assert bool((x[~weight.mask] > 0).any())


# Changes of low rank


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_changes_are_masked_products_of_low_rank(transposed, dtype):
    """What is added is a matrix of that rank where nothing is pruned, and zeros stay zeros where something is."""
    for masks in (PerRow(0.5), PerRow(1.0)):
        objective = Regression(rows=12, d=8, dtype=dtype, transposed=transposed)
        weight = objective.masked(masks)
        mix = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        objective.y = objective.y + objective.x @ mix
        objective.held = objective.y[-1]
        before, mask = objective.parameter.detach().clone(), weight.mask.clone()
        fitted = fit(objective, [weight], [], FixedMasks(), 120, rank=2, step_size=0.2)
        assert fitted.accepted
        assert float(fitted.after.mean()) < float(fitted.before.mean())
        torch.testing.assert_close(objective.held_out(), fitted.after, rtol=1e-12, atol=0)
        assert torch.equal(weight.mask, mask)
        assert not bool(objective.parameter[~mask].any())
        if bool(mask.all()) and dtype == torch.float64:
            sizes = torch.linalg.svdvals(objective.parameter.detach() - before)
            assert float(sizes[2]) < 1e-9 * float(sizes[0])
            assert float(sizes[1]) > 1e-6 * float(sizes[0])


def test_factors_have_the_gradients_of_autograd():
    from maskopt.recovery.trained import Product

    weight = masked(PerRow(0.5))
    trained = Product(weight, 3, seed=0)
    trained.begin(apart=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        trained.tensors[0].copy_(torch.randn(4, 3, generator=generator))
    g = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    left, right = (tensor.detach().clone().requires_grad_(True) for tensor in trained.tensors)
    expected = torch.autograd.grad((g * (weight.mask * (left @ right))).sum(), (left, right))
    trained.receive(g)
    for tensor, size, slope in zip(trained.tensors, trained.sizes, expected, strict=True):
        torch.testing.assert_close(tensor.grad, size * slope)


def test_a_change_of_full_rank_reaches_what_all_weights_reach():
    losses = []
    for rank in (None, 8):
        objective = Regression(rows=8, d=8)
        fitted = fit(objective, [objective.masked(PerRow(0.5))], [], FixedMasks(), 3000, step_size=0.1, rank=rank)
        losses.append(float(fitted.after.mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_optimizer_has_factors_alone(monkeypatch):
    numbers = []

    class Counted(torch.optim.Adam):
        def __init__(self, groups, **settings):
            numbers.extend(tensor.numel() for group in groups for tensor in group["params"])
            super().__init__(groups, **settings)

    monkeypatch.setattr(torch.optim, "Adam", Counted)
    objective = Regression(rows=12, d=8)
    fit(objective, [objective.masked(PerRow(0.5))], [], FixedMasks(), 4, step_size=0.1, rank=2)
    assert sorted(numbers) == [2 * 8, 2 * 12]


def test_a_fit_of_low_rank_that_helps_nothing_leaves_the_weights():
    objective = Regression()
    weight = objective.masked(PerRow(0.5))
    objective.held = (objective.x[4] @ objective.parameter.double().T).detach()
    before = objective.parameter.detach().clone()
    assert not fit(objective, [weight], [], FixedMasks(), 16, rank=2).accepted
    assert torch.equal(objective.parameter, before)


def test_a_fit_of_low_rank_needs_fixed_masks():
    objective = Regression()
    with pytest.raises(MaskoptError, match="fixed masks"):
        fit(objective, [objective.masked(PerRow(0.5))], [], GumbelMasks(), 4, rank=2)
