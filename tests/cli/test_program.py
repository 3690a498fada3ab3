from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import maskopt
from maskopt.cli.options import parse_memory
from maskopt.cli.solvers import parse_solver
from maskopt.solvers import RIA, OneSwap, SparseFW, Wanda

COMMANDS = (
    "solve",
    "compare",
    "trace",
    "verify",
    "certify",
    "merge",
    "prune",
    "evaluate",
    "demo",
    "pack",
    "unpack",
    "report",
    "doctor",
)


def test_version_is_printed(run):
    assert run("--version").stdout == f"maskopt {maskopt.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    text = run(command, "--help").stdout
    assert f"maskopt {command}" in text.split("Example:")[1]
    assert "--json" in text


def test_help_lists_the_commands(run):
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert run(code=2).output.split() == text.split()  # no arguments: help


@pytest.mark.slow
def test_module_runs_as_a_program_without_loading_transformers(layer):
    # Layer-level commands start in a second because of that.
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('transformers' in sys.modules))\n"
        "runpy.run_module('maskopt', run_name='__main__')"
    )
    arguments = [sys.executable, "-c", code, "solve", str(layer), "-s", "0.5", "--solver", "wanda"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "relative error" in result.stdout
    assert result.stdout.endswith("False\n")
    assert result.stderr == ""  # no progress bars where no terminal is


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500M", 500 * 2**20), ("2G", 2**31), ("1.5GiB", 3 * 2**29), ("64kB", 2**16), (" 1T ", 2**40)],
)
def test_memory_sizes_are_parsed(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("spec", "settings", "solver"),
    [
        ("wanda", (), Wanda()),
        ("ria", ("power=1",), RIA(power=1.0)),
        ("sparsefw:iterations=500;alpha=0.5", (), SparseFW(iterations=500, alpha=0.5)),
        ("sparsefw:iterations=500", ("iterations=7", "start=ria:power=1"), SparseFW(7, start=RIA(power=1.0))),
        ("one-swap: max-steps = 3", (), OneSwap(max_steps=3)),
        ("one-swap:max_steps=none", (), OneSwap()),
    ],
)
def test_solver_specs_are_parsed(spec, settings, solver):
    assert parse_solver(spec, settings) == solver


def test_doctor_says_what_is_installed_and_what_is_missing(run, read, tmp_path, monkeypatch):
    target = tmp_path / "json"
    said = run("doctor", "--json", target).stdout
    found = read(target)
    packages = {(each["extra"], each["package"]): each for each in found["packages"]}
    assert found["works"]
    assert packages["", "torch"]["fits"]
    assert packages["hf", "transformers"]["wanted"].count(",") == 1
    assert found["devices"][0]["name"] == "cpu"
    assert f"maskopt  {maskopt.__version__}" in " ".join(said.split("\n")).replace("  python", "")
    known = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError
        return "0.1" if name in ("joblib", "transformers") else known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = run("doctor", code=1).stdout
    assert "pip install 'maskopt[peft]'" in said
    assert "pip install 'joblib>=1.4'" in said
    run("doctor", "--json", tmp_path / "other", code=1)
    packages = {(each["extra"], each["package"]): each for each in read(tmp_path / "other")["packages"]}
    assert not read(tmp_path / "other")["works"]
    assert not packages["", "joblib"]["fits"]
    assert not packages["hf", "transformers"]["fits"]
    assert packages["peft", "peft"]["installed"] is None


def test_shells_complete_commands():
    environment = {**os.environ, "_MASKOPT_COMPLETE": "complete_bash", "COMP_WORDS": "maskopt pr", "COMP_CWORD": "1"}
    program = Path(sys.executable).with_name("maskopt")
    run = subprocess.run([program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.split() == ["prune"]
