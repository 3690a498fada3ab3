"""Bounds of shrunk layers: below every choice that was made, of the same problem, and exact where all were tried."""

from __future__ import annotations

import json

import pytest
import torch

import maskopt
from maskopt.errors import MaskoptError
from maskopt.shrinking import ShrinkReport
from maskopt.structured import ExactSwaps
from tests.models.conftest import VOCABULARY
from tests.models.families import build


def tokens() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (4, 24), generator=random) for _ in range(2)]


def shrunk(family: str = "llama", method: str | ExactSwaps = "best", **options: object) -> ShrinkReport:
    model = build(family)
    settings = {"neurons": 0.5, "refit": "units", "certify": True} | options
    return maskopt.shrink(model, tokens(), method=method, **settings)  # type: ignore[arg-type]


def test_no_method_falls_below_the_bound_of_the_first_block() -> None:
    swaps = ExactSwaps(enumerate=0)
    first = {name: shrunk(method=name).widths[0].proof for name in ("random", "flap", "fasp", "osscar")}
    first["best"] = shrunk(method=swaps).widths[0].proof
    best = first["best"]
    assert best is not None
    for proof in first.values():
        assert proof is not None
        assert proof.bound == pytest.approx(best.bound, rel=1e-9)  # of one problem
        assert 0.0 < proof.bound <= best.error <= proof.error * (1 + 1e-6)
        assert proof.finished
        assert proof.share == pytest.approx(proof.bound / proof.error)


def test_choices_that_are_all_tried_are_proven() -> None:
    report = shrunk(neurons=0.0, heads=0.5)
    for width in report.widths:
        assert width.proof is not None
        assert 0.999 < width.proof.share <= 1.0


def test_experts_are_proven_together() -> None:
    report = shrunk("mixtral")
    assert all(width.proof is not None and 0.0 <= width.proof.bound <= width.proof.error for width in report.widths)


def test_bounds_within_a_time_limit_are_bounds() -> None:
    swaps, seen = ExactSwaps(enumerate=0), list[str]()
    report = shrunk(
        method=swaps, certify_seconds=1e-3, progress=lambda event: seen.append(f"{event.stage} {event.name}")
    )
    whole = shrunk(method=swaps)
    for width, other in zip(report.widths, whole.widths, strict=True):
        assert width.proof is not None
        assert other.proof is not None
        assert not width.proof.finished
        assert 0.0 <= width.proof.bound <= other.proof.error
        assert f"certify {width.name}" in seen
    content = json.loads(json.dumps(report.to_json()))
    assert {"error", "bound", "finished", "share"} == set(content["widths"][0]["proof"])
    assert "proof" not in shrunk(certify=False).to_json()["widths"][0]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(MaskoptError, match="certify must be True or False; got 'sdp'"):
        shrunk(certify="sdp")
    with pytest.raises(MaskoptError, match="certify asks for; give both"):
        shrunk(certify=False, certify_seconds=1.0)
    with pytest.raises(MaskoptError, match="time for certify must be a positive number of seconds"):
        shrunk(certify_seconds=0.0)
