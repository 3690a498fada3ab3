"""Solved instances: single rows with their best known masks and proven bounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems.instance import Instance
from maskopt.problems.layer import LayerReconstruction

__all__ = ["LIBRARY", "SolvedInstance", "library"]

LIBRARY = Path(__file__).with_name("library.safetensors")


@dataclass(frozen=True)
class SolvedInstance:
    """One row of a layer and a set of masks, with the best known mask and a proven bound.

    Attributes
    ----------
    name : str
    instance : Instance
        Weight (1, d) and Gram (d, d); `metadata["origin"]` names their source.
    pattern : str
        The set's name for `maskopt.oracles.parse_masks`.
    sparsity : float or None
        Fraction of pruned entries, for patterns that need one.
    mask : Tensor
        The best known mask, boolean, shape (1, d).
    error : float
        Its error.
    bound : float
        A proven lower bound on the error of every mask of the set.
    prover : str
        The solver that proved the bound.
    """

    name: str
    instance: Instance
    pattern: str
    sparsity: float | None
    mask: Tensor
    error: float
    bound: float
    prover: str

    @property
    def solved(self) -> bool:
        """Whether the mask is proven optimal, to a relative 1e-6."""
        return self.bound >= self.error * (1.0 - 1e-6)

    def problem(self) -> LayerReconstruction:
        """Return the checked reconstruction problem."""
        return self.instance.problem()


def library(path: Path = LIBRARY) -> list[SolvedInstance]:
    """Return the library of solved instances.

    Parameters
    ----------
    path : Path
        A safetensors file written by `benchmarks/make_library.py`; by default that of the package.

    Returns
    -------
    list of SolvedInstance

    Raises
    ------
    MaskoptError
        If the file is missing.

    Examples
    --------
    >>> from maskopt.problems import library
    >>> instance = library()[0]
    >>> instance.bound <= instance.error
    True
    """
    if not path.is_file():
        raise MaskoptError(f"The library of solved instances {path} is missing; benchmarks/make_library.py makes it.")
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["instances"])
        return [
            SolvedInstance(
                name=name,
                instance=Instance(
                    file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.gram"), {"origin": fact["origin"]}
                ),
                pattern=fact["pattern"],
                sparsity=fact["sparsity"],
                mask=file.get_tensor(f"{name}.mask"),
                error=fact["error"],
                bound=fact["bound"],
                prover=fact["prover"],
            )
            for name, fact in facts.items()
        ]
