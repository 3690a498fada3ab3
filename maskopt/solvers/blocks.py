"""Errors and choices by row blocks: rows that the set or the objective couples are accepted or rejected as a whole."""

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Problem
from maskopt.solvers.base import row_block_of
from maskopt.solvers.rules import RowBlocks

__all__ = ["better_of", "block_errors", "random_per_block"]


def block_errors(problem: Problem, masks: MaskSet, mask: Tensor) -> Tensor:
    """Return the objective of each row block: the sum over its rows, from scratch in float64.

    Parameters
    ----------
    problem : Problem
    masks : MaskSet
        With the problem it says which consecutive rows form a block: one row each where nothing couples rows.
    mask : Tensor
        Boolean, shape (rows, d).

    Returns
    -------
    Tensor
        Float64, shape (blocks,).

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic(rows=6, d=8).problem()
    >>> mask = maskopt.NM(keep=2, group=4).lmo_mask(-layer.weight.abs())
    >>> [len(block_errors(layer, masks, mask)) for masks in (maskopt.PerRow(0.5), maskopt.Unstructured(0.5))]
    [6, 1]
    """
    return RowBlocks(row_block_of(problem, masks)).total(problem.objective(mask))


def better_of(problem: Problem, masks: MaskSet, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better and the worse of two masks, row block by row block.

    Parameters
    ----------
    problem : Problem
    masks : MaskSet
        Any mix of two members by row blocks is a member.
    one, two : Tensor
        Members, boolean, shape (rows, d); `one` counts as better where they are equal.

    Examples
    --------
    >>> import maskopt
    >>> layer, masks = maskopt.synthetic(rows=6, d=8).problem(), maskopt.PerRow(0.5)
    >>> one, two = masks.lmo_mask(-layer.weight.abs()), masks.lmo_mask(-layer.diagonal())
    >>> better, worse = better_of(layer, masks, one, two)
    >>> bool((layer.objective(better) <= layer.objective(worse)).all())
    True
    """
    row_blocks = RowBlocks(row_block_of(problem, masks))
    swap = block_errors(problem, masks, two) < block_errors(problem, masks, one)
    chosen = row_blocks.spread(swap).unsqueeze(1)
    return torch.where(chosen, two, one), torch.where(chosen, one, two)


def random_per_block(problem: Problem, masks: MaskSet, generator: torch.Generator) -> Tensor:
    """Draw uniform random numbers in [0, 1) for a weight's entries, the same ones for every row block.

    With common random numbers the answer for a row block depends on that block alone: not on how many rows are solved
    together, on the memory limit, or on the device.

    Parameters
    ----------
    problem : Problem
    masks : MaskSet
    generator : torch.Generator
        On the CPU; it is drawn from once for each entry of one block.

    Returns
    -------
    Tensor
        Float64, shape (rows, d), on the problem's device.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic(rows=4, d=8).problem()
    >>> drawn = random_per_block(layer, maskopt.PerRow(0.5), torch.Generator().manual_seed(0))
    >>> bool((drawn == drawn[0]).all())
    True
    """
    rows, d = problem.shape
    height = row_block_of(problem, masks)
    return (
        torch.rand((height, d), generator=generator, dtype=torch.float64).to(problem.device).repeat(rows // height, 1)
    )
