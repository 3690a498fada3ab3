"""`maskopt prune` under torchrun: one output, one sentence, and a run that goes on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def start(count, *arguments, dying=None, torchrun=False):
    """Run `maskopt` in several processes, one of which may be killed after its first block."""
    program = str(Path(__file__).with_name("ranks_program.py"))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DYING_RANK": str(dying)}
    command = [sys.executable, *(ranks if torchrun else [program, str(count)]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def arguments(text):
    """Options of a small run."""
    return ["--calibration", text, "--samples", 6, "--batch-size", 2, "--seqlen", 32, "--pattern", "2:4"]


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_rank_ends_the_run_which_another_number_of_ranks_resumes(run, read, model, arguments, tmp_path, dying):
    out, expected = tmp_path / "out", tmp_path / "expected"
    run("prune", model, expected, *arguments)
    # torchrun ends the others, too; without it they find out.
    killed = start(2, "prune", model, out, *arguments, dying=dying, torchrun=dying == 1)
    assert killed.returncode != 0
    assert not out.exists()
    # Processes share standard error, so that a line of one may be cut by another's.
    said = re.findall(r"(?:Another rank has ended|Terminated).*?add --resume to the command to go on\.", killed.stderr)
    assert len(said) == 1, killed.stderr
    assert killed.stdout == ""
    if dying == 0:
        run("prune", model, out, *arguments, "--resume")
    else:
        resumed = start(3, "prune", model, out, *arguments, "--resume", "--json", tmp_path / "json")
        assert resumed.returncode == 0, resumed.stderr
        assert resumed.stdout.count("saved in") == 1
        assert len(read(tmp_path / "json")["layers"]) == 14
    assert content(out) == content(expected)
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


@pytest.mark.parametrize("more", [["--certify", "shift", "--solver", "wanda"], ["--allocation", "owl"]])
def test_ranks_refuse_what_needs_one_process(run, fails, model, arguments, tmp_path, monkeypatch, more):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = fails("prune", model, tmp_path / "out", *arguments, *more)
    assert said.startswith("Several ranks prune layer by layer; --certify and allocating sparsities need one process")
    monkeypatch.setenv("RANK", "1")
    assert run("prune", model, tmp_path / "out", *arguments, *more, code=2).output == ""  # only the first rank says so


@pytest.mark.slow
def test_a_rank_without_a_device_says_so(model, arguments, tmp_path):
    count = max(2, torch.cuda.device_count() + 1)
    failed = start(count, "prune", model, tmp_path / "out", *arguments, "--device", "cuda")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("The device 'cuda:")]
    assert len(said) == 1
    assert not list(tmp_path.glob("out*"))


def test_other_commands_are_refused_under_torchrun(fails, model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = fails("shrink", model, tmp_path / "out", "--calibration", text, "--neurons", "0.5")
    assert said.strip() == (
        "The command shrink runs in one process, and torchrun has started 2; start it without torchrun, which serves "
        "prune and recover."
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_ranks_recover_one_model(run, read, model, arguments, tmp_path):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    run("prune", model, pruned, *arguments)
    options = arguments[: arguments.index("--pattern")]
    done = start(2, "recover", pruned, out, "--against", model, *options, "--json", tmp_path / "json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    found = read(tmp_path / "json")
    assert found["settings"]["number_of_ranks"] == 2
    assert [record["name"] for record in found["recovery"]][-1] == "model"
    assert all(record["after"] <= record["before"] for record in found["recovery"])
    few = start(3, "recover", pruned, tmp_path / "none", "--against", model, "--samples", 1, *options[:2])
    assert few.returncode != 0
    assert "with 2 windows to fit use 2 ranks or fewer" in few.stderr
    assert not (tmp_path / "none").exists()
