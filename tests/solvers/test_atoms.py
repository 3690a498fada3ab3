"""Active vertices stored as indices, against dense vertices in dictionaries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.solvers.atoms import Atoms
from tests.helpers import examples
from tests.loop_runs import normal, random


def vertices_of(seed: int, blocks: int, entries: int, equal: bool = False) -> Tensor:
    """Return 0/1 vectors; of any number of ones, none and all included, unless they are to be `equal`."""
    order = random(blocks, entries, seed=seed)
    if equal:
        return (order.argsort(1).argsort(1) < (entries + 1) // 2).double()
    keep = torch.randint(0, entries + 1, (blocks, 1), generator=torch.Generator().manual_seed(seed))
    return (order.argsort(1).argsort(1) < keep).double()


class Dense:
    """The reference: a dictionary vertex -> weight per row block."""

    def __init__(self, vertices: Tensor) -> None:
        self.weight = [{tuple(row): 1.0} for row in vertices.tolist()]

    def add(self, vertices: Tensor, weight: Tensor) -> None:
        for own, row, more in zip(self.weight, vertices.tolist(), weight.tolist(), strict=True):
            if more or tuple(row) in own:
                own[tuple(row)] = own.get(tuple(row), 0.0) + more

    def scale(self, factor: float) -> None:
        self.weight = [{row: factor * weight for row, weight in own.items()} for own in self.weight]

    def drop(self, row_block: int, row: tuple[float, ...]) -> None:
        del self.weight[row_block][row]

    def combined(self, entries: int) -> Tensor:
        total = torch.zeros((len(self.weight), entries), dtype=torch.float64)
        for row_block, own in enumerate(self.weight):
            for row, weight in own.items():
                total[row_block] += weight * torch.tensor(row, dtype=torch.float64)
        return total


def contents(atoms: Atoms) -> list[dict[tuple[float, ...], float]]:
    """Return every row block's active vertices and weights, read slot by slot."""
    found: list[dict[tuple[float, ...], float]] = [{} for _ in range(atoms.blocks)]
    for slot in range(atoms.weight.shape[1]):
        rows = atoms.dense(torch.full((atoms.blocks,), slot), torch.float64).tolist()
        for row_block, weight in enumerate(atoms.weight[:, slot].tolist()):
            if weight > 0:
                assert tuple(rows[row_block]) not in found[row_block]  # duplicates are in one slot
                found[row_block][tuple(rows[row_block])] = weight
    return found


def agree(atoms: Atoms, dense: Dense) -> None:
    found = contents(atoms)
    for row_block, own in enumerate(dense.weight):
        assert found[row_block].keys() == {row for row, weight in own.items() if weight > 0}
        for row, weight in found[row_block].items():
            assert weight == pytest.approx(own[row], rel=1e-12)
    assert atoms.active.tolist() == [len(own) for own in found]
    torch.testing.assert_close(atoms.combined(atoms.weight, torch.float64), dense.combined(atoms.entries))


@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 7), st.booleans(), st.integers(1, 25))
@examples(150)
def test_atoms_agree_with_a_dictionary_of_weights(
    seed: int, blocks: int, entries: int, equal: bool, rounds: int
) -> None:
    """Few entries, so that vertices recur: adding, emptying, scaling, growing, taking, in any order."""
    first = vertices_of(seed, blocks, entries, equal)
    atoms, dense = Atoms(first), Dense(first)
    for turn in range(rounds):
        vertices = vertices_of(seed + turn + 1, blocks, entries, equal)
        weight = random(blocks, seed=seed + turn) * (random(blocks, seed=seed + turn + 77) < 0.8)
        slot = atoms.add(vertices, weight)
        dense.add(vertices, weight)
        placed = atoms.dense(slot, torch.float64)
        known = torch.tensor(
            [tuple(row) in own for row, own in zip(vertices.tolist(), dense.weight, strict=True)], dtype=torch.bool
        )
        assert torch.equal(placed[known], vertices[known])
        if turn % 3 == 2:
            values = normal(blocks, entries, seed=seed + turn)
            largest = bool(turn % 2)
            score, slot = atoms.best(atoms.scores(values), largest)
            for row_block, own in enumerate(dense.weight):
                scores = [float(torch.tensor(row).double() @ values[row_block]) for row in own]
                assert float(score[row_block]) == pytest.approx(max(scores) if largest else min(scores), abs=1e-12)
            where = atoms.active > 1
            gone = atoms.dense(slot, torch.float64).tolist()
            atoms.empty(slot, where)
            for row_block in where.nonzero().flatten().tolist():
                dense.drop(row_block, tuple(gone[row_block]))
        if turn % 4 == 3:
            atoms.weight *= 0.5
            dense.scale(0.5)
        if turn % 7 == 6 and blocks > 1:
            part = torch.tensor([blocks - 1, 0])
            atoms = atoms.take(part)
            dense.weight = [dense.weight[row_block] for row_block in part.tolist()]
            blocks = 2
        agree(atoms, dense)
    atoms.settle()
    torch.testing.assert_close(atoms.weight.sum(1), torch.ones(blocks, dtype=torch.float64))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(60)
def test_scores_are_inner_products(dtype: torch.dtype, seed: int, blocks: int, entries: int) -> None:
    atoms = Atoms(vertices_of(seed, blocks, entries).to(dtype))
    for turn in range(6):
        atoms.add(vertices_of(seed + turn, blocks, entries).to(dtype), torch.ones(blocks))
    values = normal(blocks, entries, seed=seed).to(dtype)
    scores = atoms.scores(values)
    assert scores.dtype == torch.float64
    for slot in range(scores.shape[1]):
        dense = atoms.dense(torch.full((blocks,), slot), dtype)
        torch.testing.assert_close(scores[:, slot], (dense * values).double().sum(1), rtol=1e-12, atol=1e-6)


def test_slots_are_reused() -> None:
    atoms = Atoms(torch.eye(1, 40).double())
    for turn in range(1, 40):
        atoms.add(torch.eye(40)[turn : turn + 1].double(), torch.ones(1))
        atoms.empty(torch.tensor([int(atoms.weight.argmax())]), torch.tensor([True]))
    assert atoms.weight.shape[1] <= 8
    assert int(atoms.active) == 1


def test_where_reserves_a_slot_at_zero_weight() -> None:
    atoms = Atoms(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    vertices = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    slot = atoms.add(vertices, torch.zeros(2), where=torch.ones(2, dtype=torch.bool))
    assert torch.equal(atoms.dense(slot, torch.float32), vertices)
    assert atoms.active.tolist() == [1, 1]
    assert slot.tolist()[1] == 0  # the slot that holds the vertex already


@given(st.integers(0, 999), st.integers(1, 5))
@examples(40)
def test_inner_products_follow_their_atoms(seed: int, blocks: int) -> None:
    atoms, entries = Atoms(vertices_of(seed, blocks, 6)), 6
    hessian = normal(entries, entries, seed=seed)
    hessian = hessian @ hessian.T

    def products(these: Atoms) -> Tensor:
        slots = range(these.weight.shape[1])
        dense = torch.stack([these.dense(torch.full((these.blocks,), slot), torch.float64) for slot in slots], 1)
        return dense @ hessian @ dense.mT

    atoms.matrix = products(atoms)
    for turn in range(10):
        slot = atoms.add(vertices_of(seed + turn, blocks, entries), torch.ones(blocks))
        every = torch.arange(blocks)
        own = products(atoms)
        atoms.matrix[every, slot, :] = own[every, slot, :]
        atoms.matrix[every, :, slot] = own[every, :, slot]
        active = (atoms.weight > 0).double()
        both = active.unsqueeze(1) * active.unsqueeze(2)
        torch.testing.assert_close(atoms.matrix * both, own * both)
    part = torch.arange(blocks).flip(0)
    torch.testing.assert_close(atoms.take(part).matrix, atoms.matrix[part])


def test_settle_drops_negligible_weights() -> None:
    atoms = Atoms(torch.tensor([[1.0, 0.0]]))
    atoms.add(torch.tensor([[0.0, 1.0]]), torch.tensor([1e-15]))
    atoms.settle()
    assert atoms.active.tolist() == [1]
    assert float(atoms.weight.sum()) == 1.0
