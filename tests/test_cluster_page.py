"""docs/verify-on-a-cluster.md: its job array is run, and its commands have their options."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import maskopt
from maskopt.cli.app import app
from tests.helpers import without_seconds

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "verify-on-a-cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_job_array_gives_what_one_command_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, merge = BLOCKS[:2]
    rows = 7
    monkeypatch.chdir(tmp_path)
    maskopt.save_instance("layer.safetensors", maskopt.synthetic(rows=rows, d=8))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "maskopt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m maskopt "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def invoke(*words: str) -> None:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output

    def bash(script: str, **variables: str) -> str:
        done = subprocess.run(
            ["bash", "-eu"], input=script, env={**environment, **variables}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    invoke("solve", "layer.safetensors", "--pattern", "2:4", "--solver", "wanda", "--out", "mask.safetensors")
    for part in range(2):
        bash(array, ROWS=str(rows), SLURM_ARRAY_TASK_ID=str(part), SLURM_ARRAY_TASK_COUNT="2")
    assert "proven fraction" in bash(merge)
    words = ["certify", "layer.safetensors", "--mask", "mask.safetensors", "--pattern", "2:4", "--bound", "sdp"]
    invoke(*words, "--json", "one.json")
    one, merged = (without_seconds(json.loads(Path(name).read_text())["rows"]) for name in ("one.json", "layer.json"))
    assert isinstance(one, list)
    assert isinstance(merged, list)
    for a, b in zip(one, merged, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_commands_exist_with_their_options() -> None:
    joined = "\n".join([*BLOCKS, *re.findall(r"`(maskopt [^`]* --[^`]*)`", PAGE)]).replace("\\\n", " ")
    commands = [line.split() for line in re.findall(r"^maskopt (.*)$", joined, re.MULTILINE)]
    shown = {
        name: CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
        for name in ("verify", "certify", "merge")
    }
    assert {words[0] for words in commands} == set(shown)
    for name, *words in commands:
        for option in (word for word in words if word.startswith("--")):
            assert option in shown[name], f"{name} has no {option}"
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--dependency"}:  # of sbatch
        assert option in shown["verify"] + shown["certify"], option
