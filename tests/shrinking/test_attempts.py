"""Several ways to prune one model: the best one stays, and a later one only where it is clearly better."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maskopt.models.batches import prepare_batches
from maskopt.shrinking.attempts import better_of
from tests.models.conftest import ARCHITECTURES

SEQUENCES = 8


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([torch.full((SEQUENCES,), 2.0), torch.full((SEQUENCES,), 1.0)], 1),
        ([torch.full((SEQUENCES,), 1.0), torch.full((SEQUENCES,), 2.0)], 0),
        ([torch.full((SEQUENCES,), 1.0), torch.full((SEQUENCES,), 1.0)], 0),
        # Better in the mean, but by less than the standard error of the differences.
        ([torch.ones(SEQUENCES), torch.ones(SEQUENCES) + 0.5 * (-1.0) ** torch.arange(SEQUENCES) - 0.1], 0),
        ([torch.full((SEQUENCES,), 1.0), torch.full((SEQUENCES,), torch.nan)], 0),
        ([torch.full((SEQUENCES,), 3.0), torch.full((SEQUENCES,), 2.0), torch.full((SEQUENCES,), 2.5)], 1),
    ],
)
def test_a_later_way_has_to_be_clearly_better(losses: list[Tensor], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"].build().eval()
    weight = model.model.layers[0].mlp.down_proj.weight
    dense = weight.detach().clone()
    done: list[Any] = []

    def attempt() -> Any:
        assert torch.equal(weight, dense)  # each begins with the dense model
        with torch.no_grad():
            weight.fill_(float(len(done)))
        done.append(SimpleNamespace(number=len(done)))
        return done[-1]

    monkeypatch.setattr("maskopt.models.divergence.Divergence.each", lambda *_: losses[len(done) - 1].double())
    batches = prepare_batches(model, [torch.zeros((SEQUENCES, 4), dtype=torch.long)])
    number, found, means = better_of(model, batches, [attempt] * len(losses))
    assert number == best
    assert found is done[best]
    assert torch.equal(weight, torch.full_like(weight, float(best)))
    assert means == pytest.approx([float(each.mean()) for each in losses], nan_ok=True)
