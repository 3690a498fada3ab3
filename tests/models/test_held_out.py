"""Held-out batches: errors are measured on them and nothing is chosen by them."""

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.models import prune
from maskopt.oracles import PerRow
from maskopt.solvers import Wanda
from maskopt.weights import ConditionalADMM


@pytest.fixture
def batches(make_batches):
    return make_batches(count=32, length=28)


def test_errors_on_held_out_batches_are_those_of_their_inputs(build, batches, inputs_of):
    """Of every layer, on its inputs in the pruned model; and held-out batches decide nothing."""
    for solver in (Wanda(), ConditionalADMM()):
        model, plain, dense = build("llama"), build("llama"), build("llama")
        report = prune(model, batches[:-2], PerRow(0.5), solver, propagate="pruned", held_out=batches[-2:])
        without = prune(plain, batches[:-2], PerRow(0.5), solver, propagate="pruned")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert [record.relative_error for record in report.layers] == [r.relative_error for r in without.layers]
        assert all(record.held_out_error is None for record in without.layers)
        assert without.held_out is None
        first = [record for record in report.layers if record.name.startswith("model.layers.0.")]
        names = [record.name for record in first]
        # Inputs of a block's layers, all of them still dense.
        inputs = inputs_of(dense, batches[-2:], names)
        for record in first:
            x = inputs[record.name]
            before = dense.get_submodule(record.name).weight.detach().double() @ x.T
            after = model.get_submodule(record.name).weight.detach().double() @ x.T
            expected = float((before - after).square().sum() / before.square().sum())
            assert record.held_out_error == pytest.approx(expected, rel=1e-4)


def test_how_many_tokens_are_wanted(build, batches):
    report = prune(build("llama"), batches[:1], PerRow(0.5), ConditionalADMM(), held_out=batches[1:])
    found = report.held_out
    errors = [(record.held_out_error, record.relative_error) for record in report.layers]
    assert found.ratio == pytest.approx(sum(a for a, _ in errors) / sum(b for _, b in errors))
    assert found.largest_ratio == max(a / b for a, b in errors)
    k = found.tokens * (found.ratio - 1) / (found.ratio + 1)
    n = found.tokens_wanted
    assert found.ratio > 1.1
    assert (n + k) / (n - k) == pytest.approx(1.1, rel=1e-2)
    assert report.to_json()["held_out"]["ratio"] == found.ratio
    assert report.settings["held_out_sequences"] == 2 * len(batches[1:])


@pytest.mark.parametrize("data", [[], ["text"], torch.zeros(0, 4, dtype=torch.int64)])
def test_bad_held_out_batches_are_refused(build, batches, data):
    with pytest.raises(MaskoptError, match="held-out batch"):
        prune(build("llama"), batches, PerRow(0.5), Wanda(), held_out=data)
