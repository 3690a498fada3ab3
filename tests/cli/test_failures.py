"""Failures of the machine and interrupts while saving: no partial outputs, existing files unchanged."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskopt import save_instance, synthetic


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def untouched(tmp_path, layer, text):
    """Assert that nothing was added to the folder of the outputs and nothing in it changed."""
    neighbour = tmp_path / "neighbour"
    neighbour.write_bytes(b"precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def check():
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    return check


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written."),
        (FULL, 1, "No space left on device"),
        (MemoryError(), 1, "The memory does not suffice"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "The memory does not suffice"),
    ],
)
@pytest.mark.parametrize("place", ["maskopt.cli.solve.mask_bytes", "maskopt.solvers.solve"])
def test_a_failure_of_solve_leaves_nothing(fails, layer, tmp_path, untouched, monkeypatch, place, error, code, words):
    monkeypatch.setattr(place, raising(error))
    outputs = ("--out", tmp_path / "mask", "--json", tmp_path / "figures")
    assert words in fails("solve", layer, "-s", 0.5, *outputs, code=code)
    untouched()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (FULL, 1)])
def test_a_failure_of_compare_leaves_nothing(run, layer, tmp_path, untouched, monkeypatch, error, code):
    monkeypatch.setattr(Path, "write_text", raising(error))
    run("compare", layer, "-s", 0.5, "--solvers", "wanda", "--json", tmp_path / "figures", code=code)
    untouched()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (FULL, 1)])
@pytest.mark.parametrize("place", ["maskopt.models.journal.save_masks", "maskopt.solvers.base.Monitor.chunk"])
def test_a_failure_of_prune_leaves_nothing(fails, model, text, tmp_path, untouched, monkeypatch, place, error, code):
    monkeypatch.setattr(place, raising(error))
    arguments = ("--calibration", text, "-s", 0.5, "--solver", "wanda", "--samples", 2)
    fails("prune", model, tmp_path / "pruned", *arguments, "--json", tmp_path / "figures", code=code)
    untouched()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (FULL, 1)])
def test_a_failure_of_saving_leaves_finished_blocks_and_says_so(
    fails, run, model, text, tmp_path, untouched, monkeypatch, error, code
):
    arguments = ("prune", model, tmp_path / "pruned", "--calibration", text, "-s", 0.5, "--samples", 2)
    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.saving.save_masks", raising(error))
        said = fails(*arguments, "--json", tmp_path / "figures", code=code)
    assert "2 finished blocks kept in" in said
    assert "--resume" in said
    run(*arguments, "--resume")
    assert (tmp_path / "pruned" / "masks.safetensors").is_file()
    shutil.rmtree(tmp_path / "pruned")
    untouched()


def test_an_output_that_appears_meanwhile_is_kept(fails, layer, tmp_path, monkeypatch):
    out = tmp_path / "mask"
    monkeypatch.setattr("maskopt.cli.solve.mask_bytes", lambda *args: out.write_bytes(b"precious") and b"mask")
    assert "exists already" in fails("solve", layer, "-s", 0.5, "--out", out, "--json", tmp_path / "figures")
    assert out.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == [layer, out]


def test_a_bug_keeps_its_traceback(layer, run, monkeypatch):
    monkeypatch.setattr("maskopt.solvers.solve", raising(RuntimeError("a bug")))
    assert isinstance(run("solve", layer, "-s", 0.5, code=1).exception, RuntimeError)


def test_debug_shows_the_traceback(run, tmp_path):
    result = run("--debug", "solve", tmp_path / "missing", "-s", 0.5, code=1)
    assert "does not exist" in str(result.exception)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    layer = tmp_path / "layer.safetensors"
    save_instance(layer, synthetic(rows=64, d=64))
    command = ["solve", layer, "-s", "0.5", "--solver", "wanda", "--out", tmp_path / "mask.safetensors"]
    result = subprocess.run(
        [sys.executable, "-m", "maskopt", *command],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "could not be written: File too large" in result.stderr
    assert list(tmp_path.iterdir()) == [layer]
