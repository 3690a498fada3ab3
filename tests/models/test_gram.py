"""Gram matrices against token loops."""

import pytest
import torch
from torch import nn

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch
from maskopt.models.gram import GramCollector
from maskopt.models.layers import LinearLayer, linear_layers


def batch_of(x, real=None):
    return Batch({}, tuple(x.shape[:2]), real)


def collect(module, tensors, reals=None):
    layers = list(linear_layers(module))
    with torch.no_grad(), GramCollector(layers) as grams:
        for index, x in enumerate(tensors):
            grams.begin(batch_of(x, None if reals is None else reals[index]))
            module(x)
    return layers, grams


class Attention(nn.Module):
    """Three layers that read one tensor, and one that reads what they make."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(input=x))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(2, 5, 6) for _ in range(3)]


def test_grams_are_sums_over_tokens_and_shared(tensors):
    (q, k, v, o), grams = collect(Attention(), tensors)
    expected = sum(torch.outer(token, token) for x in tensors for token in x.double().reshape(-1, 6))
    torch.testing.assert_close(grams[q].matrix.double(), expected, rtol=1e-6, atol=1e-6)
    assert grams[q] is grams[k]
    assert grams[q] is grams[v]
    assert grams[q] is not grams[o]
    assert grams[q].tokens == grams[o].tokens == 30
    assert not q.module._forward_pre_hooks


def test_padding_is_left_out_even_where_it_is_not_finite(tensors):
    reals = [torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()] * 3
    poisoned = [x.masked_fill(~real.unsqueeze(-1), float("nan")) for x, real in zip(tensors, reals, strict=True)]
    (q, *_), grams = collect(Attention(), poisoned, reals)
    expected = sum(torch.outer(t, t) for x, real in zip(tensors, reals, strict=True) for t in x[real].double())
    torch.testing.assert_close(grams[q].matrix.double(), expected, rtol=1e-6, atol=1e-6)
    assert grams[q].tokens == 21


@pytest.mark.parametrize("shape", [(10, 6), (2, 1, 5, 6), (2, 5, 3, 2)])
def test_padding_is_found_in_flat_and_in_split_inputs(tensors, shape):
    layer = LinearLayer("flat", nn.Linear(shape[-1], 3))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    with torch.no_grad(), GramCollector([layer]) as grams:
        grams.begin(batch_of(tensors[0], real))
        layer.module(tensors[0].reshape(shape))
    rows = tensors[0][real].reshape(-1, shape[-1])
    torch.testing.assert_close(grams[layer].matrix, rows.T @ rows)
    assert grams[layer].tokens == len(rows)


def test_a_pooled_row_per_sequence_has_no_padding(tensors):
    layer = LinearLayer("pooler", nn.Linear(6, 3))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    with torch.no_grad(), GramCollector([layer]) as grams:
        grams.begin(batch_of(tensors[0], real))
        layer.module(tensors[0][:, 0])
    assert grams[layer].tokens == 2


def test_padding_that_cannot_be_told_apart_is_refused(tensors):
    layer = LinearLayer("routed", nn.Linear(6, 3))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    with torch.no_grad(), GramCollector([layer]) as grams:
        grams.begin(batch_of(tensors[0], real))
        with pytest.raises(MaskoptError, match=r"routed has inputs of shape \(7, 6\) for a padded batch"):
            layer.module(torch.randn(7, 6))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_name_the_layer(tensors, poison):
    tensors[1][0, 0, 2] = poison
    with pytest.raises(MaskoptError, match="inputs of q hold NaN or infinite"):
        collect(Attention(), tensors)


def test_a_layer_that_is_never_called_is_named(tensors):
    class Lazy(Attention):
        def forward(self, x):
            return self.q(x)

    (q, k, *_), grams = collect(Lazy(), tensors)
    assert grams[q].tokens == 30
    with pytest.raises(MaskoptError, match="The layer k saw no token"):
        grams[k]


@pytest.mark.parametrize("calls", ["other tensor", "not at all", "the first not at all"])
def test_layers_with_one_input_in_some_batches_only_are_refused(tensors, calls):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.count = nn.Linear(6, 6), nn.Linear(6, 6), 0

        def forward(self, x):
            self.count += 1
            together = self.count == 1
            if together or calls != "the first not at all":
                self.a(x)
            if together or calls != "not at all":
                self.b(x if together else x + 1)

    def run():
        layers, grams = collect(Fickle(), tensors)
        return [grams[layer] for layer in layers]

    with pytest.raises(MaskoptError, match="a and b have the same input in one calibration batch"):
        run()


def test_layers_that_get_one_input_later_keep_sums_of_their_own(tensors):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.count = nn.Linear(6, 6), nn.Linear(6, 6), 0

        def forward(self, x):
            self.count += 1
            self.a(x)
            self.b(x + 1 if self.count == 1 else x)

    (a, b), grams = collect(Late(), tensors)
    xs = [x.reshape(-1, 6) for x in tensors]
    torch.testing.assert_close(grams[a].matrix, sum(x.T @ x for x in xs))
    torch.testing.assert_close(grams[b].matrix, sum(x.T @ x for x in [xs[0] + 1, *xs[1:]]))


def test_a_tensor_changed_in_place_is_another_input(tensors):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x.clone()
            self.a(x)
            self.b(x.mul_(2))

    (a, b), grams = collect(InPlace(), tensors)
    torch.testing.assert_close(grams[b].matrix, 4 * grams[a].matrix)


def test_half_precision_inputs_are_summed_in_float32(tensors):
    halves = [x.bfloat16() for x in tensors]
    (q, *_), grams = collect(Attention().bfloat16(), halves)
    rows = torch.cat(halves).reshape(-1, 6).double()
    assert grams[q].matrix.dtype == torch.float32
    torch.testing.assert_close(grams[q].matrix.double(), rows.T @ rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_the_callers_matrix_precision_neither_matters_nor_changes(tensors, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        (q, *_), grams = collect(Attention(), tensors)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    rows = torch.cat(tensors).reshape(-1, 6).double()
    torch.testing.assert_close(grams[q].matrix.double(), rows.T @ rows, rtol=1e-6, atol=1e-6)
