"""The baseline of the recovery study: what it fits, and how the study shows it."""

import copy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from maskopt.models import prune
from maskopt.models.batches import prepare_batches
from maskopt.models.replay import evaluation_mode
from maskopt.oracles import PerRow
from maskopt.solvers import Wanda
from tests.models.conftest import weights_of


@pytest.fixture(scope="module")
def study():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return import_module("recovery")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_come_nearer_and_only_kept_weights_change(study, build, make_batches, name):
    model, dense = build(name), build(name)
    batches = make_batches()
    masks = prune(model, batches, PerRow(0.5), Wanda()).masks
    old = weights_of(model)

    def error(network):
        total = 0.0
        with evaluation_mode(network), evaluation_mode(dense):
            for batch in prepare_batches(dense, batches):
                last, target = (
                    net(**batch.inputs, output_hidden_states=True).hidden_states[1] for net in (network, dense)
                )
                total += float((last - target).square().sum())
        return total

    before = error(model)
    study.ebft(model, dense, batches, None, masks, rate=0.01, passes=6)
    assert error(model) < 0.9 * before
    new = weights_of(model)
    for key, value in old.items():
        layer = key.removesuffix(".weight")
        if layer in masks:
            assert not bool(new[key][~masks[layer]].any())
            assert not torch.equal(new[key], value)
        else:
            assert torch.equal(new[key], value)


def test_the_best_learning_rate_is_chosen_for_each_cell(study):
    cell = {"model": "m", "seed": 0, "samples": 8, "pattern": "2:4", "method": "best"}
    records = [
        {**cell, "recovery": name, "perplexity": value, "fits": []}
        for name, value in (("none", 9.0), ("block:fixed", 5.0), ("block", 4.0), ("ebft:0.1", 8.0), ("ebft:0.01", 6.0))
    ]
    records.append({**copy.copy(records[-1]), "pattern": "4:8", "recovery": "ebft:0.1", "perplexity": 7.0})
    found = study.with_best(records)
    assert found[:-2] == records
    assert [(record["pattern"], record["perplexity"]) for record in found[-2:]] == [("2:4", 6.0), ("4:8", 7.0)]
    table = study.ratios(found, ["none", "block:fixed", "block", study.BEST])
    assert table.splitlines()[-1] == f"| {study.BEST} | 0.667 (0.667) | 1.200 (1.200) | 1.500 (1.500) |"
