"""Programs that tests run in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["outcomes_of"]


def outcomes_of(program: Path, mode: str, folder: Path, importable: str, place: Path) -> dict[str, str]:
    """Run a `fresh.py` where Python packages can be imported from a folder only, and return what it prints.

    Nothing of the environment's Python settings is left, so that maskopt is found there or nowhere; code that
    transformers copies from model folders lies in `place`, where the program runs.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": importable, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(program), mode, str(folder)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    # transformers asks whether code may run, without a new line, before that.
    printed = re.search(r'\{"(outcomes|transformers)".*', done.stdout)
    assert printed is not None, done.stdout
    outcomes: dict[str, str] = json.loads(printed[0])["outcomes"]
    return outcomes
