"""What needs gradients on the pretend device, which only a process of its own can compute there.

    python -m tests.devices.gradients

Everything runs on the CPU and on the pretend device; what differs is printed as JSON, by case.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import maskopt
from maskopt.models import allocate, prune
from maskopt.problems import Function
from maskopt.recovery import Continuation, Recovery
from maskopt.solvers import FrankWolfe, solve
from tests.devices.pretend import DEVICE, pretend_device, register_for_gradients
from tests.models.conftest import ARCHITECTURES, VOCABULARY

MASKS, METHOD = maskopt.NM(keep=2, group=4), maskopt.ConditionalADMM(iterations=4, stages=2)
Found = dict[str, Tensor]


def batches() -> list[Tensor]:
    return list(torch.randint(1, VOCABULARY, (48, 20), generator=torch.Generator().manual_seed(1)).split(12))


def model() -> PreTrainedModel:
    # The gradient of Llama's activation is computed in parts on devices without a function for it: other last digits.
    return ARCHITECTURES["gpt2"].build(n_layer=2, attn_implementation="eager")


def recovered(device: torch.device, recovery: Recovery) -> Found:
    """Return masks, weights and losses of a model that was pruned and recovered."""
    pruned = model()
    report = prune(pruned, batches(), MASKS, METHOD, device=device, recover=recovery)
    assert {parameter.device for parameter in pruned.parameters()} == {device}
    assert any(record.after < record.before for record in report.recovery), "nothing was learnt"
    losses = torch.tensor([[record.before, record.after] for record in report.recovery], dtype=torch.float64)
    return dict(pruned.state_dict()) | {f"mask of {name}": mask for name, mask in report.masks.items()} | {"l": losses}


def allocated(device: torch.device) -> Found:
    """Return the sparsities that second derivatives choose."""
    plan = allocate(model(), batches(), "per-row", 0.5, maskopt.Wanda(), rule="fisher", device=device)
    return {name: torch.tensor(sparsity) for name, sparsity in plan.sparsities.items()}


def minimised(device: torch.device) -> Found:
    """Return the mask of a function whose gradient torch computes."""
    weight = maskopt.synthetic(rows=3, d=8).weight.to(device)
    problem = Function(
        lambda x: (weight * (1.0 - x)).sum(1).square() + (weight * x).cos().sum(1),
        (3, 8),
        dtype=weight.dtype,
        device=device,
    )
    result = solve(problem, maskopt.PerRow(0.5), FrankWolfe("vanilla", iterations=10))
    assert result.mask.device == device
    return {"mask": result.mask, "objective": result.objective}


CASES: dict[str, Callable[[torch.device], Found]] = {
    "blocks": lambda device: recovered(device, Recovery("block", epochs=1, rule=Continuation(), step_size=1e-2)),
    "model": lambda device: recovered(device, Recovery("model", epochs=1)),
    "allocation": allocated,
    "function": minimised,
}


def differences(case: Callable[[torch.device], Found]) -> list[str]:
    """Return what the pretend device finds otherwise than the CPU."""
    torch.manual_seed(0)
    here = case(torch.device("cpu"))
    torch.manual_seed(0)
    with pretend_device():
        there = {name: value.cpu() for name, value in case(DEVICE).items()}
    assert here.keys() == there.keys()
    return [name for name, value in here.items() if not torch.equal(value, there[name])]


if __name__ == "__main__":
    torch.set_num_threads(1)
    register_for_gradients()
    print(json.dumps({name: differences(case) for name, case in CASES.items()}))
