"""Whole models on the pretend device: the CPU's masks and weights, where the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import maskopt
from maskopt.models import prune
from maskopt.models.batches import Batch
from maskopt.models.gram import GramCollector
from maskopt.models.layers import linear_layers
from maskopt.models.states import Place
from maskopt.solvers import Solver
from tests.devices import gradients
from tests.devices.pretend import DEVICE, pretend_device
from tests.models.conftest import ARCHITECTURES, MIXTURES, VOCABULARY

MASKS = maskopt.NM(keep=2, group=4)
SOLVERS = {
    "wanda": maskopt.Wanda(),
    "continuation": maskopt.ContinuationFrankWolfe(iterations=8),
    "best": maskopt.ConditionalADMM(iterations=8, stages=2),
}


def build(name: str) -> PreTrainedModel:
    # torch has other kernels for attention on the CPU than elsewhere.
    changes = {"num_hidden_layers": 2} if name != "gpt2" else {"n_layer": 2}
    return {**ARCHITECTURES, **MIXTURES}[name].build(attn_implementation="eager", **changes)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Padded batches that lie on the CPU."""
    generator = torch.Generator().manual_seed(1)
    real = [(torch.arange(10) < torch.tensor([[10 - index], [6]])).long() for index in range(count)]
    ids = (torch.randint(1, VOCABULARY, (2, 10), generator=generator) for _ in range(count))
    return [{"input_ids": one * kept, "attention_mask": kept} for one, kept in zip(ids, real, strict=True)]


def compare(name: str, solver: Solver, **settings: object) -> None:
    """Prune a model on the CPU and another one on the pretend device, and compare everything."""
    here, there = build(name), build(name)
    expected = prune(here, batches(), MASKS, solver, **settings)  # type: ignore[arg-type]
    with pretend_device():
        found = prune(there, batches(), MASKS, solver, device=DEVICE, **settings)  # type: ignore[arg-type]
        tensors = {key: (value.device, value.cpu()) for key, value in there.state_dict().items()}
    assert all(device == DEVICE for device, _ in tensors.values())
    for key, value in here.state_dict().items():
        assert torch.equal(tensors[key][1], value), key
    assert expected.masks.keys() == found.masks.keys()
    for key, mask in expected.masks.items():
        assert torch.equal(mask, found.masks[key].cpu()), key
    for one, other in zip(expected.layers, found.layers, strict=True):
        assert vars(one) | {"seconds": 0} == vars(other) | {"seconds": 0}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pruned_model_is_that_of_the_cpu(name: str, solver: str) -> None:
    compare(name, SOLVERS[solver])


@pytest.mark.parametrize("states", ["device", "host", "disk"])
def test_states_come_back_from_where_they_wait(states: Place) -> None:
    compare("llama", SOLVERS["best"], states=states, held_out=batches(5)[3:])


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_every_way_of_calibration_stays_on_the_device(propagate: str) -> None:
    compare("llama", SOLVERS["best"], propagate=propagate)


def test_bounds_of_layers_are_those_of_the_cpu() -> None:
    compare("gpt2", SOLVERS["wanda"], certify="sdp")


def test_starts_may_lie_on_the_cpu() -> None:
    start = dict(prune(build("gpt2"), batches(), MASKS, maskopt.Wanda()).masks)
    compare("gpt2", SOLVERS["continuation"], start=start)


def test_gram_matrices_are_summed_on_the_device() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    x, real = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[4], [3]])
    found = {}
    with pretend_device() as waits, torch.no_grad():
        for device in (torch.device("cpu"), DEVICE):
            layers = list(linear_layers(module.to(device)))
            with GramCollector(layers) as grams:
                waits.reads.clear()
                grams.begin(Batch({}, (2, 5), real))
                module(x.to(device))
                found[device.type] = [grams[layer].matrix for layer in layers]
        assert [gram.device for gram in found[DEVICE.type]] == [DEVICE, DEVICE]
        for here, there in zip(found["cpu"], found[DEVICE.type], strict=True):
            assert torch.equal(here, there.cpu())


@pytest.fixture(scope="module")
def differences() -> dict[str, list[str]]:
    """What runs with gradients find otherwise than on the CPU, by case."""
    command = [sys.executable, "-m", gradients.__name__]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, list[str]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", gradients.CASES)
def test_what_needs_gradients_agrees_with_the_cpu(differences: dict[str, list[str]], case: str) -> None:
    assert differences[case] == []
