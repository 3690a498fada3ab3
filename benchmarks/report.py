"""Common to all benchmarks: the description of the machine, and the writing of results."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from maskopt.cli.output import environment

__all__ = ["RESULTS", "circumstances", "table", "write"]

RESULTS = Path(__file__).with_name("results")


def circumstances() -> dict[str, Any]:
    """Return date, commit, hardware, threads and versions."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        **environment(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)]), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def write(name: str, title: str, text: str, figures: dict[str, Any]) -> None:
    """Write results/NAME.md for people and results/NAME.json with every figure, replacing an earlier run's."""
    RESULTS.mkdir(exist_ok=True)
    around = circumstances()
    facts = "\n".join(f"- {key}: {value}" for key, value in around.items())
    contents = {
        f"{name}.md": f"# {title}\n\n{text}\n\n## Circumstances\n\n{facts}\n",
        f"{name}.json": json.dumps({"circumstances": around, **figures}, indent=1) + "\n",
    }
    for file, content in contents.items():
        aside = RESULTS / f".{file}.tmp"
        aside.write_text(content)
        aside.replace(RESULTS / file)
        print(f"wrote benchmarks/results/{file}")


def _commit() -> str:
    try:
        root = Path(__file__).parent
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
