"""Sets of masks from the words people type."""

import re

from maskopt.errors import MaskoptError
from maskopt.oracles.matroid import NM, PartitionMatroid, PerRow, Unstructured

__all__ = ["parse_masks"]


def parse_masks(pattern: str, sparsity: float | None = None) -> PartitionMatroid:
    """Return the set named by a pattern and the share of weights to prune.

    Parameters
    ----------
    pattern : str
        "per-row", "unstructured", or "n:m" with n kept of every m ("2:4").
    sparsity : float, optional
        Share of the weights pruned, in [0, 1]; needed by the first two. With "n:m" it may be left out, and must
        agree if given.

    Raises
    ------
    MaskoptError
        If the pattern is unknown, the sparsity is missing or out of range, or both disagree.
    """
    if sparsity is not None and not 0.0 <= sparsity <= 1.0:
        raise MaskoptError(f"The sparsity must lie between 0 and 1; got {sparsity}.")
    ratio = re.fullmatch(r"(\d+):(\d+)", pattern)
    if ratio:
        keep, group = int(ratio[1]), int(ratio[2])
        if not 0 <= keep <= group or group == 0:
            raise MaskoptError(f"The pattern {pattern} keeps {keep} of every {group}, which is impossible.")
        if sparsity is not None and abs(sparsity - (1 - keep / group)) > 1e-9:
            raise MaskoptError(
                f"The pattern {pattern} keeps {keep} of every {group}, a sparsity of {1 - keep / group:g}, not "
                f"{sparsity:g}; leave the sparsity out."
            )
        return NM(keep=keep, group=group)
    families = {"per-row": PerRow, "unstructured": Unstructured}
    if pattern not in families:
        raise MaskoptError(f"There is no pattern {pattern!r}; choose per-row, unstructured, or n:m such as 2:4.")
    if sparsity is None:
        raise MaskoptError(f"The pattern {pattern} needs a sparsity between 0 and 1.")
    return families[pattern](float(1 - sparsity))
