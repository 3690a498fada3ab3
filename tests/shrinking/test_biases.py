"""FLAP in models: fluctuations about the true means, and biases that keep the mean output of layers that have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import maskopt
from maskopt.shrinking import ShrinkReport
from tests.models.conftest import VOCABULARY
from tests.models.families import build


def tokens() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (4, 24), generator=random) for _ in range(3)]


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """The inputs of a layer, from the model itself, shape (tokens, d)."""
    seen = list[Tensor]()
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    hook.remove()
    return torch.cat(seen).double()


def shrunk(model: nn.Module, method: str = "flap", batches: list[Tensor] | None = None, **more: object) -> ShrinkReport:
    return maskopt.shrink(model, batches or tokens(), neurons=0.5, method=method, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_units_of_the_least_fluctuation_go(family: str) -> None:
    model = build(family)
    before = dict(build(family).named_modules())
    report = shrunk(model)
    width = report.widths[0]
    x = inputs_of(build(family), width.name, tokens())
    layer = before[width.name]
    weight = layer.weight.double() if isinstance(layer, nn.Linear) else layer.weight.double().T  # type: ignore[union-attr,operator]
    scores = x.var(0) * weight.square().sum(0)
    expected = torch.zeros(width.before, dtype=torch.bool)
    expected[scores.argsort(descending=True)[: width.after]] = True
    assert torch.equal(report.kept[width.name], expected)


def test_biases_keep_the_mean_output() -> None:
    batches = tokens()
    dense, model = build("opt"), build("opt")
    report = shrunk(model, batches=batches)
    assert report.biases == {"changed": [width.name for width in report.widths], "without": []}
    name = report.widths[0].name
    outputs = []
    for one in (dense, model):
        layer = one.get_submodule(name)
        x = inputs_of(one, name, batches)
        outputs.append((x @ layer.weight.double().T + layer.bias.double()).mean(0))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert shrunk(build("opt"), method="fasp").biases is None


def test_padding_has_no_part_in_the_means() -> None:
    ids = tokens()[0]
    padded = {
        "input_ids": torch.cat((ids, torch.zeros(4, 8, dtype=torch.long)), 1),
        "attention_mask": torch.cat((torch.ones(4, 24), torch.zeros(4, 8)), 1).long(),
    }
    one, other = build("opt"), build("opt")
    shrunk(one, batches=[ids, ids])
    shrunk(other, batches=[padded, padded])  # type: ignore[list-item]
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_without_a_bias_are_named() -> None:
    report = shrunk(build("llama"))
    assert report.biases == {"changed": [], "without": [width.name for width in report.widths]}
    assert report.to_json()["biases"] == report.biases


def test_after_an_error_biases_are_as_they_were() -> None:
    model, dense = build("opt"), build("opt")

    def fail(event: object) -> None:
        if getattr(event, "done", 0) >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrunk(model, progress=fail)
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b), name
