"""What is kept inside a block is what the block would compute."""

import signal
import subprocess
import sys

import pytest
import torch

from maskopt import NM, PerRow, Wanda
from maskopt.errors import MaskoptError
from maskopt.models import find_blocks, prune
from maskopt.models.batches import prepare_batches
from maskopt.models.replay import Replay, evaluation_mode
from maskopt.models.reuse import Reuse
from maskopt.models.states import States, Storage
from maskopt.weights import ConditionalADMM
from tests.helpers import combinations
from tests.models.conftest import ARCHITECTURES


def pruned(model, batches, solver, **options):
    report = prune(model, batches, PerRow(0.5), solver, propagate="corrected", **options)
    return report, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@combinations(2, name=ARCHITECTURES, padded=[False, True], solver=[Wanda(), ConditionalADMM(iterations=8)], ids=str)
def test_masks_and_weights_are_those_of_blocks_that_run_as_a_whole(
    build, make_batches, name, padded, solver, monkeypatch
):
    batches = make_batches(padded)
    kept = pruned(build(name), batches, solver)
    monkeypatch.setattr(Replay, "reuse", lambda self, position, turns: None)
    whole = pruned(build(name), batches, solver)
    assert kept[0].masks.keys() == whole[0].masks.keys()
    for key, weight in whole[1].items():
        torch.testing.assert_close(kept[1][key], weight, rtol=1e-5, atol=1e-6)


def test_both_stacks_of_an_encoder_decoder_reuse(encoder_decoder, make_batches, monkeypatch):
    batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :7]} for batch in make_batches()]
    kept = pruned(encoder_decoder.build(), batches, Wanda())
    monkeypatch.setattr(Replay, "reuse", lambda self, position, turns: None)
    whole = pruned(encoder_decoder.build(), batches, Wanda())
    assert all(torch.equal(mask, kept[0].masks[name]) for name, mask in whole[0].masks.items())


def test_nothing_before_a_weight_that_two_modules_share_is_kept(build, make_batches):
    model = build("llama")
    for block in model.model.layers:
        block.self_attn.k_proj.weight = block.self_attn.v_proj.weight
    with evaluation_mode(model):
        replay = Replay(model, find_blocks(model), prepare_batches(model, make_batches()))
        assert replay.reuse(0, []) is None


def test_the_estimate_is_what_is_kept(llama, make_batches, monkeypatch):
    """Bytes of the first batch that are kept at most, and those of a run with that batch only."""
    most, estimates = [0], []
    put, size = States.put, Reuse.size

    def count(self, key, value, *, copy=False):
        put(self, key, value, copy=copy)
        if isinstance(key, tuple) and len(key) == 3:
            kept = sum(one.numel() * 4 for one in map(first, self._kept.values()))
            most[0] = max(most[0], kept)

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    monkeypatch.setattr(States, "put", count)
    monkeypatch.setattr(Reuse, "size", lambda self, turns: estimates.append(size(self, turns)) or estimates[-1])
    prune(llama, make_batches(count=1), PerRow(0.5), Wanda(), propagate="corrected")
    assert 0 < most[0] <= max(estimates) <= 2 * most[0]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_states_come_back_as_they_were(place, tmp_path):
    value = (torch.arange(6.0).view(2, 3).T, None, {"half": torch.ones(2, dtype=torch.bfloat16)}, 7)
    with Storage(0, place, tmp_path) as storage:
        states = storage.states(10, torch.device("cpu"))
        states.put("a", value)
        states.put("b", torch.zeros(1))
        states.put("b", torch.ones(1))
        found = states.get("a")
        assert torch.equal(found[0], value[0])
        assert found[1] is None
        assert torch.equal(found[2]["half"], value[2]["half"])
        assert found[3] == 7
        assert states.pop("b") == 1.0
        assert "b" not in states
        states.clear()
        assert "a" not in states
    assert list(tmp_path.iterdir()) == []


def test_what_exceeds_the_memory_goes_to_files_and_they_are_removed(llama, make_batches, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    prune(llama, make_batches(), NM(keep=2, group=4), Wanda(), propagate="corrected", memory=1, progress=seen.append)
    assert list(tmp_path.iterdir()) == []
    with Storage(80, folder=tmp_path) as storage:
        assert storage.states(10, torch.device("cpu")).place == "device"
        assert storage.states(11, torch.device("cpu")).place == "disk"
        assert storage.states(11, torch.device("meta")).place == "host"


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    script = f"""
import os, signal, torch
from pathlib import Path
from maskopt.models.states import Storage
with Storage(0, "disk", Path({str(tmp_path)!r})) as storage:
    storage.states(1, torch.device("cpu")).put("a", torch.zeros(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.rglob("*.safetensors")
    with Storage(0, "disk", tmp_path) as mine, Storage(0, "disk", tmp_path) as other:
        states = [storage.states(1, torch.device("cpu")) for storage in (mine, other)]
        for kept in states:
            kept.put("a", torch.ones(2))
        assert not left.exists()
        # Those of processes that live stay.
        for kept in states:
            assert torch.equal(kept.get("a"), torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_states_that_cannot_be_written_are_one_sentence(tmp_path):
    with (
        Storage(0, "disk", tmp_path / "missing") as storage,
        pytest.raises(MaskoptError, match=r"Temporary files in .*missing cannot be written: No such file"),
    ):
        storage.states(1, torch.device("cpu")).put("a", torch.ones(2))


def test_what_fits_a_part_of_what_is_free_on_an_accelerator_stays_there(monkeypatch):
    class Accelerator:  # 600 bytes are free, and 60 of what torch holds are not used
        mem_get_info = staticmethod(lambda device: (540, 1000))
        memory_reserved = staticmethod(lambda device: 100)
        memory_allocated = staticmethod(lambda device: 40)

    monkeypatch.setattr(torch, "xpu", Accelerator)
    with Storage(80) as storage:
        for size, place in ((10, "device"), (100, "device"), (101, "host")):
            assert storage.states(size, torch.device("xpu")).place == place
