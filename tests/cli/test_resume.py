"""Interrupted runs of `maskopt prune` go on, and leave nothing behind."""

import os
import signal
import subprocess
import sys

import pytest

from maskopt.models import journal


@pytest.fixture
def arguments(model, text):
    return ["prune", model, "OUT", "--calibration", text, "--pattern", "2:4", "--samples", 4, "--seqlen", 16, "--quiet"]


def named(arguments, out, *more):
    return [out if argument == "OUT" else argument for argument in arguments] + list(more)


@pytest.fixture
def interrupt(monkeypatch, run, arguments, tmp_path):
    """Run the command until a number of blocks is finished, then interrupt it."""

    def stop(blocks, *more, code=130):
        write = journal.Journal.write

        def written(self, number, finished, tensors):
            path = write(self, number, finished, tensors)
            if self.stages == blocks:
                raise KeyboardInterrupt
            return path

        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "write", written)
            return run(*named(arguments, tmp_path / "out", *more), code=code)

    return stop


def weights(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "masks.safetensors")]


def test_an_interrupted_run_says_that_it_can_go_on_and_does(run, fails, arguments, interrupt, tmp_path):
    run(*named(arguments, tmp_path / "whole"))
    said = interrupt(1).stderr
    assert "Interrupted; 1 finished block kept in" in said
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    assert "add --resume to go on" in fails(*named(arguments, tmp_path / "out"))
    run(*named(arguments, tmp_path / "out", "--resume"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_other_settings_are_refused(fails, arguments, interrupt, tmp_path):
    interrupt(1)
    assert "had another" in fails(*named(arguments, tmp_path / "out", "--resume", "--seed", 1))
    assert (tmp_path / "out.unfinished").is_dir()


def test_nothing_to_go_on_with_is_no_failure(run, arguments, tmp_path):
    run(*named(arguments, tmp_path / "out", "--resume"))
    said = run(*named(arguments, tmp_path / "out", "--resume")).stderr
    assert "is complete already" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_the_output_of_another_command_is_not_taken_for_complete(run, fails, arguments, tmp_path):
    run(*named(arguments, tmp_path / "out"))
    assert "another weights made it" in fails(*named(arguments, tmp_path / "out", "--resume", "--weights", "keep"))


def test_without_a_finished_block_nothing_is_kept(fails, run, arguments, interrupt, tmp_path):
    interrupt(0, code=0)  # no block count equals nought: the run completes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    (tmp_path / "next.unfinished").mkdir()
    run(*named(arguments, tmp_path / "next"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "out", "text.txt"]


@pytest.mark.parametrize("more", [("--allocation", "owl", "--sparsity", "0.5"), ("--recover", "model")])
def test_what_needs_the_whole_model_cannot_go_on(fails, arguments, tmp_path, more):
    assert "--resume goes on with commands" in fails(*named(arguments, tmp_path / "out", "--resume", *more))


def test_two_processes_do_not_work_on_one_output(fails, arguments, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another process is working" in fails(*named(arguments, tmp_path / "out"))
    assert folder.is_dir()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_output(run, arguments, tmp_path):
    """Killed by the system right after the first block."""
    run(*named(arguments, tmp_path / "whole"))
    program = (
        "import os, sys\n"
        "from maskopt.models import journal\n"
        "write = journal.Journal.write\n"
        "def written(*arguments):\n"
        "    write(*arguments)\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "journal.Journal.write = written\n"
        "from maskopt.cli.app import app\n"
        "app()\n"
    )
    command = [sys.executable, "-c", program, *map(str, named(arguments, tmp_path / "out"))]
    ended = subprocess.run(command, env=dict(os.environ), capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "out.unfinished").is_dir()
    run(*named(arguments, tmp_path / "out", "--resume"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]
