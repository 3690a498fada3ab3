"""Sparsities of layers, found by measuring what the model loses."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import BertConfig, BertModel

from maskopt.allocation import Plan
from maskopt.errors import MaskoptError
from maskopt.models import RULES, allocate, prune, select_layers
from maskopt.models.batches import gathered, prepare_batches, sequences
from maskopt.models.curves import expanded_losses, extended_losses, measured_losses
from maskopt.models.database import Database
from maskopt.models.divergence import Divergence
from maskopt.models.replay import evaluation_mode
from maskopt.models.trials import Trials
from maskopt.oracles import Counts, PerRow
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Magnitude, Wanda, solve
from maskopt.weights import ConditionalADMM
from tests.helpers import combinations
from tests.models.conftest import ARCHITECTURES, VOCABULARY, weights_of

CAUSAL = [name for name in ARCHITECTURES if name != "bert"]
FAST = ConditionalADMM(iterations=8, stages=2, polish=2)
_EXPANDED = 11  # sequences with which losses are expanded; with one more they are measured


def windows(number=12, length=16, size=4):
    generator = torch.Generator().manual_seed(7)
    return list(torch.randint(1, VOCABULARY, (number, length), generator=generator).split(size))


def shapes_of(model):
    return {layer.name: layer.shape for layer in select_layers(model).layers}


# Divergence


@pytest.mark.parametrize("kept", [4, 512])
def test_the_divergence_is_that_of_the_distributions(kept):
    """With every token apart it is torch's; with the unlikely ones merged it is that of the merged distributions."""
    model = ARCHITECTURES["llama"].build()
    batches = prepare_batches(model, windows(5))
    with evaluation_mode(model):
        measured = Divergence(model, batches, kept)
        dense = [model(**batch.inputs).logits.double() for batch in batches]
        for layer in select_layers(model).layers:
            layer.weight.data.mul_(0.7)
        changed = [model(**batch.inputs).logits.double() for batch in batches]
        found = measured.each(model)
    expected = []
    for before, after in zip(dense, changed, strict=True):
        p, q = before.softmax(-1), after.softmax(-1)
        if kept < VOCABULARY:
            top = p.topk(kept, -1).indices
            p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
        expected.append((p * (p.log() - q.log())).sum(-1).mean(-1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-7)
    assert float(found.min()) > 0.01


def test_the_divergence_from_itself_is_zero_and_padding_does_not_count():
    model = ARCHITECTURES["llama"].build()
    ids = windows(4)[0]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    padded = prepare_batches(model, [{"input_ids": ids, "attention_mask": mask}])
    short = prepare_batches(model, [ids[1:2, :9]])
    with evaluation_mode(model):
        one, other = Divergence(model, padded), Divergence(model, short)
        assert float(one.each(model).abs().max()) < 1e-6
        select_layers(model).layers[3].weight.data.mul_(0.5)
        torch.testing.assert_close(one.each(model)[1:2], other.each(model), rtol=1e-4, atol=1e-6)


def test_models_that_predict_no_tokens_are_refused():
    model = BertModel(BertConfig(vocab_size=61, hidden_size=16, num_attention_heads=4, intermediate_size=24))
    with pytest.raises(MaskoptError, match="needs a language model; this is a BertModel"):
        allocate(model, windows(), "per-row", 0.5, Wanda(), rule="auto")
    plan = allocate(model, windows(), "per-row", 0.5, Wanda(), rule="owl")
    assert plan.sparsity(shapes_of(model)) == pytest.approx(0.5, abs=0.01)


# Curves


def database_of(model, levels=(4, 8), solver=None):
    """A database of the layers of a model, solved on identity Grams."""
    layers = select_layers(model).layers
    counts = {layer: Counts("per-row", layer.shape) for layer in layers}
    dense = {layer: layer.weight.detach().clone() for layer in layers}
    solver = solver or Magnitude()
    database = Database(counts, {layer: list(levels) for layer in layers}, dense, solver, 2**30)
    for layer in layers:
        weight = layer.oriented(layer.weight.detach())
        problem = LayerReconstruction(weight, torch.eye(weight.shape[1]))
        database.observe(layer, problem, solve(problem, counts[layer].masks(levels[0]), solver))
    return database


@pytest.mark.parametrize("name", CAUSAL)
def test_measured_losses_are_those_of_the_model_with_one_layer_pruned(name):
    """Blocks before the layer's own do not run again, and the loss is the same."""
    model = ARCHITECTURES[name].build()
    batches = prepare_batches(model, windows(6))
    selection = select_layers(model)
    with evaluation_mode(model):
        database, measured = database_of(model), Divergence(model, batches)
        keys = {layer.name: layer for layer in database.counts}
        blocks = {block: [keys[x.name] for x in layers] for block, layers in selection.blocks.items()}
        curves = measured_losses(model, blocks, [], database, measured)
        assert set(curves) == set(database.counts)
        for layer, losses in curves.items():
            assert list(losses) == [4, 8]
            for count, loss in losses.items():
                with database.composed({layer: count}):
                    assert int((layer.oriented(layer.weight) != 0).sum(1).max()) == count
                    assert loss == pytest.approx(float(measured.each(model).mean()), rel=1e-4, abs=1e-7)
        assert float(measured.each(model).abs().max()) < 1e-6  # the model is dense again


def test_expanded_losses_are_the_second_order_of_the_divergence():
    """Over many draws of labels the expansion approaches the divergence of small changes."""
    model = ARCHITECTURES["llama"].build()
    batches = sequences(prepare_batches(model, windows(8, 12)))
    with evaluation_mode(model):
        database = database_of(model)
        dense = {layer: weight.clone() for layer, weight in database.dense.items()}
        measured = Divergence(model, batches)
        # Levels that are 2 % of the way to the pruned weights: there the second order is all there is.
        plain = database.weight
        database.weight = lambda layer, count: torch.lerp(dense[layer], plain(layer, count), 0.02)
        sums: dict = {}
        for seed in range(60):
            for layer, losses in expanded_losses(
                model, database, measured, first_order=False, seed=seed, memory=2**30
            ).items():
                sums.setdefault(layer, []).append(losses[8])
        for layer, values in sums.items():
            with database.composed({layer: 8}):
                truth = float(measured.each(model).mean())
            draws = torch.tensor(values, dtype=torch.float64)
            assert abs(float(draws.mean()) - truth) < 5 * float(draws.std()) / math.sqrt(len(draws)) + 0.05 * truth


def test_the_first_order_is_the_derivative_of_the_divergence():
    model = ARCHITECTURES["llama"].build().double()
    batches = sequences(prepare_batches(model, windows(4, 12)))
    with evaluation_mode(model):
        database, measured = database_of(model), Divergence(model, batches)
        context = dict.fromkeys(database.counts, 8)
        with database.composed(context):
            layer = list(context)[4]
            here = layer.weight.data
            there = database.weight(layer, 4)
            options = {"seed": 0, "memory": 2**30, "levels": {layer: [4]}}
            both = expanded_losses(model, database, measured, first_order=True, **options)[layer][4]
            second = expanded_losses(model, database, measured, first_order=False, **options)[layer][4]

            def loss(step):
                layer.weight.data = torch.lerp(here, there, step)
                return float(measured.each(model).mean())

            # In float32, in which divergences are computed, this step is far from rounding.
            slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
            layer.weight.data = here
        assert both - second == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_expansions_do_not_depend_on_the_memory_and_leave_the_model_as_it_is():
    model = ARCHITECTURES["gpt2"].build()
    batches = sequences(prepare_batches(model, windows(4)))
    wanted = {name: index % 2 == 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    before = weights_of(model)
    with evaluation_mode(model):
        database, measured = database_of(model), Divergence(model, batches)
        whole, parts = (
            expanded_losses(model, database, measured, first_order=False, seed=3, memory=memory)
            for memory in (2**30, 5000)
        )
    for layer, losses in whole.items():
        assert parts[layer] == pytest.approx(losses, rel=1e-4)
        assert all(loss > 0 for loss in losses.values())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("solver", [Wanda(), FAST], ids=["wanda", "best"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_database_gives_back_what_the_solver_found(name, solver):
    """In the orientation and the type of the layer's parameter, masks and values bit for bit."""
    model = ARCHITECTURES[name].build().bfloat16()
    database = database_of(model, (3, 5), solver)
    for layer, counts in database.counts.items():
        weight = layer.oriented(database.dense[layer])
        problem = LayerReconstruction(weight, torch.eye(weight.shape[1]))
        for count in (3, 5):
            result = solve(problem, counts.masks(count), solver)
            new = weight if result.weight is None else result.weight.to(torch.bfloat16)
            expected = layer.oriented(torch.where(result.mask, new, 0))
            assert torch.equal(database.weight(layer, count), expected)
            assert database.errors[layer][count] == pytest.approx(result.total)
        assert torch.equal(database.weight(layer, counts.most), database.dense[layer])


def test_sequences_are_cut_and_put_together_again():
    model = ARCHITECTURES["llama"].build()
    ids = windows(7, size=3)
    mask = torch.ones_like(ids[0])
    mask[0, 12:] = 0
    plain, padded = prepare_batches(model, ids), prepare_batches(model, [{"input_ids": ids[0], "attention_mask": mask}])
    assert [batch.shape for batch in sequences(plain)] == [(1, 16)] * 7
    again = gathered(sequences(plain), 3)
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(again, plain, strict=True))
    cut = sequences(padded)
    assert [batch.tokens for batch in cut] == [12, 16, 16]
    assert gathered(cut, 3) == cut


# Plans


@combinations(2, rule=RULES, solver=[Wanda(), FAST], ids=str)
def test_every_rule_meets_the_budget_and_leaves_the_model_as_it_was(rule, solver):
    model = ARCHITECTURES["llama"].build()
    before, seen = weights_of(model), []
    plan = allocate(model, windows(), "per-row", 0.6, solver, rule=rule, progress=seen.append)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    shapes = shapes_of(model)
    total = sum(rows * columns for rows, columns in shapes.values())
    if rule == "uniform":
        assert set(plan.sparsities.values()) == {1 - 7 / 16, 1 - 10 / 24}  # rounded as PerRow(0.4) rounds
    elif plan.details.get("chosen") != "uniform":
        budget = total - math.floor(0.6 * total)
        assert budget - min(rows for rows, _ in shapes.values()) < plan.kept(shapes) <= budget
    fractions = [event.fraction for event in seen]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    report = prune(model, windows(), plan, solver)
    assert report.sparsity == pytest.approx(plan.sparsity(shapes))
    assert {layer.name: layer.sparsity for layer in report.layers} == pytest.approx(dict(plan.sparsities))
    assert report.to_json()["plan"]["rule"] == rule


FUSED = [["*.q_proj", "*.k_proj", "*.v_proj"], ["*.gate_proj", "*.up_proj"]]


@combinations(2, rule=[rule for rule in RULES if rule != "uniform"], solver=[Wanda(), FAST], ids=str)
def test_layers_that_belong_together_get_one_sparsity(rule, solver):
    model = ARCHITECTURES["llama"].build()
    plan = allocate(model, windows(), "per-row", 0.6, solver, rule=rule, together=FUSED)
    shapes = shapes_of(model)
    for block in range(2):
        for kinds in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            names = [name for name in shapes if f"layers.{block}." in name and name.endswith(kinds)]
            assert len({plan.sparsities[name] for name in names}) == 1
    if plan.details.get("chosen") != "uniform":
        least = min(rows for name, (rows, _) in shapes.items() if name.endswith(("o_proj", "down_proj")))
        assert plan.details["budget"] - least < plan.kept(shapes) <= plan.details["budget"]
    assert plan.details["together"] == FUSED


def test_what_belongs_together_can_only_lose_more():
    model = ARCHITECTURES["llama"].build()
    free, bound = (
        allocate(model, windows(), "per-row", 0.6, Wanda(), rule="kl", together=together).details["separable"]["kl"]
        for together in ((), FUSED)
    )
    assert bound["loss"] >= free["lower_bound"]
    assert free["loss"] < bound["loss"]


def test_groups_that_overlap_are_one_and_others_are_refused():
    model = ARCHITECTURES["llama"].build()
    layers = [name for name in shapes_of(model) if "layers.0.self_attn" in name]
    plan = allocate(
        model, windows(), "2:4", 0.5, Wanda(), rule="kl", together=[["*.q_proj", "*.k_proj"], ["*.k_proj", "*.o_proj"]]
    )
    q, k, _, o = (plan.sparsities[name] for name in layers)
    assert q == k == o
    for together, sentence in (
        (["*.gate_proj", "*.down_proj"], "have 16 and 24 choices"),
        (["*.q_proj"], "match no two layers of a block"),
        (
            ["*.gate_proj", "*.up_proj", "*.other"],
            r"The pattern '\*.other' of layers to keep together matches no layer",
        ),
    ):
        with pytest.raises(MaskoptError, match=sentence):
            allocate(model, windows(), "per-row", 0.5, Wanda(), rule="owl", together=[together])
    # Those whose sparsity is fixed do not belong to any group.
    plan = allocate(model, windows(), "per-row", 0.5, Wanda(), rule="owl", fixed={"*.q_proj": 0.25}, together=FUSED[:1])
    q, k, v, _ = (plan.sparsities[name] for name in layers)
    assert (q, k) == (0.25, v)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "llama"])
def test_other_architectures(name):
    model = ARCHITECTURES[name].build()
    before = weights_of(model)
    plan = allocate(model, windows(), "per-row", 0.5, FAST)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    report = prune(model, windows(), plan, FAST)
    assert {layer.name: layer.sparsity for layer in report.layers} == pytest.approx(dict(plan.sparsities))
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("pattern", ["unstructured", "2:8", "columns"])
def test_other_patterns(pattern):
    model = ARCHITECTURES["llama"].build()
    sparsity = 0.75 if pattern == "2:8" else 0.5
    plan = allocate(model, windows(), pattern, sparsity, Wanda(), rule="kl")
    shapes = shapes_of(model)
    total = sum(rows * columns for rows, columns in shapes.values())
    step = min(counts.step for counts in plan.counts(shapes).values())
    assert 0 <= total * (1 - sparsity) - plan.kept(shapes) < max(step, 1)
    report = prune(model, windows(), plan, Wanda())
    assert report.sparsity == pytest.approx(plan.sparsity(shapes))
    assert len(set(plan.sparsities.values())) > 1


def test_measured_losses_are_what_the_plan_minimises():
    """Among all choices of the levels in two free layers, the plan's has the least sum of measured losses."""
    model = ARCHITECTURES["llama"].build()
    free = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    plan = allocate(model, windows(), "2:8", 0.5, Wanda(), rule="kl", include=free)
    with evaluation_mode(model):
        # The same parts of the sequences as in the rule: two for trials, five for measuring, five to choose.
        batches = sequences(prepare_batches(model, windows()))
        measured = Divergence(model, batches[6:9])
        found = {}
        for name in free:
            copy = ARCHITECTURES["llama"].build()
            found[name] = {}
            for count in range(1, 8):
                layer = copy.get_submodule(name)
                dense = layer.weight.detach().clone()
                prune(
                    copy,
                    [batch.inputs["input_ids"] for batch in batches[:6]],
                    Counts("2:8", layer.weight.shape).masks(count),
                    Wanda(),
                    include=[name],
                    propagate="dense",
                )
                found[name][count] = float(measured.each(copy).mean())
                layer.weight.data.copy_(dense)
    best = min(
        (sum(found[name][count] for name, count in zip(free, counts, strict=True)), counts)
        for counts in itertools.product(range(1, 8), repeat=2)
        if sum(counts) <= 8
    )
    counts = tuple(Counts("2:8", (16, 24)).of(plan.sparsities[name]) for name in free)
    assert sum(found[name][count] for name, count in zip(free, counts, strict=True)) == pytest.approx(best[0], rel=1e-3)


def test_auto_chooses_by_the_divergence_on_other_sequences():
    """The candidates' divergences are those of models that are pruned and measured apart."""
    model = ARCHITECTURES["llama"].build()
    plan = allocate(model, windows(16), "per-row", 0.6, FAST)
    losses, sizes = plan.details["divergence"], plan.details["sequences"]
    assert losses[plan.details["chosen"]] <= losses["uniform"]
    assert sizes["trial"] + sizes["losses"] + sizes["held_out"] <= sizes["all"] == 16
    copy = ARCHITECTURES["llama"].build()
    batches = gathered(sequences(prepare_batches(copy, windows(16))), 4)
    parts = sequences(prepare_batches(copy, windows(16)))
    with evaluation_mode(copy):
        first = sizes["trial"] + sizes["losses"]
        held = Divergence(copy, gathered(parts[first : first + sizes["held_out"]], 4))
    assert len(batches) == 4
    trial = [batch.inputs for batch in gathered(parts[: sizes["trial"]], 4)]
    prune(copy, trial, PerRow(0.4), FAST)
    with evaluation_mode(copy):
        assert losses["uniform"] == pytest.approx(float(held.each(copy).mean()), rel=1e-3)


def test_losses_are_measured_where_layers_and_levels_are_few():
    model = ARCHITECTURES["llama"].build()
    few, many = (
        allocate(model, windows(_EXPANDED), "2:8", 0.5, FAST, include=include).details
        for include in (["*.down_proj"], ())
    )
    for details, rule in ((few, "kl"), (many, "fisher")):
        assert set(details["separable"]) == {rule}
        assert {"uniform", rule} <= set(details["divergence"]) <= {"uniform", rule, f"0.5 of {rule}", f"0.25 of {rule}"}
    for details in (few, many):
        for found in details["separable"].values():
            assert found["lower_bound"] <= found["loss"]


@pytest.mark.parametrize(
    ("better", "tried"),
    [
        ("kl", ["kl"]),
        ("0.5 of kl", ["kl", "0.5 of kl"]),
        ("0.25 of kl", ["kl", "0.5 of kl", "0.25 of kl"]),
        ("uniform", ["kl", "0.5 of kl", "0.25 of kl"]),
    ],
)
def test_smaller_steps_are_tried_where_the_whole_one_is_no_better(monkeypatch, better, tried):
    """A part of a step lies between the counts of uniform sparsity and of the whole, and keeps the budget."""
    model, seen = ARCHITECTURES["llama"].build(), {}

    def judged(work, name):
        seen[name] = dict(work.candidates[name].counts)
        noise = torch.arange(4, dtype=torch.float64)
        work.candidates[name].losses = noise + (1.0 if name == better else 2.0)

    monkeypatch.setattr(Trials, "try_out", judged)
    plan = allocate(model, windows(24), "per-row", 0.6, FAST, include=["*.down_proj"])
    assert list(seen) == ["uniform", *tried]
    assert plan.details["chosen"] == better
    uniform, whole = seen["uniform"], seen["kl"]
    assert whole != uniform
    for name in tried[1:]:
        fraction = float(name.split()[0])
        for layer, count in seen[name].items():
            assert count == pytest.approx(uniform[layer] + fraction * (whole[layer] - uniform[layer]), abs=2)
    assert len({sum(seen[name].values()) for name in tried}) == 1  # rows of one length


def with_errors(errors):
    """Return a database of one layer of which errors are known at some counts, and the layer."""
    model = ARCHITECTURES["llama"].build()
    database = database_of(model, levels=tuple(errors))
    layer = next(iter(database.counts))
    database.errors[layer] = dict(errors)
    return database, layer


@combinations(3, power=[0.0, 0.5, 1.0, 2.0, 3.0], scale=[1e-12, 1.0, 1e12], loss=[1e-9, 1.0, 1e9])
def test_losses_that_grow_with_a_power_of_the_error_are_known_from_two_levels(power, scale, loss):
    errors = {2: 9.0 * scale, 4: 4.0 * scale, 8: 2.5 * scale, 12: scale}
    database, layer = with_errors(errors)
    every = {count: loss * (error / scale) ** power for count, error in errors.items()}
    for known in ((2, 12), (4, 8), (2, 4, 12)):
        found = extended_losses({layer: {count: every[count] for count in known}}, database)[layer]
        assert found == pytest.approx(every, rel=1e-9)
    one = extended_losses({layer: {4: every[4]}}, database)[layer]
    assert one == pytest.approx({count: every[4] * error / errors[4] for count, error in errors.items()}, rel=1e-9)


@pytest.mark.parametrize(
    ("known", "errors", "expected"),
    [
        ({2: 0.0, 8: 0.0}, {2: 3.0, 4: 2.0, 8: 1.0}, {2: 0.0, 4: 0.0, 8: 0.0}),  # a layer that the model does not need
        ({2: -1e-9, 8: -1e-8}, {2: 3.0, 4: 2.0, 8: 1.0}, {2: 0.0, 4: 0.0, 8: 0.0}),  # rounding below zero
        ({2: 0.0, 8: 0.0}, {2: 0.0, 4: 0.0, 8: 0.0}, {2: 0.0, 4: 0.0, 8: 0.0}),  # dead inputs
        ({2: 6.0, 8: 0.0}, {2: 3.0, 4: 2.0, 8: 0.0}, {2: 6.0, 4: 4.0, 8: 0.0}),  # zero where all that matters is kept
        ({2: 1.0, 8: 4.0}, {2: 3.0, 4: 2.0, 8: 1.0}, {2: 2.0, 4: 2.0, 8: 2.0}),  # noise: pruning more does not gain
        ({2: 2.0, 8: 2.0}, {2: 1.0, 4: 1.0, 8: 1.0}, {2: 2.0, 4: 2.0, 8: 2.0}),  # no difference between levels
    ],
)
def test_losses_at_the_edges(known, errors, expected):
    database, layer = with_errors(errors)
    assert extended_losses({layer: known}, database)[layer] == pytest.approx(expected)


def test_the_plan_tells_how_fast_later_blocks_make_up_for_losses():
    """Solvers that correct nothing have no such rate."""
    model = ARCHITECTURES["llama"].build()
    plan = allocate(model, windows(24), "per-row", 0.6, FAST, include=["*.down_proj"])
    rate = plan.details["attenuation"]
    assert 0 <= rate <= 3
    assert "attenuation" not in allocate(model, windows(), "per-row", 0.6, Wanda(), include=["*.down_proj"]).details


def test_fixed_layers_keep_their_sparsity_and_the_others_the_mean():
    model = ARCHITECTURES["llama"].build()
    fixed = {"*.mlp.*": 0.25, "*.down_proj": 0.5}
    for rule in ("uniform", "owl", "kl"):
        plan = allocate(model, windows(), "per-row", 0.75, Wanda(), rule=rule, fixed=fixed)
        for name, sparsity in plan.sparsities.items():
            if "down_proj" in name:
                assert sparsity == 0.5
            elif "mlp" in name:
                assert sparsity == 0.25
        others = {name: shape for name, shape in shapes_of(model).items() if "mlp" not in name}
        rest = Plan("per-row", {name: plan.sparsities[name] for name in others})
        assert rest.sparsity(others) == pytest.approx(0.75, abs=0.01)
    every = allocate(model, windows(), "per-row", 0.75, Wanda(), fixed={"*": 0.5})
    assert set(every.sparsities.values()) == {0.5}


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_can_go_nothing_goes(rule):
    model = ARCHITECTURES["llama"].build()
    plan = allocate(model, windows(), "per-row", 0.0, Wanda(), rule=rule)
    assert set(plan.sparsities.values()) == {0.0}
    ones = allocate(model, windows(), "1:1", 0.5, Wanda(), rule=rule)
    assert set(ones.sparsities.values()) == {0.0}


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.9, 0.97])
def test_extreme_means(sparsity):
    model = ARCHITECTURES["llama"].build()
    plan = allocate(model, windows(), "per-row", sparsity, FAST)
    report = prune(model, windows(), plan, FAST)
    assert report.sparsity == pytest.approx(sparsity, abs=0.06)


def test_the_same_seed_gives_the_same_plan():
    plans = [
        allocate(ARCHITECTURES["llama"].build(), windows(), "per-row", 0.5, Wanda(), seed=seed).sparsities
        for seed in (0, 0)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("number", "failing"),
    [
        (12, "layers at several levels"),
        (12, "trial of uniform"),
        (12, "losses of layers, measured"),
        (_EXPANDED, "losses of layers, expanded"),
    ],
)
def test_after_a_failure_the_model_is_as_it_was(number, failing):
    model = ARCHITECTURES["llama"].build()
    before = weights_of(model)

    def fail(event):
        if event.stage == failing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate(model, windows(number), "per-row", 0.5, FAST, progress=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rule": "best"}, "The rule must be one of uniform, auto"),
        ({"sparsity": 1.0}, "mean sparsity must lie between 0 and 1, below 1"),
        ({"sparsity": math.nan}, "mean sparsity must lie between 0 and 1"),
        ({"pattern": "3:5"}, "The masks do not fit the layer model.layers.0.self_attn.q_proj"),
        ({"batches": windows(2)}, "at least three calibration sequences"),
        ({"fixed": {"*.nothing": 0.5}}, "matches no layer to prune"),
        ({"fixed": {"*": 2}}, "must lie between 0 and 1"),
        ({"solver": Wanda}, "with brackets"),
        ({"progress": 3}, "progress must be a function"),
        ({"memory": 0}, "memory must be a positive whole number"),
    ],
)
def test_wrong_arguments(changes, sentence):
    options = {"batches": windows(), "pattern": "per-row", "sparsity": 0.5, "solver": Wanda(), **changes}
    with pytest.raises(MaskoptError, match=sentence):
        allocate(ARCHITECTURES["llama"].build(), **options)


def test_plans_that_do_not_fit_a_model_are_refused_before_any_work():
    model = ARCHITECTURES["llama"].build()
    before = weights_of(model)
    names = list(shapes_of(model))
    plan = Plan("per-row", dict.fromkeys(names, 0.5))
    missing = replace(plan, sparsities=dict.fromkeys(names[1:], 0.5))
    with pytest.raises(MaskoptError, match=f"no sparsity for 1 layers to prune, such as {names[0]}"):
        prune(model, windows(), missing, Wanda())
    with pytest.raises(MaskoptError, match="names 1 layers that are not to be pruned, such as other"):
        prune(model, windows(), replace(plan, sparsities={**plan.sparsities, "other": 0.5}), Wanda())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_reference_of_the_divergence_is_torch():
    """The formula of the first test, against torch's own on distributions without merging."""
    p, q = (torch.randn(3, 7, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    own = (p.softmax(-1) * (log_softmax(p, -1) - log_softmax(q, -1))).sum(-1).mean()
    torch.testing.assert_close(
        own, kl_div(log_softmax(q, -1), log_softmax(p, -1), log_target=True, reduction="batchmean")
    )


# The cache


@functools.cache
def uninterrupted(solver):
    """The plan of a call that nothing interrupts and that keeps nothing."""
    return allocate(ARCHITECTURES["llama"].build(), windows(_EXPANDED), "per-row", 0.5, solver)


@combinations(
    2,
    solver=[Wanda(), FAST],
    stage=["layers at several levels", "losses of layers, expanded", "trial of uniform", "trial of fisher"],
    ids=str,
)
def test_an_interrupted_allocation_goes_on(tmp_path, monkeypatch, solver, stage):
    """The plan is that of an uninterrupted call, and what was finished is not done again."""
    options = {"pattern": "per-row", "sparsity": 0.5, "solver": solver, "cache": tmp_path / "cache"}
    whole = uninterrupted(solver)

    def fail(event):
        if event.stage == stage and event.fraction > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate(ARCHITECTURES["llama"].build(), windows(_EXPANDED), **options, progress=fail)
    assert not list((tmp_path / "cache").glob(".*"))
    after = allocate(ARCHITECTURES["llama"].build(), windows(_EXPANDED), **options)
    assert after.sparsities == whole.sparsities
    assert after.details["divergence"] == whole.details["divergence"]
    pruned = []
    monkeypatch.setattr("maskopt.models.trials.prune_layers", lambda *args, **options: pruned.append(args))
    if solver is FAST:
        again = allocate(ARCHITECTURES["llama"].build(), windows(_EXPANDED), **options)
        assert again.sparsities == whole.sparsities
        assert not pruned


def test_a_cache_of_another_allocation_is_refused(tmp_path):
    options = {"pattern": "per-row", "sparsity": 0.5, "solver": FAST, "rule": "fisher", "cache": tmp_path / "cache"}
    model = ARCHITECTURES["llama"].build()
    allocate(model, windows(), **options)
    for changes, differ in (
        ({"sparsity": 0.6}, "sparsity"),
        ({"solver": Wanda()}, "solver"),
        ({"seed": 1}, "seed"),
        ({"rule": "kl"}, "rule"),
        ({"include": ["*.mlp.*"]}, "layers"),
    ):
        with pytest.raises(MaskoptError, match=f"belongs to another allocation, with another value of: {differ};"):
            allocate(model, windows(), **{**options, **changes})
    with pytest.raises(MaskoptError, match="another value of: calibration data"):
        allocate(model, windows(16), **options)
    next(model.parameters()).data[0, 0] += 1
    with pytest.raises(MaskoptError, match="another value of: weights of the model"):
        allocate(model, windows(), **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(MaskoptError, match="is not empty and no cache"):
        allocate(model, windows(), **{**options, "cache": tmp_path / "mine"})
