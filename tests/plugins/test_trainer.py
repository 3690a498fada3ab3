"""Fine-tuning by the Trainer of transformers, and by loops of one's own, keeps every zero."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from maskopt.errors import MaskoptError
from maskopt.plugins.trainer import KeepMasks, keeping_masks

ROOT = Path(__file__).parents[2]


def trained(model, windows, folder, callback, **settings):
    data = [{"input_ids": window, "labels": window} for window in windows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **{"num_train_epochs": 10, "learning_rate": 3e-3, **settings},
    )
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=callback).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "optim": "adamw_torch"},
        {"optim": "sgd", "learning_rate": 0.5},
    ],
    ids=["mixed precision", "accumulated", "sgd"],
)
def test_ten_epochs_keep_every_zero(pruned, windows, loss, zeros, tmp_path, settings):
    before, first = zeros(pruned), loss(pruned)
    others = {name: parameter.clone() for name, parameter in pruned.named_parameters()}
    trained(pruned, windows, tmp_path, [KeepMasks()], **settings)
    assert loss(pruned) < 0.95 * first
    after = zeros(pruned)
    assert set(after) >= set(before)
    for name, zero in before.items():
        assert not bool((zero & ~after[name]).any())
        assert not torch.equal(pruned.get_parameter(name), others[name])
    assert not any(parameter._post_accumulate_grad_hooks for parameter in pruned.parameters())


@pytest.mark.slow
def test_without_it_zeros_are_lost(pruned_llama, windows, zeros, tmp_path):
    model = copy.deepcopy(pruned_llama)
    trained(model, windows, tmp_path, [], num_train_epochs=1)
    assert sum(int(zero.sum()) for zero in zeros(model).values()) < 100


@pytest.mark.slow
def test_half_precision_weights_keep_their_zeros(pruned_llama, windows, zeros, tmp_path):
    model = copy.deepcopy(pruned_llama).to(torch.bfloat16)
    before = zeros(model)
    trained(model, windows, tmp_path, [KeepMasks()], num_train_epochs=2)
    assert all(not bool((zero & ~zeros(model)[name]).any()) for name, zero in before.items())


def test_given_masks_are_kept(pruned, windows, zeros):
    name = next(iter(zeros(pruned)))
    mask = torch.ones_like(pruned.get_parameter(name), dtype=torch.bool)
    mask[:, ::3] = False
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.01)
    with keeping_masks(pruned, optimizer, {name.removesuffix(".weight"): mask}):
        assert not bool(pruned.get_parameter(name)[~mask].any())
        for _ in range(2):
            pruned(input_ids=windows, labels=windows).loss.backward()
            assert not bool(pruned.get_parameter(name).grad[~mask].any())
            optimizer.step()
            assert not bool(pruned.get_parameter(name)[~mask].any())
            optimizer.zero_grad()
    pruned(input_ids=windows, labels=windows).loss.backward()
    optimizer.step()
    assert bool(pruned.get_parameter(name)[~mask].any())  # nothing is left behind


def test_what_cannot_be_kept_says_so(pruned, windows):
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    with pytest.raises(MaskoptError, match="no weight named x"), keeping_masks(pruned, optimizer, {"x": torch.ones(1)}):
        pass
    name = next(name for name, parameter in pruned.named_parameters() if parameter.ndim == 2)
    with (
        pytest.raises(MaskoptError, match="has shape"),
        keeping_masks(pruned, optimizer, {name: torch.ones(3, 5)}),
    ):
        pass
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.1)
    with pytest.raises(MaskoptError, match="No weight of the model is zero"), keeping_masks(pruned, optimizer):
        pass


def test_divided_weights_are_refused(pruned_llama, tmp_path):
    arguments = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    first = TrainingArguments(**arguments)
    object.__setattr__(first, "fsdp", True)
    object.__setattr__(first, "fsdp_config", {"version": 1})
    other = TrainingArguments(**arguments)
    object.__setattr__(other, "deepspeed", "zero3.json")
    for each in (first, other):
        with pytest.raises(MaskoptError, match="cannot be kept; train with DDP or with FSDP of version 2"):
            KeepMasks().on_train_begin(each, None, None, model=pruned_llama)
    with pytest.raises(MaskoptError, match="No weight of the model is zero"):
        KeepMasks().on_train_begin(TrainingArguments(**arguments), None, None, model=torch.nn.Linear(2, 2))
    empty = torch.nn.Linear(2, 2)
    empty.weight = torch.nn.Parameter(torch.empty(0))
    with (
        pytest.raises(MaskoptError, match="weight is empty in this process"),
        keeping_masks(empty, torch.optim.SGD(empty.parameters(), lr=0.1), {"weight": torch.ones(2, 2)}),
    ):
        pass


def run_in_two(script, folder):
    """Run a script of this folder in two processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_zeros_of_weights_that_fsdp_divides_are_kept(pruned_llama, windows, zeros, tmp_path):
    pruned = copy.deepcopy(pruned_llama)
    with torch.no_grad():
        pruned.lm_head.weight[:, ::5] = 0.0  # FSDP does not divide it again after a pass without gradients
    pruned.save_pretrained(tmp_path / "pruned")
    run_in_two("shard_script.py", tmp_path)
    found, told = torch.load(tmp_path / "found.pt"), json.loads((tmp_path / "told.json").read_text())
    before = zeros(pruned)
    for state in (found["zeros"], found["callback"]):
        assert all(not bool(state[name][zero].any()) for name, zero in before.items())
    # One process with whole weights does the same, up to the order of sums.
    model = copy.deepcopy(pruned)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with keeping_masks(model, optimizer):
        for _ in range(4):
            model(input_ids=windows, labels=windows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found["zeros"][name], parameter, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(parameter, pruned.get_parameter(name), atol=1e-4)
        assert not torch.equal(found["callback"][name], found["zeros"][name])

    state = found["mask"]["model.layers.0.mlp.down_proj.weight"]
    assert not bool(state[1:5, ::3].any())
    assert int((state == 0).sum()) < state.numel() // 4  # the others were let go
    assert told["gradients"] == [0.0] * 3
    assert "has shape (31, 48), but its weight (32, 48)" in told["shape"]
    assert "train with DDP or with FSDP of version 2" in told["first"]
    assert told["one"] == ""
    assert "No weight of the model is zero" in told["none"]


@pytest.mark.slow
def test_several_processes_keep_every_zero(pruned_llama, zeros, tmp_path):
    pruned_llama.save_pretrained(tmp_path / "pruned")
    run_in_two("train_script.py", tmp_path)
    after = type(pruned_llama).from_pretrained(tmp_path / "trained")
    before = zeros(pruned_llama)
    assert all(not bool((zero & ~zeros(after)[name]).any()) for name, zero in before.items())
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, pruned_llama.model.layers[0].mlp.up_proj.weight)
