"""Synthetic layers: the same for the same seed, valid, and with the property of their family."""

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.problems import FAMILIES, synthetic

SIZES = [(1, 1), (3, 2), (2, 3), (5, 7), (1, 40), (64, 64), (8, 100)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_instances_are_valid_and_deterministic(family: str, rows: int, d: int) -> None:
    for seed in range(3):
        one, two = (synthetic(family, rows, d, seed=seed) for _ in range(2))
        torch.manual_seed(seed)  # the global generator is not used
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.gram, two.gram)
        assert one.metadata == two.metadata
        assert one.metadata["origin"] == f"synthetic {family}, seed {seed}"
        assert one.weight.shape == (rows, d)
        assert one.gram.shape == (d, d)
        assert one.weight.dtype == one.gram.dtype == torch.float32
        assert torch.equal(one.gram, one.gram.T)
        one.problem()


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    synthetic("dead", seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_give_different_instances(family: str) -> None:
    assert not torch.equal(synthetic(family, 4, 8, seed=0).gram, synthetic(family, 4, 8, seed=1).gram)
    assert not torch.equal(synthetic(family, 4, 8, seed=0).weight, synthetic(family, 4, 8, seed=1).weight)


def test_instances_record_their_tokens() -> None:
    assert synthetic(rows=2, d=6).tokens == 48
    assert synthetic(rows=2, d=6, tokens=5).tokens == 5
    assert synthetic("rank-deficient", rows=2, d=9).tokens == 3


@pytest.mark.parametrize("seed", range(5))
def test_independent_is_nearly_diagonal(seed: int) -> None:
    gram = synthetic("independent", d=30, tokens=3000, seed=seed).gram.double() / 3000
    assert float((gram - torch.eye(30)).abs().max()) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_correlated_is_ill_conditioned(seed: int) -> None:
    gram = synthetic("correlated", d=48, seed=seed).gram.double()
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert float(eigenvalues[-1] / eigenvalues[0]) > 100
    off_diagonal = gram - torch.diag(gram.diagonal())
    assert float(off_diagonal.square().sum() / gram.square().sum()) > 0.3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("d", [16, 64, 200])
def test_outliers_stand_out(d: int, seed: int) -> None:
    size = synthetic("outliers", d=d, seed=seed).gram.diagonal().double().sqrt()
    assert float(size.max() / size.median()) > 20
    assert int((size > 15 * size.median()).sum()) <= 3 + d // 20


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [2, 3, 10, 64])
def test_rank_deficient_has_the_rank_of_its_tokens(d: int, seed: int) -> None:
    instance = synthetic("rank-deficient", d=d, seed=seed)
    rank = int(torch.linalg.matrix_rank(instance.gram.double(), rtol=1e-6))
    assert rank == instance.tokens == max(1, d // 3) < d


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [1, 2, 10, 64, 200])
def test_about_a_tenth_of_the_channels_is_dead(d: int, seed: int) -> None:
    gram = synthetic("dead", d=d, seed=seed).gram
    dead = gram.diagonal() == 0
    assert max(1, d // 10) <= int(dead.sum()) <= 2 * max(1, d // 10)
    assert not gram[dead].any()


@pytest.mark.parametrize("d", [64, 200])
def test_a_tenth_are_copies_of_their_neighbours(d: int) -> None:
    gram = synthetic("dead", d=d, seed=5).gram.double()
    size, neighbour = gram.diagonal(), torch.arange(d).roll(-1)
    distance = size + size[neighbour] - 2 * gram[torch.arange(d), neighbour]
    alive = int(((distance <= 1e-5 * size) & (size > 0)).sum())
    copies_of_the_dead = int((size == 0).sum()) - d // 10
    assert alive + copies_of_the_dead == d // 10


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"family": "easy"}, "There is no synthetic family 'easy'; choose one of independent, correlated"),
        ({"rows": 0}, "needs positive sizes; got rows 0, d 64"),
        ({"d": 0}, "needs positive sizes"),
        ({"d": -3}, "needs positive sizes"),
        ({"tokens": 0}, "tokens 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        synthetic(**settings)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**500, 0.5, "1"])
def test_seeds_that_no_generator_takes_are_refused(seed: object) -> None:
    with pytest.raises(MaskoptError, match=r"^The seed must be an integer of at most 64 bits; got [^\n]*\.$"):
        synthetic(rows=2, d=4, seed=seed)  # type: ignore[arg-type]
