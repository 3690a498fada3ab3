"""What decides which setting of a baseline the benchmarks show."""

import sys
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from maskopt import MaskoptError
from maskopt.cli.solvers import parse_comparison
from maskopt.demo.run import MODEL
from maskopt.models import load_model
from maskopt.solvers import SparseFW


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return import_module("perplexity")
    finally:
        sys.path.remove(folder)


def test_windows_held_out_share_no_token_with_calibration_windows(bench: ModuleType) -> None:
    ids = torch.randint(5, (600,), generator=torch.Generator().manual_seed(0))  # repeats of short parts abound
    where = ids.clone()
    starts = [3, 57, 58, 301]
    used = torch.stack([ids[start : start + 20] for start in starts])
    for start in starts:
        where[start : start + 20] = -1
    held = bench.held_out_windows(ids, used, 100)
    free = {tuple(window.tolist()) for window in where.unfold(0, 20, 20) if (window >= 0).all()}
    assert {tuple(window.tolist()) for window in held} == free
    assert len(bench.held_out_windows(ids, used, 7)) == 7


def test_windows_held_out_share_no_token_with_a_repeat_of_a_calibration_window(bench: ModuleType) -> None:
    ids = torch.arange(40).repeat(2)
    held = bench.held_out_windows(ids, torch.arange(10).unsqueeze(0), 100)
    assert held[:, 0].tolist() == [10, 20, 30, 10, 20, 30]


def test_text_that_is_all_calibrated_with_leaves_nothing_to_hold_out(bench: ModuleType) -> None:
    with pytest.raises(MaskoptError, match="no window can be held out"):
        bench.held_out_windows(torch.arange(20), torch.arange(20).view(2, 10), 4)


def test_every_method_of_a_comparison_is_made_by_its_name(bench: ModuleType) -> None:
    solvers, weights = "wanda,continuation", "keep,lsq,sparsegpt,admm,fista,alps,best"
    options = SimpleNamespace(solvers=solvers, weights=weights, tune=[])
    for method, solver in parse_comparison(solvers, weights).items():
        assert list(bench.variants(method, options).values()) == [solver]


def test_every_setting_of_every_grid_is_one_of_its_method(bench: ModuleType) -> None:
    for method in bench.GRIDS:
        options = SimpleNamespace(solvers="ria,sparsefw", tune=[method])
        made = bench.variants(method, options)
        assert tuple(made) == bench.GRIDS[method]
        assert len(set(made.values())) == len(made)
        options.tune = []
        assert list(bench.variants(method, options).values()) == [made[bench.GRIDS[method][0]]]  # the default is first


def test_settings_that_must_find_the_same_are_tried_once(bench: ModuleType) -> None:
    model, _ = load_model(MODEL)
    alphas = {f"{alpha}": SparseFW(alpha=alpha) for alpha in (0.0, 0.25, 0.5, 0.75)}
    assert list(bench.distinct(alphas, model, ("2:4", None))) == ["0.0", "0.5"]
    assert list(bench.distinct(alphas, model, ("4:8", None))) == list(alphas)
    assert list(bench.distinct(alphas, model, ("per-row", 0.5))) == list(alphas)


def test_methods_without_a_grid_cannot_be_tuned(bench: ModuleType) -> None:
    assert bench.parse_tuned("sparsefw,alps") == ["sparsefw", "alps"]
    with pytest.raises(ArgumentTypeError, match="'wanda' has no grid"):
        bench.parse_tuned("wanda")
