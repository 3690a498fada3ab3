"""Programs that tests run in processes of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

__all__ = ["forked_ranks", "outcomes_of"]


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


def forked_ranks(count: int, task: Callable[[], object]) -> list[int]:
    """Let several processes do a task together, as torchrun would start them, and return their exit codes.

    They are forked, because each would otherwise import torch for seconds; before anything is computed, as torch
    demands. Where one fails, the others are left to notice.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        sys.stdout.flush()
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        try:
            task()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
