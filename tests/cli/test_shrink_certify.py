"""`maskopt shrink --certify`: what is proven is in the table, in the lines and in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_SETTINGS = ("--neurons", 0.5, "--samples", 4, "--no-speed", "--quiet")


def test_what_is_proven_is_reported(
    run: Callable[..., Any], read: Callable[[Path], Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    result = run(
        "shrink", model, out, "--calibration", text, *_SETTINGS, "--certify", "--time-limit", 1e-3, "--json", file
    )
    written = read(file)
    assert read(out / "report.json")["widths"] == written["widths"]
    shares = [width["proof"]["share"] for width in written["widths"]]
    assert shares
    assert all(0.0 <= share <= 1.0 for share in shares)
    shown = " ".join((result.stdout + result.stderr).split())
    assert "any choice of as many units, with any weights" in shown
    assert "later fits" in shown
    stopped = sum(not width["proof"]["finished"] for width in written["widths"])
    assert (f"ended {stopped} of {len(shares)} proofs" in shown) == (stopped > 0)


def test_without_proofs_there_is_no_word_of_them(
    run: Callable[..., Any], fails: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    result = run("shrink", model, tmp_path / "out", "--calibration", text, *_SETTINGS, "--refit", "units")
    assert "prove" not in result.stdout
    sentence = fails("shrink", model, tmp_path / "no", "--calibration", text, *_SETTINGS, "--time-limit", 5)
    assert "give both" in sentence
