"""How many matrices of d x d exist at a time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskopt import PerRow, solve, synthetic
from maskopt.problems import LayerReconstruction, convexity, drift, layer
from maskopt.weights import ADMM, ConditionalADMM, SparseGPT

_D = 160


class Spy(TorchDispatchMode):
    """Counts the memory of tensors with at least d x d entries, in float32 arrays of that size."""

    def __init__(self, *given):
        super().__init__()
        self.live, self.most = {}, 0.0
        for tensor in given:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() >= _D * _D and storage.data_ptr() not in self.live:
            self.live[storage.data_ptr()] = storage.nbytes() / (4 * _D * _D)
            weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.most = max(self.most, sum(self.live.values()))
        return output


@pytest.fixture
def data(monkeypatch):
    # What is computed block by block needs a block more, which is small only where d is large.
    monkeypatch.setattr(layer, "_BLOCK", 8)
    monkeypatch.setattr(layer, "_NARROW", 8)
    monkeypatch.setattr(convexity, "_BLOCK", 8)
    monkeypatch.setattr(drift, "_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_D, 3 * _D, generator=generator)
    y = x + 0.1 * torch.randn(_D, 3 * _D, generator=generator)
    return torch.randn(4, _D, generator=generator), y @ y.T, x @ y.T


def test_targets_take_six_arrays(data):
    weight, gram, cross = data
    with Spy(gram, cross) as spy:
        LayerReconstruction.towards(weight, gram, cross)
    assert 4.0 <= spy.most <= 6.0


def test_the_default_joint_method_takes_five_arrays(data):
    weight, gram, _ = data
    problem = LayerReconstruction(weight, gram)
    with Spy(gram) as spy:
        solve(problem, PerRow(0.5), ConditionalADMM())
    assert 3.0 <= spy.most <= 5.0


@pytest.mark.parametrize("method", [ConditionalADMM(), SparseGPT(), ADMM()])
def test_a_factorisation_serves_all_chunks_of_rows(method, monkeypatch):
    factorised = []
    for name in ("cholesky_ex", "cholesky"):
        inner = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, inner=inner, **kwargs: factorised.append(1) or inner(*args, **kwargs)
        )
    problem = synthetic("correlated", rows=24, d=16).problem()
    numbers = []
    for memory in (2**30, 1):
        factorised.clear()
        solve(problem, PerRow(0.5), method, memory=memory)
        numbers.append(len(factorised))
    assert 0 < numbers[0] == numbers[1] <= 5
