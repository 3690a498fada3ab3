"""Load packed folders with every minor version of transformers that maskopt allows, each in a folder of its own.

    python benchmarks/packed_versions.py [--versions 5.0,5.17,5.23] [--last 24]

Installs one version after the other with pip, and loads small pruned models of several kinds in fresh processes: after
`import maskopt`, with trust_remote_code where maskopt cannot be imported, and with neither. Writes
benchmarks/results/packed-versions.{md,json}; a test says so when the installed version is not in that table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
import transformers

ROOT = Path(__file__).parent.parent
MODES = {"maskopt": "import maskopt", "code": "trust_remote_code", "nobody": "neither"}
SAME = "the same bits"


def words(outcomes: dict[str, str], mode: str) -> str:
    """Return what became of all models in one word or two."""
    loadable = [outcome for outcome in outcomes.values() if not outcome.startswith("the dense folder does not load")]
    if mode == "nobody":
        refused = all(outcome.startswith("ValueError") and "trust_remote_code" in outcome for outcome in loadable)
        return "refused" if loadable and refused else "WRONG"
    if not loadable or any(outcome != SAME for outcome in loadable):
        return "WRONG"
    return f"same bits, {len(loadable)} of {len(outcomes)} models"


def trial(version: str, folders: Path, work: Path) -> dict[str, Any]:
    """Install a version, and return the outcomes by mode."""
    place, stub = work / "site", work / "stub"
    stub.mkdir(exist_ok=True)
    (stub / "maskopt.py").write_text("raise ImportError('maskopt is not installed here')\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), f"transformers=={version}.*"]
    subprocess.run(pip, check=True)
    found: dict[str, Any] = {}
    for mode in MODES:
        own = ROOT if mode == "maskopt" else stub
        environment = {
            **os.environ,
            "PYTHONPATH": f"{place}{os.pathsep}{own}",
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-P", str(ROOT / "tests" / "packed" / "fresh.py"), mode, str(folders)]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            found[mode] = {"process": done.stderr.strip().splitlines()[-1]}
            continue
        answer = json.loads(done.stdout[done.stdout.index('{"transformers"') :])
        found["transformers"] = answer["transformers"]
        found[mode] = {name: text.replace(str(folders), "FOLDER") for name, text in answer["outcomes"].items()}
    shutil.rmtree(place)
    shutil.rmtree(work / "modules", ignore_errors=True)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", help="minor versions, separated by commas")
    parser.add_argument("--last", type=int, default=int(transformers.__version__.split(".")[1]))
    arguments = parser.parse_args()
    versions = arguments.versions.split(",") if arguments.versions else [f"5.{n}" for n in range(arguments.last + 1)]
    sys.path.insert(0, str(ROOT))
    from tests.packed.made import both, pruned

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folders, work = Path(name) / "folders", Path(name) / "work"
        folders.mkdir()
        work.mkdir()
        kinds = ("gpt2", "llama", "mixtral", "qwen3_moe")
        for kind in kinds:
            both(folders, pruned(kind), kind)
        for version in versions:
            results[version] = trial(version, folders, work)
            print(version, [words(results[version][mode], mode) for mode in MODES], flush=True)
    rows = [
        [results[version].get("transformers", version), *(words(results[version][mode], mode) for mode in MODES)]
        for version in versions
    ]
    text = (
        f"Pruned models ({', '.join(kinds)}; bfloat16, half of the weights zero, some of them negative zeros, several "
        f"files each, saved by transformers {transformers.__version__}), packed, and loaded by AutoModelForCausalLM in "
        f"fresh processes of each version. Where a version does not load the dense folder either, because its "
        f"configuration is newer, the model is not counted. What was loaded is saved again as well, and that plain "
        f"folder loaded.\n\n"
    )
    report.write(
        "packed-versions",
        "Packed folders and versions of transformers",
        text + report.table(["transformers", *MODES.values()], rows),
        {"versions": results},
    )


if __name__ == "__main__":
    main()
