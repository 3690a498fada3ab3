"""`maskopt.shrink`: arguments, budgets, methods and fits; and the model is as it was after a failure."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import maskopt
from maskopt.errors import MaskoptError
from maskopt.shrinking import cache_bytes, cut_model, find_units
from maskopt.structured import STRUCTURED, ColumnMagnitude
from tests.helpers import combinations
from tests.models.conftest import ARCHITECTURES, ENCODER_DECODERS, weights_of
from tests.shrinking.made import NEURONS, computed, data, made


def same(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    first, second = weights_of(one), weights_of(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def removed(model: PreTrainedModel, kept: dict[str, Tensor]) -> PreTrainedModel:
    """The dense model after units are cut by hand."""
    sites = {site.name: site for site in find_units(model, data()[0]).sites}
    cut_model(model, {sites[name]: units for name, units in kept.items()})
    return model


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to remove"),
    "all": ({"neurons": 1.0}, "neurons must be a fraction from 0 to below 1"),
    "negative": ({"heads": -0.1}, "heads must be a fraction"),
    "not a number": ({"params": float("nan")}, "params must be a fraction"),
    "a word": ({"neurons": "half"}, "neurons must be a fraction .* got 'half'"),
    "both": ({"neurons": 0.1, "params": 0.1}, "leave those out"),
    "no method": ({"neurons": 0.5, "method": "lottery"}, "lottery"),
    "a solver of masks": ({"neurons": 0.5, "method": maskopt.Wanda()}, "a solver for whole units"),
    "no widths": ({"neurons": 0.5, "widths": "wide"}, "widths must be one of uniform, free; got 'wide'"),
    "no fit": ({"neurons": 0.5, "refit": "all"}, "refit must be one of units, layers, block, model; got 'all'"),
    "no step": ({"neurons": 0.5, "round_to": 0}, "round_to must be a whole number of at least 1; got 0"),
    "no seed": ({"neurons": 0.5, "seed": 0.5}, "seed must be an integer"),
    "no function": ({"neurons": 0.5, "progress": 3}, "progress must be a function"),
    "less than a unit": ({"neurons": 0.001}, "too small to remove a single unit"),
    "rounded to nothing": ({"params": 0.1, "round_to": 128, "widths": "free"}, "or units are rounded too coarsely"),
    "more than there is": ({"params": 0.99}, "cannot lose 99% of their parameters"),
    "no epochs": ({"neurons": 0.5, "refit": "block", "epochs": 0}, "epochs"),
    "no memory": ({"neurons": 0.5, "memory": 0}, "memory"),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    model = made("llama")
    before = weights_of(model)
    with pytest.raises(MaskoptError, match=words) as caught:
        maskopt.shrink(model, data(), **options)
    assert str(caught.value).endswith(".")
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_a_budget_of_parameters_is_met(family: str) -> None:
    sizes = {"gpt2": {"n_inner": 400}, "opt": {"ffn_dim": 400}}.get(family, {"intermediate_size": 400})
    model = made(family, **sizes)
    blocks = sum(each.numel() for name, each in model.named_parameters() if "layers." in name or ".h." in name)
    report = maskopt.shrink(model, data(2), params=0.3, method="magnitude")
    before, after = report.parameters
    assert (before - after) / blocks == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("step", [8, 32])
def test_neurons_that_stay_are_a_multiple(step: int) -> None:
    report = maskopt.shrink(made("llama"), data(2), neurons=0.3, heads=0.5, round_to=step, method="magnitude")
    assert {width.after % step for width in report.widths if width.kind == "neurons"} == {0}
    assert {width.after for width in report.widths if width.kind == "heads"} == {1}


def test_experts_keep_multiples_of_eight_and_run_in_half_precision() -> None:
    model = made("mixtral", intermediate_size=48)
    report = maskopt.shrink(model, data(2), neurons=0.25, method="magnitude")  # 36 would do in float32
    assert {width.after % 8 for width in report.widths} == {0}
    with torch.no_grad():
        found = model.bfloat16()(input_ids=data()[0]["input_ids"]).logits
    assert bool(found.isfinite().all())


@combinations(2, method=[*STRUCTURED, ColumnMagnitude()], family=["llama", "gpt2"], ids=str)
def test_every_method_chooses_units_and_the_rest_of_the_model_stays(family: str, method: Any) -> None:
    model = made(family)
    report = maskopt.shrink(model, data(), neurons=0.3, method=method, refit="units")
    assert all(0.0 <= width.error < 1.0 for width in report.widths)
    expected = removed(made(family), report.kept)
    consumers = {f"{width.name}.weight" for width in report.widths}
    found = weights_of(model)
    for name, value in weights_of(expected).items():
        assert found[name].shape == value.shape
        if name not in consumers and name.removesuffix(".bias") + ".weight" not in consumers:
            assert torch.equal(found[name], value), name


@combinations(2, refit=["units", "layers", "block", "model"], family=["llama", "mixtral", "opt"])
def test_every_fit_leaves_a_model_of_the_same_widths(family: str, refit: str) -> None:
    model = made(family)
    report = maskopt.shrink(model, data(), neurons=0.3, refit=refit, epochs=1 if refit in ("block", "model") else None)
    levels = {record.level for record in report.pruning.recovery}
    assert levels == {"units": set(), "layers": set(), "block": {"block"}, "model": {"block", "model"}}[refit]
    assert {width.after / width.before for width in report.widths} == {0.7}
    assert report.to_json()["pruning"]["settings"]["refit"] == refit
    assert bool(computed(model)["logits"].isfinite().all())


def test_a_run_is_repeated_exactly_and_memory_changes_nothing() -> None:
    models = []
    for memory in (2**30, 2**30, 2**21):
        model = made("llama")
        maskopt.shrink(model, data(), neurons=0.3, heads=0.5, refit="block", epochs=1, seed=3, memory=memory)
        models.append(model)
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_seeds_of_the_random_method_differ() -> None:
    kept = [maskopt.shrink(made("llama"), data(2), neurons=0.5, method="random", seed=seed).kept for seed in (0, 0, 1)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not all(torch.equal(kept[0][name], kept[2][name]) for name in kept[0])


@pytest.mark.parametrize("refit", ["units", "layers"])
def test_half_precision_stays(refit: Any) -> None:
    model = made("llama").bfloat16()
    report = maskopt.shrink(model, data(), neurons=0.3, heads=0.5, refit=refit)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    # Most of the units are those of the same model in single precision.
    single = maskopt.shrink(made("llama").bfloat16().float(), data(), neurons=0.3, heads=0.5, refit=refit)
    agree = torch.cat([report.kept[name] == single.kept[name] for name in report.kept])
    assert float(agree.float().mean()) > 0.9


def test_padding_does_not_matter() -> None:
    batches = data(3)
    padded = []
    for batch in batches:
        ids = batch["input_ids"]
        filler = torch.full((2, 5), 7)
        padded.append(
            {
                "input_ids": torch.cat([ids, filler], 1),
                "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(filler)], 1),
            }
        )
    kept = [
        maskopt.shrink(made("llama"), each, neurons=0.3, heads=0.5, refit="units").kept for each in (batches, padded)
    ]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_the_smaller_model_is_the_dense_one_with_zeros_where_nothing_is_refitted() -> None:
    dense, model = made("llama"), made("llama")
    report = maskopt.shrink(model, data(2), neurons=0.3, heads=0.5, method="magnitude", refit="units")
    for site in find_units(dense, data()[0]).sites:
        weight = dict(site.block.module.named_parameters())[site.role.consumer]
        columns = site.role.columns(report.kept[site.name])
        small = dict(model.named_parameters())[f"{site.name}.weight"]
        weight.data.zero_()
        weight.data[:, columns.flatten().nonzero().flatten()] = small.data
    assert torch.allclose(computed(dense)["logits"], computed(model)["logits"], atol=1e-4)


STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "widths": ({"widths": "free", "refit": "units"}, "AllocationProgress"),
    "choice": ({"refit": "units"}, "solve"),
    "layers": ({"refit": "layers"}, "solve"),
    "fit of blocks": ({"refit": "block", "epochs": 1}, "recover"),
    "fit of the model": ({"refit": "model", "epochs": 1}, "recover"),
}


def belongs(event: Any, stage: str) -> bool:
    return type(event).__name__ == stage or getattr(event, "stage", None) == stage


@functools.cache
def calls_of(case: str) -> int:
    """How often a run that nothing interrupts reports progress of its stage."""
    options, stage = STAGES[case]
    events: list[Any] = []
    maskopt.shrink(made("llama"), data(), neurons=0.3, heads=0.5, progress=events.append, **options)
    return sum(belongs(event, stage) for event in events)


@pytest.mark.parametrize(("error", "late"), [(RuntimeError, False), (KeyboardInterrupt, True)])
@pytest.mark.parametrize("case", STAGES)
def test_the_model_is_as_it_was_after_a_failure(case: str, error: Any, late: bool) -> None:
    options, stage = STAGES[case]
    assert calls_of(case) > 1
    last, calls = calls_of(case) - 1 if late else 1, 0

    def fail(event: Any) -> None:
        nonlocal calls
        calls += belongs(event, stage)
        if calls > last:
            raise error("as asked")

    model = made("llama")
    before, config, form = weights_of(model), model.config.to_dict(), str(model)
    flags = [each.requires_grad for each in model.parameters()]
    model.train()
    with pytest.raises((error, MaskoptError)):
        maskopt.shrink(model, data(), neurons=0.3, heads=0.5, progress=fail, **options)
    assert model.training
    assert (model.config.to_dict(), str(model)) == (config, form)
    assert [each.requires_grad for each in model.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nothing_stays_of_a_site_that_loses_all() -> None:
    model = made("llama")
    site = find_units(model, data()[0]).sites[0]
    with pytest.raises(
        MaskoptError, match=r"No unit of model\.layers\.0\.self_attn\.o_proj would stay; keep at least one"
    ):
        cut_model(model, {site: torch.zeros(site.role.number, dtype=torch.bool)})


def test_free_widths_have_as_many_parameters_as_equal_ones_and_are_taken_where_they_are_better() -> None:
    equal, free = (
        maskopt.shrink(
            made("llama", num_hidden_layers=4), data(6), neurons=0.5, heads=0.5, refit="units", widths=widths
        )
        for widths in ("uniform", "free")
    )
    assert free.parameters[1] == pytest.approx(equal.parameters[1], rel=0.01)
    assert free.plan is not None
    divergences = free.plan.details["divergence"]
    assert (
        divergences[free.plan.details["chosen"]] == min(divergences.values())
        or free.plan.details["chosen"] == "uniform"
    )
    assert equal.cut.uniform
    assert cache_bytes(made("llama")) == equal.cache_bytes[0] / 2
    with pytest.raises(MaskoptError, match="three"):
        maskopt.shrink(made("llama"), data(1), neurons=0.5, widths="free")


def test_where_no_width_is_free_all_are_equal() -> None:
    # Experts of a block have one width, and here all experts must lose the same.
    report = maskopt.shrink(made("mixtral"), data(), neurons=0.3, refit="units", widths="free")
    assert report.plan is not None
    assert report.plan.details["chosen"] == "uniform"
    assert report.cut.uniform
    assert {width.after for width in report.widths} == {NEURONS * 7 // 10}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_plan_says_what_the_finished_model_has(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", num_hidden_layers=2)
    names = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
    # What the trials chose, right or wrong.
    lost = [0.05, 0.95] if seed % 2 else [0.95, 0.05]
    chosen = maskopt.Plan("columns", dict(zip(names, lost, strict=True)), "auto", {"chosen": "kl"})
    monkeypatch.setattr(sys.modules["maskopt.shrinking.shrink"], "free_widths", lambda *args, **options: chosen)
    report = maskopt.shrink(model, data(4, seed=seed), neurons=0.5, refit="units", widths="free")
    assert report.plan is not None
    widths = {width.name: width for width in report.widths}
    for name in names:
        width = widths.get(name)
        removed = 0.0 if width is None else 1 - width.after / width.before
        assert report.plan.sparsities[name] == pytest.approx(removed)
    final = report.plan.details["final divergence"]
    assert (report.plan.details["chosen"] == "uniform") == (final["uniform"] <= final["free"]) == report.cut.uniform
    again = maskopt.shrink(made("llama", num_hidden_layers=2), data(4, seed=seed), widths=report.plan, refit="units")
    assert again.parameters == report.parameters


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_models_that_do_not_write_and_those_with_encoders_lose_neurons(name: str) -> None:
    model = {**ARCHITECTURES, **ENCODER_DECODERS}[name].build().eval()
    batches = [dict(batch) for batch in data()]
    for batch in batches:
        if name != "bert":
            batch["decoder_input_ids"] = batch["input_ids"]
    before = model.num_parameters()
    report = maskopt.shrink(model, batches, neurons=0.3, refit="units")
    assert report.cache_bytes is None
    assert report.cut.uniform
    assert before - model.num_parameters() == sum(width.parameters for width in report.widths) > 0
    with pytest.raises(MaskoptError, match="needs a language model"):
        maskopt.shrink(ARCHITECTURES["bert"].build(), data(), neurons=0.3, widths="free")
