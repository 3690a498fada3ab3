"""The pretend device itself: what it refuses, what it counts, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import doctest
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.devices import pretend
from tests.devices.pretend import DEVICE, PretendTensor, Waits, pretend_device

Operation = Callable[[Tensor, Tensor], object]


@pytest.fixture
def waits() -> Iterator[Waits]:
    with pretend_device() as waits:
        yield waits


@pytest.fixture
def matrix(waits: Waits) -> Tensor:
    matrix = torch.arange(12.0).view(3, 4).to(DEVICE)
    waits.uploads.clear()
    return matrix


MIXTURES: dict[str, Operation] = {
    "sum": lambda ours, theirs: ours + theirs,
    "reversed": lambda ours, theirs: theirs * ours,
    "product": lambda ours, theirs: ours @ theirs.T,
    "in place": lambda ours, theirs: ours.mul_(theirs),
    "in place elsewhere": lambda ours, theirs: theirs.add_(ours),
    "into a scalar": lambda ours, theirs: theirs.sum().add_(ours.sum()),
    "output": lambda ours, theirs: torch.add(ours, ours, out=theirs),
    "choice": lambda ours, theirs: torch.where(ours > 1, ours, theirs),
    "mask": lambda ours, theirs: ours.masked_fill(theirs > 1, 0.0),
    "concatenation": lambda ours, theirs: torch.cat((ours, theirs)),
    "of scalars": lambda ours, theirs: torch.stack((ours.sum(), theirs.sum())),
    "gather": lambda ours, theirs: ours.gather(1, theirs.long() * 0),
    "index of ours": lambda ours, theirs: theirs[ours[:, 0].long() * 0],
    "assignment": lambda ours, theirs: ours.index_put_((ours[:, 0].long() * 0,), theirs),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_of_both_devices_do_not_mix(matrix: Tensor, name: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXTURES[name](matrix, torch.ones(3, 4))


ALLOWED: dict[str, tuple[Operation, int, int]] = {
    "scalars": (lambda ours, theirs: ours * theirs.sum(), 0, 0),
    "filling with a scalar": (lambda ours, theirs: ours.masked_fill(ours > 1, theirs.sum()), 0, 0),
    "numbers": (lambda ours, theirs: ours.mul_(2.0).add_(ours, alpha=0.5), 0, 0),
    "views": (lambda ours, theirs: ours.T.reshape(2, 6)[:, 1:].unbind(0), 0, 0),
    "selection": (lambda ours, theirs: ours.topk(2).values.gather(1, ours.argsort(1)[:, :2].clamp(max=1)), 0, 0),
    "factorisation": (lambda ours, theirs: torch.linalg.cholesky_ex(ours @ ours.T), 0, 0),
    "masked fill": (lambda ours, theirs: ours.__setitem__(ours > 1, 0.0), 0, 0),
    "like": (lambda ours, theirs: torch.zeros_like(theirs, device=DEVICE), 0, 0),
    "item": (lambda ours, theirs: ours.sum().item(), 1, 0),
    "bool": (lambda ours, theirs: bool((ours > 1).any()), 1, 0),
    "float": (lambda ours, theirs: float(ours[0, 0]), 1, 0),
    "list": (lambda ours, theirs: ours.tolist(), 1, 0),
    "to the CPU": (lambda ours, theirs: ours.cpu(), 1, 0),
    "into the CPU": (lambda ours, theirs: theirs.copy_(ours), 1, 0),
    "nonzero": (lambda ours, theirs: ours.nonzero(), 1, 0),
    "flags": (lambda ours, theirs: ours[ours > 1], 1, 0),
    "values at flags": (lambda ours, theirs: ours.__setitem__(ours > 1, ours[0, :1].expand(10)), 1, 0),
    "unique": (lambda ours, theirs: ours.unique(), 1, 0),
    "repeats": (lambda ours, theirs: ours.repeat_interleave(ours[:, 0].long(), 0), 1, 0),
    "eigenvalues": (lambda ours, theirs: torch.linalg.eigh(ours @ ours.T), 1, 0),
    "equal": (lambda ours, theirs: torch.equal(ours, ours), 1, 0),
    "to the device": (lambda ours, theirs: theirs.to(DEVICE), 0, 1),
    "not waited for": (lambda ours, theirs: theirs.to(DEVICE, non_blocking=True), 0, 0),
    "into the device": (lambda ours, theirs: ours.copy_(theirs), 0, 1),
    "literal": (lambda ours, theirs: torch.tensor([1.0, 2.0], device=DEVICE), 0, 1),
    "index of the CPU": (lambda ours, theirs: ours[theirs[0].long()], 0, 1),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_results_are_those_of_the_cpu_and_waits_are_counted(matrix: Tensor, waits: Waits, name: str) -> None:
    operation, reads, uploads = ALLOWED[name]
    plain = torch.arange(12.0).view(3, 4)
    found = operation(matrix, torch.ones(3, 4))
    assert (waits.reads.total(), waits.uploads.total()) == (reads, uploads)
    expected = operation(plain, torch.ones(3, 4))
    assert same(found, expected)
    assert torch.equal(matrix.cpu(), plain)  # what is changed in place


def same(found: object, expected: object) -> bool:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return torch.equal(found.cpu(), expected.cpu()) and found.stride() == expected.stride()
    if isinstance(expected, tuple):
        assert isinstance(found, tuple)
        return all(same(*pair) for pair in zip(found, expected, strict=True))
    return found == expected


def test_a_module_moves_there_and_back(waits: Waits) -> None:
    module = torch.nn.Linear(4, 3)
    weight = module.weight.detach().clone()
    module.to(DEVICE)
    copied = copy.deepcopy(module)
    copied.weight.data = copied.weight.data * 2.0
    assert isinstance(copied.weight, torch.nn.Parameter)
    assert copied.weight.device == module.weight.device == DEVICE
    with torch.no_grad():
        assert torch.equal(module.to("cpu").weight, weight)
        assert torch.equal(copied.to("cpu").weight, 2.0 * weight)
    assert not isinstance(module.weight, PretendTensor)


def test_data_of_the_device_are_not_for_numpy(matrix: Tensor) -> None:
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        matrix.numpy()


def test_places_of_waits_are_lines_of_the_package(matrix: Tensor, waits: Waits) -> None:
    from maskopt.oracles import PerRow

    PerRow(0.5).contains(matrix > 1)
    assert [place.split(":")[0] for place in waits.reads] == ["_local_scalar_dense at maskopt.oracles.matroid"]


def test_nothing_is_left_behind() -> None:
    def known() -> object:
        module = torch.get_device_module("cpu")
        return torch.accelerator.is_available(), torch.accelerator.current_accelerator(), module, set(sys.modules)

    with pretend_device():  # what torch imports when it is first asked
        torch.ones(2).to(DEVICE).unique()
    before = known()
    with pretend_device():
        left = torch.ones(2, device=DEVICE)
        assert not torch._C._is_multithreading_enabled()
    assert known() == before
    assert torch._C._is_multithreading_enabled()
    assert left.device == DEVICE
    with pytest.raises((RuntimeError, ModuleNotFoundError, NotImplementedError)):
        torch.ones(2, device=DEVICE)
    weight = torch.ones(3, requires_grad=True)
    (weight * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.device.type == "cpu"


def test_the_example_is_right() -> None:
    assert doctest.testmod(pretend).failed == 0
