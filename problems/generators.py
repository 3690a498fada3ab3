"""Seeded synthetic layers of any size, with the features of real Grams that make problems hard."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.checks import SEEDS, shown, whole
from maskopt.errors import MaskoptError
from maskopt.problems.instance import Instance

__all__ = ["FAMILIES", "synthetic"]

_Maker = Callable[[int, int, torch.Generator], Tensor]


def _independent(d: int, tokens: int, random: torch.Generator) -> Tensor:
    """Uncorrelated inputs: Wanda is nearly optimal."""
    return torch.randn(tokens, d, generator=random, dtype=torch.float64)


def _correlated(d: int, tokens: int, random: torch.Generator) -> Tensor:
    """Power-law spectrum in a random basis and a common offset, as hidden states have."""
    basis = torch.linalg.qr(_independent(d, d, random)).Q
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.75
    offset = torch.randn(d, generator=random, dtype=torch.float64)
    x: Tensor = (_independent(d, tokens, random) * spectrum) @ basis * d**0.5 + 0.5 * offset
    return x


def _outliers(d: int, tokens: int, random: torch.Generator) -> Tensor:
    """Correlated inputs with one channel in fifty a hundred times as large."""
    scale = torch.where(torch.rand(d, generator=random) < 0.02, 100.0, 1.0).double()
    scale[int(torch.randint(d, (), generator=random))] = 100.0
    return _correlated(d, tokens, random) * scale


def _rank_deficient(d: int, tokens: int, random: torch.Generator) -> Tensor:
    """Fewer tokens than inputs: the Gram is singular."""
    return _correlated(d, max(1, min(tokens, d // 3)), random)


def _dead(d: int, tokens: int, random: torch.Generator) -> Tensor:
    """Dead channels (a tenth) and exact copies of neighbours (another tenth)."""
    x = _correlated(d, tokens, random)
    tenth = max(1, d // 10)
    dead = torch.zeros(d + 1, dtype=torch.bool)
    dead[torch.randperm(d, generator=random)[:tenth]] = True
    x[:, dead[:d]] = 0.0
    # Disjoint pairs of neighbours, so that no copy is overwritten by another one.
    pairs = torch.randperm(d // 2, generator=random) * 2
    copies = pairs[~dead[pairs] & ~dead[pairs + 1]][:tenth]
    x[:, copies] = x[:, copies + 1]
    return x


FAMILIES: dict[str, _Maker] = {
    "independent": _independent,
    "correlated": _correlated,
    "outliers": _outliers,
    "rank-deficient": _rank_deficient,
    "dead": _dead,
}


def synthetic(
    family: str = "correlated", rows: int = 64, d: int = 64, tokens: int | None = None, seed: int = 0
) -> Instance:
    """Return a synthetic layer, determined by the arguments.

    Parameters
    ----------
    family : str
        One of `FAMILIES`, from easy to hard: independent, correlated, outliers, rank-deficient, dead.
    rows, d : int
        Shape of the weight.
    tokens : int, optional
        Calibration tokens, 8 d by default.
    seed : int
        Of weights and inputs.

    Returns
    -------
    Instance
        Float32.

    Raises
    ------
    MaskoptError
        If the family is unknown, a size is not positive, or the seed has more than 64 bits.

    Examples
    --------
    >>> from maskopt.problems import synthetic
    >>> instance = synthetic("outliers", rows=4, d=8)
    >>> instance.weight.shape, instance.gram.shape, instance.tokens
    (torch.Size([4, 8]), torch.Size([8, 8]), 64)
    >>> instance.problem().shape
    (4, 8)
    """
    if family not in FAMILIES:
        raise MaskoptError(f"There is no synthetic family {family!r}; choose one of {', '.join(FAMILIES)}.")
    tokens = 8 * d if tokens is None else tokens
    if min(rows, d, tokens) < 1:
        raise MaskoptError(f"A synthetic layer needs positive sizes; got rows {rows}, d {d}, tokens {tokens}.")
    if not whole(*SEEDS).fits(seed):
        raise MaskoptError(f"The seed must be an integer of at most 64 bits; got {shown(seed)}.")
    random = torch.Generator().manual_seed(seed)
    x = FAMILIES[family](d, tokens, random)
    weight = torch.randn(rows, d, generator=random, dtype=torch.float64) / d**0.5
    return Instance(
        weight.float(), (x.T @ x).float(), {"tokens": str(len(x)), "origin": f"synthetic {family}, seed {seed}"}
    )
