"""Signals and streams: however a command ends, its messages are true and no partial output is left."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time

import pytest

from maskopt.cli import signals
from maskopt.cli.allocate import allocate
from maskopt.cli.options import SOLVER_NAMES
from maskopt.cli.prune import prune
from maskopt.cli.recover_options import RECOVERY_RULES
from maskopt.cli.work_folder import WorkFolder
from maskopt.models import CORRECTION, journal
from maskopt.models.journal import Journal
from maskopt.recovery import RULES
from maskopt.solvers import SOLVERS

# The program, with a place where it waits to be interrupted.
PROGRAM = """
import sys, time
from pathlib import Path
from maskopt import files
import maskopt.cli.mask_file, maskopt.solvers
where = sys.argv.pop(1)
def wait(*args, **kwargs):
    print("now", file=sys.stderr, flush=True)
    time.sleep(30)
if where == "import":
    import maskopt.cli.signals as signals
    begin = signals.begin
    slow = "import sys, time; print('now', file=sys.stderr, flush=True); time.sleep(30)"
    Path(sys.argv[-1] + "x.py").write_text(slow)
    sys.path.insert(0, str(Path(sys.argv[-1]).parent))
    signals.begin = lambda: (begin(), __import__(Path(sys.argv[-1]).name + "x"))
elif where == "solve":
    maskopt.solvers.solve = wait
elif where == "write":
    import maskopt.cli.solve as command
    command.__dict__["mask_bytes"] = wait
elif where == "between":
    rename = files.os.rename
    files.os.rename = lambda one, two: (rename(one, two), wait())
from maskopt.cli import main
main()
"""


def start(layer, where, *arguments, **options):
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        where,
        "solve",
        str(layer),
        "-s",
        "0.5",
        "--solver",
        "wanda",
        *map(str, arguments),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("number", "message", "where"),
    [
        (signal.SIGINT, "Interrupted", "import"),
        (signal.SIGTERM, "Terminated", "solve"),
        (signal.SIGINT, "Interrupted", "write"),
        (signal.SIGTERM, "Terminated", "write"),
        (signal.SIGHUP, "Ended", "write"),
        (signal.SIGTERM, "Terminated", "between"),
    ],
)
def test_signals_end_a_command_without_output(layer, tmp_path, number, message, where):
    before = sorted(tmp_path.iterdir())
    mask, figures = tmp_path / "mask", tmp_path / "figures"
    process = start(layer, where, "--json", figures, "--out", mask)
    assert process.stderr.readline() == "now\n"
    process.send_signal(number)
    time.sleep(0.05)
    if where == "between":
        # A rename and its record are one: the signal waits for both.
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert mask.is_file()
        return
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert said == f"{message}; nothing was written.\n"
    assert (
        sorted(path for path in tmp_path.iterdir() if "x.py" not in path.name and path.name != "__pycache__") == before
    )


def test_complete_outputs_are_reported(fails, layer, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("maskopt.cli.solve.tables", interrupted)
    mask, figures = tmp_path / "mask", tmp_path / "figures"
    said = fails("solve", layer, "-s", 0.5, "--out", mask, "--json", figures, code=130)
    assert said == f"Interrupted; {mask} and {figures} are complete, nothing else was written.\n"
    assert sorted(tmp_path.iterdir()) == sorted([layer, mask, figures])


def run_program(layer, *arguments, **options):
    command = [
        sys.executable,
        "-m",
        "maskopt",
        "solve",
        str(layer),
        "-s",
        "0.5",
        "--solver",
        "wanda",
        *map(str, arguments),
    ]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_a_full_standard_output_is_found_before_the_work(layer, tmp_path):
    with open("/dev/full", "w") as full:
        done = run_program(layer, "--out", tmp_path / "mask", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "Standard output cannot be written to: No space left on device.\n"
    assert list(tmp_path.iterdir()) == [layer]


def test_a_broken_pipe_is_found_before_the_work(layer, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_program(layer, "--out", tmp_path / "mask", stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "Standard output cannot be written to: Broken pipe.\n"
    assert list(tmp_path.iterdir()) == [layer]


def test_a_closed_standard_output_is_refused(layer, tmp_path):
    done = run_program(layer, "--out", tmp_path / "mask", preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr == "Standard output is closed, so nothing could be printed; redirect it to a file instead.\n"
    assert list(tmp_path.iterdir()) == [layer]


def test_closed_input_and_error_streams_do_not_matter(layer, tmp_path):
    done = run_program(
        layer, "--out", tmp_path / "mask", stdout=subprocess.PIPE, preexec_fn=lambda: (os.close(0), os.close(2))
    )
    assert done.returncode == 0
    assert "relative error" in done.stdout
    assert (tmp_path / "mask").is_file()


@pytest.mark.parametrize("arguments", [("--help",), ("prune", "--help"), ("verify", "--help"), ("--version",)])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from maskopt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_names_in_help_are_those_of_the_solvers():
    assert tuple(SOLVERS) == SOLVER_NAMES


def test_names_in_help_are_those_of_the_rules():
    assert tuple(RULES) == RECOVERY_RULES


@pytest.mark.parametrize("command", [prune, allocate])
def test_the_strength_of_the_correction_is_that_of_the_functions(command):
    assert inspect.signature(command).parameters["correction"].default == CORRECTION


def test_finished_blocks_are_told_from_wherever_a_run_is_ended(tmp_path):
    """A signal during an import ends the process at once: nothing that cleans up runs before the sentence."""
    signals.begin()
    out = tmp_path / "out"
    block = Journal.inside(tmp_path / "out.unfinished").folder / "0"
    try:
        with WorkFolder(out, resume=True, needed=True):
            assert signals.what_was_written() == "nothing was written"
            block.mkdir(parents=True)
            (block / journal._RECORD).write_text("{}")
            kept = f"1 finished block kept in {out}.unfinished, add --resume to the command to go on"
            assert signals.outcome(signal.SIGTERM) == f"Terminated; {kept}."
        assert signals.what_was_written() == "nothing was written"
    finally:
        signals.begin()
