"""Every minor version of transformers that is installed here has been tried with packed folders."""

import json
import re
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "packed-versions.json"
VERSIONS = json.loads(RESULTS.read_text())["versions"]
SAME = "the same bits"


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_the_installed_version_has_been_tried() -> None:
    installed = minor(transformers.__version__)
    assert installed in VERSIONS, (
        f"Packed folders have not been tried with transformers {installed}: run python benchmarks/packed_versions.py"
    )


def test_every_version_that_is_allowed_loads_the_same_bits_or_nothing() -> None:
    assert "5.0" in VERSIONS  # the oldest that pyproject.toml allows
    assert re.search(r'"transformers>=5\.0,<6"', (ROOT / "pyproject.toml").read_text())
    numbers = sorted(int(version.partition(".")[2]) for version in VERSIONS)
    assert numbers == list(range(len(numbers)))
    for version, found in VERSIONS.items():
        assert minor(found["transformers"]) == version
        for mode in ("maskopt", "code"):
            outcomes = {name: outcome for name, outcome in found[mode].items() if not outcome.startswith("the dense")}
            assert {"gpt2", "llama", "mixtral"} <= set(outcomes)
            assert set(outcomes.values()) == {SAME}
        for outcome in found["nobody"].values():
            assert outcome.startswith(("ValueError", "the dense folder"))
            assert SAME not in outcome
