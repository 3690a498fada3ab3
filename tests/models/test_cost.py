"""Counted costs against what torch counts while a model is pruned."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from maskopt import PerRow, Recovery, Wanda, prune
from maskopt.errors import MaskoptError
from maskopt.models import product_speed, pruning_cost
from maskopt.recovery import FixedMasks

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_operations_of_blocks_and_gram_matrices_are_those_of_a_run():
    config = LlamaConfig(**SHAPE)
    cost = pruning_cost(LlamaForCausalLM, config, samples=16, seqlen=64)
    model = LlamaForCausalLM(config)
    batches = list(torch.randint(0, 32, (16, 64)).split(4))
    held_out = [torch.randint(0, 32, (2, 64))]

    def in_place(total, left, right, **options):
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        prune(model, batches, PerRow(0.5), Wanda(), propagate="corrected", held_out=held_out)
    weights = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    # Of Wanda: the target, its error, that of pruning everything, and both on held-out windows; no factorisation.
    evaluated = 5 * sum(2 * len(p) * p.shape[1] ** 2 for p in weights)
    # Three runs of two windows find the order of the blocks and verify it; the others are of 16 and 2, in two models.
    expected = cost.running * (1 + 3 * 2 / (2 * 18)) + cost.grams + evaluated
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)
    assert cost.solving > 0
    assert cost.pruned == sum(p.numel() for p in weights)
    assert cost.parameters == model.num_parameters()


@pytest.mark.parametrize("level", ["block", "model"])
def test_operations_of_a_recovery_are_those_of_a_run(level):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    model = LlamaForCausalLM(config)
    windows = torch.randint(0, 32, (50, 64))
    data = {"held_out": [windows[:2]], "further": list(windows[2:34].split(4))}
    fixed = Recovery(level, rule=FixedMasks(), step_size=0.01)  # one attempt
    counts = []
    for recover in (None, fixed):
        with FlopCounterMode(display=False) as counter:
            report = prune(model, list(windows[34:].split(4)), PerRow(0.5), Wanda(), recover=recover, **data)
        counts.append(counter.get_total_flops())

    def fitting(recovery):
        return pruning_cost(LlamaForCausalLM, config, samples=16, seqlen=64, recovery=recovery).fitting

    # A fit that gains nothing ends early; there are 32 micro-batches.
    expected = fitting(replace(fixed, level="block", epochs=report.recovery[0].steps / 32))
    assert report.recovery[0].steps == report.recovery[1].steps
    if level == "model":
        passes = report.recovery[2].steps / 32
        expected += fitting(replace(fixed, epochs=passes)) - fitting(replace(fixed, level="block", epochs=passes))
    assert counts[1] - counts[0] == pytest.approx(expected, rel=0.1)
    # Trials, and what masks that move need, are more.
    assert fitting(Recovery(level)) > fitting(Recovery(level, step_size=0.01)) > fitting(fixed)
    cost = pruning_cost(LlamaForCausalLM, config, samples=16, seqlen=64, recovery=fixed)
    assert cost.device_bytes(2**10) >= cost.fit_bytes > 0


def test_work_grows_with_tokens_and_blocks_only_where_it_does():
    base = pruning_cost(LlamaForCausalLM, LlamaConfig(**SHAPE), samples=8, seqlen=32)
    deeper = pruning_cost(LlamaForCausalLM, LlamaConfig(**{**SHAPE, "num_hidden_layers": 4}), samples=8, seqlen=32)
    longer = pruning_cost(LlamaForCausalLM, LlamaConfig(**SHAPE), samples=16, seqlen=32)
    assert deeper.operations == pytest.approx(2 * base.operations)
    assert deeper.device_bytes(2**30) == base.device_bytes(2**30)
    assert (longer.running, longer.grams) == pytest.approx((2 * base.running, 2 * base.grams))
    assert longer.solving == base.solving


def test_experts_see_their_share_of_the_tokens():
    shape = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    few = pruning_cost(MixtralForCausalLM, MixtralConfig(**shape), samples=8, seqlen=32)
    more = pruning_cost(MixtralForCausalLM, MixtralConfig(**{**shape, "num_local_experts": 8}), samples=8, seqlen=32)
    assert few.grams == pytest.approx(more.grams)  # twice the experts, half the tokens each
    assert more.solving > 1.5 * few.solving


def test_a_model_that_cannot_be_run_is_refused():
    class Broken(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise ValueError("no")

    with pytest.raises(MaskoptError, match="cannot be counted"):
        pruning_cost(Broken, LlamaConfig(**SHAPE), samples=8, seqlen=32)


def test_the_speed_is_positive():
    assert product_speed(seconds=0.01) > 0
