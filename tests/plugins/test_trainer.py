"""Fine-tuning by the Trainer of transformers, and by loops of one's own, keeps every zero."""

import copy
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


def test_divided_weights_are_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for name in ("fsdp", "deepspeed"):
        other = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        object.__setattr__(other, name, ["full_shard"])
        with pytest.raises(MaskoptError, match="divides among processes; train with DDP"):
            KeepMasks().on_train_begin(other, None, None, model=None)
    with pytest.raises(MaskoptError, match="No weight of the model is zero"):
        KeepMasks().on_train_begin(arguments, None, None, model=torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_several_processes_keep_every_zero(pruned_llama, zeros, tmp_path):
    pruned_llama.save_pretrained(tmp_path / "pruned")
    script = Path(__file__).with_name("train_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    after = type(pruned_llama).from_pretrained(tmp_path / "trained")
    before = zeros(pruned_llama)
    assert all(not bool((zero & ~zeros(after)[name]).any()) for name, zero in before.items())
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, pruned_llama.model.layers[0].mlp.up_proj.weight)
