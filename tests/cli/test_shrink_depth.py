"""`maskopt shrink --drop-blocks`: alone, and before neurons are removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize("more", [(), ("--neurons", 0.5, "--refit", "units")], ids=["alone", "with neurons"])
def test_blocks_are_dropped_and_the_folder_loads(
    run: Callable[..., Any], read: Callable[[Path], Any], model: Path, text: Path, tmp_path: Path, more: tuple[Any, ...]
) -> None:
    out = tmp_path / "out"
    settings = ("--calibration", text, "--samples", 4, "--no-speed", "--quiet")
    result = run("shrink", model, out, *settings, "--drop-blocks", 1, *more)
    report = read(out / "report.json")
    assert len(report["depth"]["dropped"]) == len(report["depth"]["divergence"]) == 1
    assert report["depth"]["dropped"][0] in result.stdout
    before, after = (AutoConfig.from_pretrained(path).num_hidden_layers for path in (model, out))
    assert after == before - 1
    assert len(report["widths"]) == (after if more else 0)
    sizes = [AutoModelForCausalLM.from_pretrained(path).num_parameters() for path in (model, out)]
    assert report["parameters"] == {"before": sizes[0], "after": sizes[1]}
    caches = report["cache_bytes_per_token"]
    assert caches["after"] == caches["before"] * after / before


def test_too_many_blocks_are_refused(fails: Callable[..., str], model: Path, text: Path, tmp_path: Path) -> None:
    sentence = fails("shrink", model, tmp_path / "out", "--calibration", text, "--drop-blocks", 99, "--quiet")
    assert "number of blocks to drop" in sentence
