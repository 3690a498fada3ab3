"""Models on a GPU, where there is one: what the CPU gets, and the same bits wherever blocks and states wait."""

from __future__ import annotations

import pytest
import torch

import maskopt
from maskopt.models import load_masks, load_model, prune, save_pruned, select_layers
from maskopt.recovery import RULES, Recovery
from maskopt.shrinking import drop_experts, shrink
from maskopt.weights import ConditionalADMM
from tests.devices.gpu import CUDA, needs_gpu
from tests.models.conftest import ARCHITECTURES, MIXTURES, VOCABULARY

pytestmark = needs_gpu

MASKS = maskopt.NM(keep=2, group=4)
SOLVER = ConditionalADMM(iterations=8, stages=2)


def many():
    """Batches enough for models to be fitted."""
    return list(torch.randint(1, VOCABULARY, (64, 24), generator=torch.Generator().manual_seed(0)).split(8))


def check(model, report):
    assert {tensor.device for tensor in model.state_dict().values()} == {CUDA}
    for layer in select_layers(model).layers:
        assert MASKS.contains(layer.oriented(report.masks[layer.name]).contiguous()), layer.name


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
@pytest.mark.parametrize("padded", [False, True])
def test_errors_are_those_of_the_cpu(build, make_batches, name, padded):
    here, there = build(name), build(name)
    expected = prune(here, make_batches(padded), MASKS, SOLVER)
    found = prune(there, make_batches(padded), MASKS, SOLVER, device=CUDA)
    check(there, found)
    assert found.sparsity == expected.sparsity
    # The error of a layer depends on the masks of those before it; on the average such differences are small.
    assert found.mean_relative_error == pytest.approx(expected.mean_relative_error, rel=0.1)
    first = zip(found.layers[:2], expected.layers[:2], strict=True)
    assert all(one.relative_error == pytest.approx(other.relative_error, rel=0.05) for one, other in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_half_precision(build, make_batches, name, dtype):
    here, there = build(name).to(dtype), build(name).to(dtype)
    expected = prune(here, make_batches(), MASKS, SOLVER)
    found = prune(there, make_batches(), MASKS, SOLVER, device=CUDA)
    check(there, found)
    assert {parameter.dtype for parameter in there.parameters()} == {dtype}
    assert found.mean_relative_error == pytest.approx(expected.mean_relative_error, rel=0.1)


@pytest.mark.parametrize("propagate", ["corrected", "dense", "pruned"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bits_do_not_depend_on_where_blocks_and_states_wait(build, tokenizer, make_batches, tmp_path, name, propagate):
    build(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    expected = None
    for number, (offload, states) in enumerate(
        [(False, "device"), (False, "device"), (False, "host"), (False, "disk"), (True, "device"), (True, "host")]
    ):
        folder = tmp_path / f"work {number}" if offload else None
        model, reader = load_model(tmp_path / "dense", device="cuda", offload=folder)
        options = {"propagate": propagate, "states": states, "device": CUDA, "on_error": "keep"}
        report = prune(model, make_batches(), MASKS, SOLVER, **options)
        save_pruned(tmp_path / f"out {number}", model, reader, report)
        weights = dict(load_model(tmp_path / f"out {number}")[0].named_parameters())
        weights |= {f"mask of {name}": mask for name, mask in load_masks(tmp_path / f"out {number}").items()}
        expected = expected or weights
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items()), (offload, states)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_fitted_by_every_rule(build, rule):
    model = build("llama")
    report = prune(
        model, many(), MASKS, maskopt.Wanda(), device=CUDA, recover=Recovery("block", epochs=2, rule=RULES[rule]())
    )
    check(model, report)
    assert all(record.after <= record.before for record in report.recovery)
    assert any(record.after < record.before for record in report.recovery)


@pytest.mark.parametrize("level", ["block", "model"])
def test_recovery_helps_as_on_the_cpu(build, level):
    losses = {}
    for device in ("cpu", "cuda"):
        model = build("gpt2")
        report = prune(model, many(), MASKS, SOLVER, device=device, recover=Recovery(level))
        losses[device] = [record.after / record.before for record in report.recovery]
    check(model, report)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)


@pytest.mark.parametrize("rule", ["owl", "dlp", "alpha", "fisher", "kl", "auto"])
def test_sparsities_are_allocated(build, rule):
    model = build("llama")
    plan = maskopt.allocate(model, many(), "per-row", 0.5, maskopt.Wanda(), rule=rule, device=CUDA)
    other = maskopt.allocate(build("llama"), many(), "per-row", 0.5, maskopt.Wanda(), rule=rule)
    assert plan.sparsities.keys() == other.sparsities.keys()
    assert sum(plan.sparsities.values()) == pytest.approx(sum(other.sparsities.values()), rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("widths", ["uniform", "free"])
def test_models_shrink(build, name, widths):
    reports = {}
    for device in ("cpu", "cuda"):
        model = build(name, **({"intermediate_size": 32} if name != "gpt2" else {}))
        reports[device] = shrink(model, many(), neurons=0.25, widths=widths, device=device)
    assert {parameter.device for parameter in model.parameters()} == {CUDA}
    assert torch.isfinite(model(many()[0].to(CUDA)).logits).all()
    assert reports["cuda"].parameters == reports["cpu"].parameters


def test_experts_that_are_dropped_are_those_of_the_cpu(build):
    here, there = build("mixtral"), build("mixtral").to(CUDA)
    expected = drop_experts(here, many(), 0.5)
    found = drop_experts(there, [batch.to(CUDA) for batch in many()], 0.5)
    assert {tensor.device for tensor in there.state_dict().values()} == {CUDA}
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        assert one.dropped == other.dropped
        assert one.error == pytest.approx(other.error, rel=1e-3)
